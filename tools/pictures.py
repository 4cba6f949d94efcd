"""Draws the README's picture from committed results: `python tools/pictures.py`.

The picture shows the speedups of results/val/results.json and the first draft tree of results/draft_tree.json.
`python tools/pictures.py --record` first writes the latter: it decodes one answer with the reference model and records
every draft tree. Drafts do not depend on the clock there (`adaptive=False`), so the trees are the same on any machine.
"""

from __future__ import annotations

import io
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch
from PIL import Image

from msd.system.files import read_json, write_whole

ROOT = Path(__file__).parents[1]
PHOTOS = ROOT / "src/msd/photos"
TREES = ROOT / "results/draft_tree.json"
SPEEDS = ROOT / "results/val/results.json"
OUT = ROOT / "docs/images"
PHOTO, PROMPT, TOKENS = "skateboarder.jpg", "Describe the image in detail.", 96
TASKS = {
    "detail": "long description",
    "caption": "caption",
    "yesno": "yes/no question",
    "question": "open question",
    "vqa": "one-word answer",
}


@dataclass(frozen=True)
class Theme:
    """Colours of one version of the picture. accent, plain: bars with and without drafting."""

    background: str
    text: str
    muted: str
    accent: str
    plain: str
    modalities: dict[str, str]


THEMES = {
    "light": Theme(
        background="#ffffff",
        text="#1f2328",
        muted="#656d76",
        accent="#7546d3",
        plain="#c9d1d9",
        modalities={"vision": "#2f6fd0", "language": "#b3670c", "fusion": "#2d8a4e"},
    ),
    "dark": Theme(
        background="#0d1117",
        text="#e6edf3",
        muted="#8b949e",
        accent="#b794f6",
        plain="#484f58",
        modalities={"vision": "#79b0ff", "language": "#f0b072", "fusion": "#6fce85"},
    ),
}
MEANING = {"vision": "needs the image", "language": "follows from the text", "fusion": "needs both"}
WIDTH, HEIGHT = 8.0, 4.55  # inches; 200 pixels each


def record() -> None:
    """Decodes the answer and writes its draft trees to `TREES`."""
    from msd import SpeculativeConfig, SpeculativeVLM
    from msd.inspect import Trace

    vlm = SpeculativeVLM.from_pretrained("reference", "msd", SpeculativeConfig(adaptive=False))
    trace = Trace()
    answer = vlm.generate(PHOTOS / PHOTO, PROMPT, on_step=trace, max_new_tokens=TOKENS)
    text = vlm.processor.tokenizer.decode

    def node(fields: dict[str, Any]) -> dict[str, Any]:
        token, p, q = (fields.pop(name) for name in ("token", "p", "q"))
        return {"text": text([token]), "p": round(p, 4), "q": round(q, 4), **fields}

    steps = [
        {
            "root": text([step.root]),
            "nodes": [node(asdict(n)) for n in step.nodes],
            "emitted": [text([t]) for t in step.emitted],
        }
        for step in trace.passes
    ]
    data = {
        "command": "python tools/pictures.py --record",
        "photo": PHOTO,
        "prompt": PROMPT,
        "method": "msd",
        "answer": answer.text,
        "mean_acceptance_length": answer.statistics.mean_acceptance_length,
        "steps": steps,
    }
    write_whole(TREES, json.dumps(data, indent=1, ensure_ascii=False) + "\n")


def rows(nodes: list[dict[str, Any]]) -> list[int]:
    """Row of each node, root first. A parent's first child continues its row; others take the next free row."""
    children: dict[int, list[int]] = {}
    for n, node in enumerate(nodes, 1):
        children.setdefault(node["parent"], []).append(n)
    row, taken = [0] * (len(nodes) + 1), set()  # taken: (row, column)

    def chain(n: int) -> list[int]:
        """The node, its first child, that one's first child, and so on."""
        below = children.get(n, [])
        return [n, *chain(below[0])] if below else [n]

    def place(n: int, at: int) -> None:
        path = chain(n)
        columns = [nodes[m - 1]["depth"] if m else 0 for m in path]
        while any((at, c) in taken for c in columns):
            at += 1
        taken.update((at, c) for c in columns)
        for m in path:
            row[m] = at
        for m in reversed(path):
            for other in children.get(m, [])[1:]:
                place(other, at + 1)

    for below in children.values():
        below.sort(key=lambda n: not nodes[n - 1]["accepted"])
    place(0, 0)
    return row


def box(axes: Axes, x: float, y: float, text: str, edge: str, fill: str, ink: str, dashed: bool = False) -> None:
    """A token in a rounded box, centred at (x, y)."""
    style = "--" if dashed else "-"
    shape = FancyBboxPatch(
        (x - 0.36, y - 0.17), 0.72, 0.34, "round,pad=0,rounding_size=0.1", ec=edge, fc=fill, lw=1.4, ls=style, zorder=2
    )
    axes.add_patch(shape)
    axes.text(x, y - 0.01, text.strip(), ha="center", va="center", color=ink, fontsize=10, zorder=3)


