"""Losses of draft networks, a file for each family. They take a network, a batch of its target and where drafts start.

Nothing here knows which method uses a loss: a method names its own when it is registered (`msd.drafters.registry`).
"""
