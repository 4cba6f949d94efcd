"""Drafting methods, one file or folder each, discovered by `msd.drafters.registry`; none imports another."""
