"""Drafting methods, a file or folder for each, found by `msd.drafters.registry`; none imports another."""
