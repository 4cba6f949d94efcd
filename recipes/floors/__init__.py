"""The figures promised, and what was measured."""
