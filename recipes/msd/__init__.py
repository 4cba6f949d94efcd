"""The shipped drafter: prompts, captured answers, ablations and lossy policies."""
