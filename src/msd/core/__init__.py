"""The nouns of the loop: layout, cache, tree, sampling, statistics, modality. Nothing here knows of models."""
