"""Compares the estimator with measured passes."""
