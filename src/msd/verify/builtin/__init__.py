"""The verification policies, one per file. Every module in this folder is imported and registers its policies."""
