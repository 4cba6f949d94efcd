"""Shared parts of drafters: layers, context, memory, draft levels, tree growth, checkpoints."""
