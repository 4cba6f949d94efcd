"""Measuring: certificates of losslessness and benchmarks."""
