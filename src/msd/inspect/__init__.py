"""What was drafted for one answer, accepted and rejected, step by step: recorded, and drawn as a page."""

from msd.inspect.page import Node, Pass, Trace, page

__all__ = ["Node", "Pass", "Trace", "page"]
