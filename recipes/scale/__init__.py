"""Training on more than one GPU: configurations, and the arithmetic of docs/scale.md."""
