"""The verification policies, a file each; every module here is imported and registers what it holds."""
