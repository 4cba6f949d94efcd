"""The race: methods trained for the same time and on the same answers, and measured in one run."""
