"""Compares measured figures with the project's targets."""
