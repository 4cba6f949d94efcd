"""What was drafted for one answer, accepted and rejected, step by step: recorded, and drawn as a page."""

from msd.inspect.page import page
from msd.inspect.trace import Node, Step, tracing

__all__ = ["Node", "Step", "page", "tracing"]
