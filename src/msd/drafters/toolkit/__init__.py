"""What drafters are made of: layers, context, memory, levels of a draft, tree growth, weights on disk."""
