"""Draws the diagrams of the pages: `python -m tools.diagrams` writes docs/images/*.svg, `--check` compares them.

The trees are those of results/draft_tree.json, the costs those of results/val/results.json; the others are schematic.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tools.svg import Drawing

from msd.system.files import write_whole

ROOT = Path(__file__).parents[1]
OUT = ROOT / "docs/images"
TREE = ROOT / "results/draft_tree.json"
COSTS = ROOT / "results/val/results.json"


def step() -> Drawing:
    """One decoding step."""
    d = Drawing(760, 214, "One decoding step: prefill, then a loop of router, drafter, target pass and verifier")
    question = d.box(10, 20, ["image", "and prompt"], 110)
    prefill = d.box(150, 20, ["target", "prefill"], 110)
    router = d.box(300, 20, ["router", "modality of the next token"], 205)
    drafter = d.box(545, 20, ["drafter", "grows a tree"], 200)
    score = d.box(545, 118, ["target", "scores the tree in one pass"], 200)
    verifier = d.box(300, 118, ["verifier", "accepts a path"], 205)
    text = d.box(130, 118, ["text", "path + one token"], 130)
    for a, b in ((question, prefill), (prefill, router), (router, drafter)):
        d.arrow(a.right, b.left)
    d.arrow(drafter.bottom, score.top)
    d.arrow(score.left, verifier.right)
    d.arrow(verifier.left, text.right)
    d.arrow(verifier.top, router.bottom)
    d.text(verifier.top[0] + 8, 100, "new root", "muted small")
    d.text(10, 200, "The target is the user's model. Everything else affects the speed, never the text.", "muted small")
    return d


def walk() -> Drawing:
    """The verifier's walk down a tree."""
    d = Drawing(760, 232, "The verifier draws a token at each node and follows the child that has it")
    at = {"root": (70, 100), "a": (230, 50), "b": (230, 150), "c": (390, 50), "e": (390, 150), "f": (550, 50)}
    edges = (("root", "a"), ("root", "b"), ("a", "c"), ("b", "e"), ("c", "f"))
    for parent, child in edges:
        d.line([at[parent], at[child]], "line good" if child in ("a", "c") else "line")
    for name, (x, y) in at.items():
        d.circle(x, y, "r" if name == "root" else name, "goodfill" if name in ("root", "a", "c") else "box", 16)
    d.text(70, 142, "root", "middle muted small")
    d.text(150, 54, "draws a", "middle small")
    d.text(310, 40, "draws c", "middle small")
    d.text(535, 14, "draws g", "middle small")
    d.text(566, 92, "f was drafted, but g was drawn", "middle muted small")
    d.circle(690, 50, "g", "goodfill", 16, below="bonus token")
    d.line([(406, 50), (430, 22), (640, 22), (676, 42)], "line good dashed", arrow=True)
    d.text(
        10,
        200,
        "One target pass gave p at every node. Each drawn token is emitted: it is a draw from p, tree or not.",
        "",
    )
    d.text(
        10, 220, "The tree decides only whether p of the next token is known already. Emitted here: a, c, g.", "muted"
    )
    return d


def trees() -> Drawing:
    """The first draft tree of results/draft_tree.json, by modality."""
    recorded = json.loads(TREE.read_text(encoding="utf-8"))
    first = recorded["steps"][0]
    nodes = first["nodes"]
    deepest = max(node["depth"] for node in nodes)
    rows = leaves(nodes)
    high = max(rows.values()) * 56 + 124
    d = Drawing(760, int(high), "A recorded draft tree; the colour of a node is the modality whose subtree drafted it")
    d.text(10, 20, f"{recorded['photo']}: “{recorded['prompt']}”, first step, p of the target and q of the draft")
    xs = [60 + depth * 640 / max(1, deepest) for depth in range(deepest + 1)]
    place = {0: (xs[0], 60 + rows[0] * 56)}
    for i, node in enumerate(nodes, 1):
        place[i] = xs[node["depth"]], 60 + rows[i] * 56
        d.line([place[node["parent"]], place[i]], "line good" if node["accepted"] else "line faint")
    d.box(place[0][0] - 24, place[0][1] - 15, [first["root"].strip() or "·"], 48, "goodfill")
    for i, node in enumerate(nodes, 1):
        x, y = place[i]
        word = node["text"].strip() or repr(node["text"])[1:-1]
        wide = max(46.0, 7.6 * len(word) + 14)
        d.box(x - wide / 2, y - 15, [""], wide)  # opaque, so that no line shows through
        d.box(x - wide / 2, y - 15, [word], wide, node["modality"])
        d.text(x, y + 29, f"{node['p']:.2f} / {node['q']:.2f}", "middle muted small")
    kinds = list(dict.fromkeys(node["modality"] for node in nodes))
    for i, kind in enumerate(kinds):
        d.parts.append(f'<rect x="{10 + 110 * i}" y="{high - 24}" width="14" height="14" class="{kind}"/>')
        d.text(30 + 110 * i, high - 12, kind, "small")
    d.text(30 + 110 * len(kinds), high - 12, "green lines: accepted by the target", "muted small")
    return d


