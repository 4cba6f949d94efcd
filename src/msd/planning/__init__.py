"""How much is drafted: what a target pass costs here, and what a step may spend."""
