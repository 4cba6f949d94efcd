"""A drawing of boxes, arrows, circles and text as SVG, light or dark as the reader's system is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from xml.sax.saxutils import escape

from msd.inspect import COLOURS

CHARACTER, LINE = 7.1, 17.0  # pixels of a character and of a line of text, at 13 pixels
STYLE = """
text { font: 13px system-ui, sans-serif; fill: #1f2328 } .muted { fill: #656d76 } .middle { text-anchor: middle }
.end { text-anchor: end } .code { font-family: ui-monospace, monospace } .small { font-size: 12px }
.box { fill: #f6f8fa; stroke: #8c959f } .line { stroke: #57606a; fill: none; stroke-width: 1.3 } .head { fill: #57606a }
.faint { stroke: #d0d7de } .good { stroke: #1a7f37; stroke-width: 2.4 } .goodfill { fill: #dafbe1; stroke: #1a7f37 }
.accent { fill: none; stroke: #7546d3; stroke-width: 2 } .dashed { stroke-dasharray: 4 3 }
@media (prefers-color-scheme: dark) {
text { fill: #e6edf3 } .muted { fill: #9198a1 } .box { fill: #161b22; stroke: #6e7681 }
.line { stroke: #9198a1 } .head { fill: #9198a1 } .faint { stroke: #30363d } .good { stroke: #3fb950 }
.goodfill { fill: #12301c; stroke: #3fb950 } .accent { stroke: #a78bfa }
}
"""
CLASSES = "\n".join(f".{name} {{ stroke: {colour}; fill: {colour}33 }}" for name, colour in COLOURS.items())


@dataclass
class Drawing:
    """Collects the elements of a picture of `width` x `height` pixels. title: what it shows, in words."""

    width: int
    height: int
    title: str
    parts: list[str] = field(default_factory=list)

    def text(self, x: float, y: float, text: str, kind: str = "") -> None:
        """Writes one line with its baseline at y; kind: classes, such as "middle muted"."""
        self.parts.append(f'<text x="{x:.4g}" y="{y:.4g}" class="{kind}">{escape(text)}</text>')

    def box(self, x: float, y: float, lines: Sequence[str], width: float = 0, kind: str = "box") -> Box:
        """Draws a box with lines of text; as wide as they are, or `width`."""
        wide = width or max(map(len, lines)) * CHARACTER + 20
        high = len(lines) * LINE + 14
        size = f'x="{x:.4g}" y="{y:.4g}" width="{wide:.4g}" height="{high:.4g}"'
        self.parts.append(f'<rect {size} rx="6" class="{kind}"/>')
        for i, line in enumerate(lines):
            self.text(x + wide / 2, y + 20 + i * LINE, line, "middle" if i == 0 else "middle muted")
        return Box(x, y, wide, high)

    def circle(self, x: float, y: float, text: str, kind: str = "box", radius: float = 13, below: str = "") -> None:
        """Draws a circle with a text in it, and another below."""
        self.parts.append(f'<circle cx="{x:.4g}" cy="{y:.4g}" r="{radius}" class="{kind}"/>')
        self.text(x, y + 4.5, text, "middle")
        if below:
            self.text(x, y + radius + 15, below, "middle muted small")

    def line(self, points: Sequence[tuple[float, float]], kind: str = "line", arrow: bool = False) -> None:
        """Draws straight lines through points, with an arrow's head at the last."""
        path = " ".join(f"{x:.4g},{y:.4g}" for x, y in points)
        end = ' marker-end="url(#head)"' if arrow else ""
        self.parts.append(f'<polyline points="{path}" class="{kind}"{end}/>')

    def arrow(self, *points: tuple[float, float], label: str = "", kind: str = "line") -> None:
        """Draws an arrow; the label stands over its middle."""
        self.line(points, kind, arrow=True)
        if label:
            (x0, y0), (x1, y1) = points[0], points[-1]
            self.text((x0 + x1) / 2, (y0 + y1) / 2 - 6, label, "middle muted small")

    def __str__(self) -> str:
        """The SVG file."""
        frame = f'viewBox="0 0 {self.width} {self.height}" width="{self.width}" height="{self.height}"'
        head = '<marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        shape = '<path class="head" d="M0,0 L8,4 L0,8 z"/></marker>'
        title = f"<title>{escape(self.title)}</title>"
        start = f'<svg xmlns="http://www.w3.org/2000/svg" {frame} role="img">'
        body = "\n".join(self.parts)
        return f"{start}{title}\n<style>{STYLE}{CLASSES}\n</style>\n<defs>{head}{shape}</defs>\n{body}\n</svg>\n"


@dataclass(frozen=True)
class Box:
    """A drawn box, and the middles of its sides."""

    x: float
    y: float
    width: float
    height: float

    @property
    def left(self) -> tuple[float, float]:
        """Middle of the left side."""
        return self.x, self.y + self.height / 2

    @property
    def right(self) -> tuple[float, float]:
        """Middle of the right side."""
        return self.x + self.width, self.y + self.height / 2

    @property
    def top(self) -> tuple[float, float]:
        """Middle of the upper side."""
        return self.x + self.width / 2, self.y

    @property
    def bottom(self) -> tuple[float, float]:
        """Middle of the lower side."""
        return self.x + self.width / 2, self.y + self.height
