"""Core types of the decoding loop: layout, cache, tree, sampling, statistics, modality. No model-specific code."""
