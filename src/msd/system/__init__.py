"""The machine below: files written whole and read with suspicion, memory pages, threads."""
