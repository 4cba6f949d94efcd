"""Losses of draft networks: functions of a network, a teacher batch and the draft roots.

The losses do not depend on methods; a method names its loss when it is registered (`msd.drafters.registry`).
"""
