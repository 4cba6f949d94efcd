"""Turns images, videos, sounds and chat messages into processor output."""
