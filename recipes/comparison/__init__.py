"""Prompts of the comparison."""
