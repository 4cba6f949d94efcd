"""The shipped drafter: its prompts, answers, ablations and policies."""
