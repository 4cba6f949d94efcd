"""The embedded reference model: its data, training and evaluation."""
