"""Access to the machine: files, memory pages, threads."""
