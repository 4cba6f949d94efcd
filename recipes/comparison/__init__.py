"""Prompts for the comparison of all methods."""
