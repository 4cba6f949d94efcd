"""Training: a resumable loop, answers written by a model, low-rank updates, and the scores of what was learned."""
