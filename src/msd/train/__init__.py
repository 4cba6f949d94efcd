"""Training: captures answers of the target, trains a drafter on them, and measures it on held-out answers."""
