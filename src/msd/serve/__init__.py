"""Serves a model to several clients at once: requests share one batch of draft trees, over OpenAI's HTTP interface."""
