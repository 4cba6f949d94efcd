"""Records the draft trees of one answer, and shows them as an HTML page."""

from msd.inspect.page import Node, Pass, Trace, page

__all__ = ["Node", "Pass", "Trace", "page"]
