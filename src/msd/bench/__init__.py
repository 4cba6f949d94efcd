"""Benchmarks: times methods against each other in one run, and reports the results."""
