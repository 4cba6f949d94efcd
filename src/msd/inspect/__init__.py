"""What was drafted for one answer, accepted and rejected, step by step: recorded, and drawn as a page."""

from msd.inspect.page import page
from msd.inspect.trace import Node, Pass, Trace

__all__ = ["Node", "Pass", "Trace", "page"]
