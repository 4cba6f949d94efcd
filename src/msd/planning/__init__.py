"""Planning: how much a step drafts, from measured costs of the target."""