def leaves(nodes: list[dict[str, Any]]) -> dict[int, float]:
    """The row of each node (0 is the root): leaves one below the other, a parent at the middle of its children."""
    children: dict[int, list[int]] = {}
    for i, node in enumerate(nodes, 1):
        children.setdefault(node["parent"], []).append(i)
    rows: dict[int, float] = {}
    free = iter(range(len(nodes) + 1))

    def visit(node: int) -> float:
        below = [visit(child) for child in children.get(node, [])]
        rows[node] = sum(below) / len(below) if below else float(next(free))
        return rows[node]

    visit(0)
    return rows


def gain() -> Drawing:
    """The image gain of a token."""
    d = Drawing(760, 200, "Image gain: the divergence of the target's distributions with and without the image")
    seen = d.box(10, 20, ["image + prompt + answer so far", "teacher pass"], 240)
    blind = d.box(10, 100, ["prompt + answer so far", "image keys masked"], 240)
    p = d.box(300, 20, ["p(· | image, prefix)"], 165)
    r = d.box(300, 108, ["p(· | prefix)"], 165)
    kl = d.box(500, 62, ["KL(p ‖ p without)", "image gain, nats"], 150)
    d.arrow(seen.right, (p.left[0], seen.right[1]))
    d.arrow(blind.right, (r.left[0], blind.right[1]))
    d.arrow(p.right, (kl.left[0], kl.left[1] - 8))
    d.arrow(r.right, (kl.left[0], kl.left[1] + 8))
    for i, name in enumerate(("vision", "fusion", "language")):
        y = 22 + 54 * i
        d.box(690, y, [name[:1].upper()], 30, name)
        d.line([kl.right, (688, y + 15)], "line faint")
        d.text(705, y + 46, name, "middle small")
    d.text(
        10,
        176,
        "Half of all tokens have the smallest gains (language), a fifth the largest (vision): label thresholds.",
        "",
    )
    d.text(
        10, 194, "At decoding, the router predicts the label from the hidden states, without the second pass.", "muted"
    )
    return d


def costs() -> Drawing:
    """The measured cost of a pass, and the governor."""
    measured = json.loads(COSTS.read_text(encoding="utf-8"))["environment"]["costs"]
    nodes, seconds = measured["nodes"], [1000 * s for s in measured["seconds"][0]]
    d = Drawing(760, 270, "Milliseconds of a target pass by its number of nodes, and the states of the governor")
    left, bottom, wide, high, most = 50.0, 220.0, 300.0, 180.0, 120.0
    x = lambda n: left + wide * n / nodes[-1]  # noqa: E731
    y = lambda ms: bottom - high * ms / most  # noqa: E731
    for ms in (0, 30, 60, 90, 120):
        d.line([(left, y(ms)), (left + wide, y(ms))], "line faint")
        d.text(left - 8, y(ms) + 4, str(ms), "end muted small")
    d.line([(x(n), y(ms)) for n, ms in zip(nodes, seconds, strict=True)], "accent")
    for n, ms in zip(nodes, seconds, strict=True):
        d.parts.append(f'<circle cx="{x(n):.4g}" cy="{y(ms):.4g}" r="3" class="accent"/>')
    for n in (1, 17, 33, 65):
        d.text(x(n), bottom + 16, str(n), "middle muted small")
    d.text(left, 22, "ms of a pass over n nodes (results/val)", "")
    d.text(left, bottom + 36, "nodes, with the root", "muted small")
    drafts = d.box(420, 60, ["drafts", "credit ≥ 0"], 130)
    pauses = d.box(610, 60, ["pauses", "16, 32, 64 … steps"], 140)
    d.arrow((drafts.right[0], 72), (pauses.left[0], 72))
    d.arrow((pauses.left[0], 96), (drafts.right[0], 96))
    d.text(420, 140, "→  drafting has lost the time of nine useless drafts", "small")
    d.text(420, 160, "←  the pause is over: one probe", "small")
    d.text(420, 190, "Each step keeps the nodes that maximise tokens", "muted")
    d.text(420, 207, "per second: Σ chance ÷ (draft + pass).", "muted")
    return d