def draw_tree(axes: Axes, step: dict[str, Any], theme: Theme) -> None:
    """One draft tree: root, drafted nodes with p and q, and the token that the target adds."""
    nodes = step["nodes"]
    row = rows(nodes)
    wide, high = 1.08, 0.74
    where = [(0.0, 0.0)] + [(wide * node["depth"], -high * row[n]) for n, node in enumerate(nodes, 1)]
    accepted = [n for n, node in enumerate(nodes, 1) if node["accepted"]]
    for n, node in enumerate(nodes, 1):
        (x0, y0), (x1, y1) = where[node["parent"]], where[n]
        kept, colour = node["accepted"], theme.modalities[node["modality"]]
        line = {"color": theme.text if kept else theme.muted, "lw": 2 if kept else 1, "ls": "-" if kept else "--"}
        if y0 == y1:
            axes.plot([x0, x1], [y0, y1], zorder=1, **line)
        else:
            axes.plot([x0 + wide / 2, x0 + wide / 2, x1], [y0, y1, y1], zorder=1, **line)
        ground = colour if kept else theme.background
        box(axes, x1, y1, node["text"], colour, ground, theme.background if kept else colour, dashed=not kept)
        chances = f"p {node['p']:.2f}  q {node['q']:.2f}"
        axes.text(x1, y1 - 0.28, chances, ha="center", va="center", color=theme.muted, fontsize=7.5)
    last = where[accepted[-1]] if accepted else where[0]
    axes.plot([last[0], last[0] + wide], [last[1]] * 2, color=theme.text, lw=2, zorder=1)
    box(axes, last[0] + wide, last[1], step["emitted"][-1], theme.text, theme.background, theme.text)
    box(axes, 0, 0, step["root"], theme.text, theme.background, theme.text)
    for x, label in ((0, "root"), (last[0] + wide, "from the target")):
        axes.text(x, -0.28, label, ha="center", va="center", color=theme.muted, fontsize=7.5)
    axes.set_xlim(-0.45, 6 * wide + 0.85)
    axes.set_ylim(-high * max(row) - 0.42, 0.3)


def draw_speeds(axes: Axes, results: dict[str, Any], theme: Theme) -> None:
    """Bars by task: `ar` and `msd`, end to end over the library's `generate()`."""
    cells = {(r["method"], r["task"]): r for r in results["rows"]}
    for i, (task, name) in enumerate(TASKS.items()):
        plain, ours = (cells[method, task]["speedup_vs_transformers"] for method in ("ar", "msd"))
        axes.barh(i - 0.18, ours, 0.36, color=theme.accent)
        axes.barh(i + 0.18, plain, 0.36, color=theme.plain)
        axes.text(ours + 0.06, i - 0.23, f"{ours:.2f}x", va="center", color=theme.text, fontsize=9, weight="bold")
        axes.text(plain + 0.06, i + 0.22, f"{plain:.2f}x", va="center", color=theme.muted, fontsize=8)
        length = f"{cells['msd', task]['mean_answer_tokens']:.0f} tokens"
        for label, left, colour in ((name, 54, theme.text), (length, 6, theme.muted)):
            axes.annotate(
                label,
                (0, i),
                (-left, 0),
                textcoords="offset points",
                ha="right",
                va="center",
                color=colour,
                fontsize=8.5,
            )
    axes.axvline(1, color=theme.text, lw=1, ls=":")
    axes.set(xlim=(0, 4.85), ylim=(len(TASKS) - 0.45, -0.5))


def draw(theme: Theme) -> bytes:
    """The picture as PNG."""
    trees, results = (read_json(path, "restore it from the repository", finite=False) for path in (TREES, SPEEDS))
    step = trees["steps"][0]
    figure = plt.figure(figsize=(WIDTH, HEIGHT), facecolor=theme.background)

    def area(x: float, y: float, width: float, height: float) -> Axes:
        """Axes without frame; x, y, width, height in inches."""
        axes = figure.add_axes((x / WIDTH, y / HEIGHT, width / WIDTH, height / HEIGHT))
        axes.axis("off")
        return axes

    def write(x: float, y: float, text: str, colour: str = theme.muted, size: float = 8, **style: Any) -> None:
        figure.text(x / WIDTH, y / HEIGHT, text, color=colour, fontsize=size, va="center", **style)

    write(0.15, 4.37, f"“{trees['prompt']}”", theme.text, 9.5, style="italic")
    area(0.15, 2.49, 2.55, 1.72).imshow(Image.open(PHOTOS / trees["photo"]).convert("RGB"), aspect="auto")
    write(2.95, 4.37, "Speedup over transformers generate(), end to end", theme.text, 9.5, weight="bold")
    draw_speeds(area(4.87, 2.65, 3.03, 1.58), results, theme)
    for x, mark, colour, text in (
        (4.15, "■", theme.accent, "msd"),
        (4.75, "■", theme.plain, "same kernels, no drafting"),
        (6.62, "┊", theme.text, "generate() = 1x"),
    ):
        write(x, 2.52, mark, colour, 10)
        write(x + 0.17, 2.52, text)

    drafted, emitted = len(step["nodes"]), len(step["emitted"])
    title = f"{drafted} drafted tokens, one pass of the target: {emitted} tokens of the answer"
    write(0.15, 2.15, title, theme.text, 9.5, weight="bold")
    draw_tree(area(0.1, 0.6, 7.8, 1.42), step, theme)
    for x, (name, meaning) in zip((0.15, 1.75, 3.75), MEANING.items(), strict=True):
        write(x, 0.37, "●", theme.modalities[name], 10)
        write(x + 0.17, 0.37, f"{name}: {meaning}")
    write(0.15, 0.13, "p, q: probability of the token under the target and under the drafter")
    write(7.85, 0.37, "filled: accepted   dashed: rejected", ha="right")
    write(7.85, 0.13, "colours: modality, as the router predicts it", ha="right")
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=200, facecolor=theme.background)
    plt.close(figure)
    small = io.BytesIO()
    Image.open(drawn).convert("RGB").quantize(128, dither=Image.Dither.NONE).save(small, "PNG", optimize=True)
    return small.getvalue()


def main() -> None:
    """Draws both versions of the picture; with `--record`, records the draft trees first."""
    if "--record" in sys.argv:
        record()
    for name, theme in THEMES.items():
        write_whole(OUT / f"overview-{name}.png", draw(theme))


if __name__ == "__main__":
    main()