def vision() -> Drawing:
    """The path of an image."""
    d = Drawing(760, 210, "An image is encoded once for the target, and once for the drafter")
    pixels = d.box(10, 60, ["pixels", "of the processor"], 125)
    key = d.box(165, 60, ["content key", "tensor, dtype, options"], 170)
    tower = d.box(365, 12, ["vision tower", "if the key is new"], 135)
    cache = d.box(365, 108, ["features", "kept by content"], 135)
    d.box(530, 60, ["target", "prefill"], 90)
    adaptor = d.box(650, 12, ["entries", "or 4 tokens, g"], 100)
    draft = d.box(650, 108, ["drafter", "each step"], 100)
    d.arrow(pixels.right, key.left)
    d.arrow((335, 75), (365, 40))
    d.arrow((335, 92), (365, 125))
    d.arrow(tower.bottom, cache.top)
    d.arrow(cache.right, (530, 95))
    d.arrow((620, 78), (650, 45), label="")
    d.text(622, 56, "taps", "end muted small")
    d.arrow(adaptor.bottom, draft.top)
    d.text(
        10,
        184,
        "The drafter reads the hidden states at image positions once, with the prompt. With the part",
        "muted",
    )
    d.text(10, 201, "`vision` it keeps four entries and one global vector g of them.", "muted")
    return d


def recurrent() -> Drawing:
    """Recurrent layers, level by level."""
    d = Drawing(760, 226, "A recurrent layer scores a tree level by level; each node begins with its parent's state")
    at = {"r": (60, 90), "a": (220, 50), "b": (220, 130), "c": (380, 30), "d": (380, 90), "e": (380, 150)}
    for parent, child in (("r", "a"), ("r", "b"), ("a", "c"), ("a", "d"), ("b", "e")):
        d.line([at[parent], at[child]], "line good" if child in ("a", "d") else "line", arrow=False)
    for name, (x, y) in at.items():
        d.circle(x, y, name, "goodfill" if name in "rad" else "box", 15)
        d.box(x + 22, y - 14, [f"s({name})"], 50, "goodfill" if name == "d" else "box")
    for i, label in enumerate(("root", "level 1", "level 2")):
        d.text(60 + 160 * i, 192, label, "middle muted small")
        d.line([(140 + 160 * i, 12), (140 + 160 * i, 176)], "line faint dashed")
    d.text(480, 60, "A level is one batch of single-token")
    d.text(480, 77, "steps, from the states of the parents.")
    d.text(480, 104, "Commit keeps the state of the last", "")
    d.text(480, 121, "accepted node, s(d), and drops others.", "")
    d.text(480, 148, "Attention runs once over all nodes.", "muted")
    d.text(
        10,
        216,
        "No token is computed twice. A state cannot be cut back, so each node keeps its own.",
        "muted",
    )
    return d


DRAWINGS: dict[str, Callable[[], Drawing]] = {
    "step": step, "walk": walk, "trees": trees, "gain": gain, "costs": costs, "vision": vision, "recurrent": recurrent,
}  # fmt: skip


def main() -> int:
    """Writes or checks all diagrams; returns the exit code."""
    stale = []
    for name, draw in DRAWINGS.items():
        path, text = OUT / f"{name}.svg", str(draw())
        if "--check" not in sys.argv:
            write_whole(path, text)
        elif not path.is_file() or path.read_text(encoding="utf-8") != text:
            stale.append(path.name)
    if stale:
        print(f"stale: {', '.join(stale)}; run: python -m tools.diagrams", file=sys.stderr)
    return int(bool(stale))


if __name__ == "__main__":
    sys.exit(main())
