"""Records the draft trees of a generation, with accepted and rejected nodes, and renders them as an HTML page."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from jinja2 import Template
from PIL import Image

from msd.core.modality import known
from msd.core.tree import Step
from msd.result import Result


@dataclass(frozen=True)
class Node:
    """A drafted token.

    parent: index of the parent node in the step, 0 for the root. modality: of the subtree. p, q: probability of the
    token given the path to its parent, under the target (without logits processors) and under the draft; q is None if
    the drafter has no probabilities.
    """

    token: int
    parent: int
    depth: int
    modality: str
    p: float
    q: float | None
    accepted: bool


@dataclass(frozen=True)
class Pass:
    """One step of a row.

    root: the newest token. nodes: the draft tree below it, from node 1 on, parents first. emitted: the accepted drafts
    and the target's own token after them. draft_seconds, score_seconds: time of the draft and of the target pass.
    """

    root: int
    nodes: tuple[Node, ...]
    emitted: tuple[int, ...]
    draft_seconds: float
    score_seconds: float


@dataclass
class Trace:
    """Records the steps of a row: pass it to `SpeculativeVLM.generate(on_step=…)`."""

    row: int = 0
    passes: list[Pass] = field(default_factory=list)

    def __call__(self, step: Step) -> None:
        """Records a step, unless it is the prefill or the row has ended."""
        if not step.prefill and step.accepted.tokens[self.row] and self.row not in step.accepted.padded:
            self.passes.append(read(step, self.row))


def read(step: Step, row: int) -> Pass:
    """Returns what a step did in `row`, which had not ended before it. The step is not the prefill."""
    tree = step.tree
    parts = (tree.tokens, tree.parents, tree.depths, tree.modality, tree.valid)
    tokens, parents, depths, kinds, valid = (part[row].tolist() for part in parts)
    parent = tree.parents[row].clamp_min(0)
    p = step.scores.logits[row].float().softmax(-1)[parent, tree.tokens[row]].tolist()
    q = [None] * tree.size if tree.q is None else tree.q[row].tolist()
    names, accepted = known(), set(step.accepted.nodes[row])
    drafted = [n for n in range(1, tree.size) if valid[n]]
    index = {n: i for i, n in enumerate([0, *drafted])}
    nodes = tuple(
        Node(tokens[n], index[parents[n]], depths[n], names[kinds[n]].name, p[n], q[n], n in accepted) for n in drafted
    )
    return Pass(tokens[0], nodes, tuple(step.accepted.tokens[row]), step.draft_seconds, step.score_seconds)


COLOURS = {
    "language": "#e7a13c", "vision": "#4c8fd6", "fusion": "#58a65c", "event_sparse": "#b07cc6",
    "event_dense": "#d65c8a", "video_reasoning": "#2fa8a0", "audio": "#8d8d3a", "depth": "#8a6a54",
}  # fmt: skip
OTHER = "#999999"
LARGEST = 320  # pixels of an image, at most
TEMPLATE = Template(Path(__file__).with_suffix(".html").read_text(encoding="utf-8"), autoescape=True)


def page(
    title: str,
    result: Result,
    steps: Sequence[Pass],
    decode: Callable[[int], str],
    images: Sequence[Image.Image] = (),
    extra: str = "",
    gains: Sequence[Sequence[Sequence[float]]] | None = None,
) -> str:
    """Returns the HTML page of one answer.

    decode: returns the text of a token id. images: the images of the prompt. extra: HTML to add after them, such as
    event frames. gains: for each token, the image gain in nats of the blocks of the first image, by rows.
    """
    drafted = [False, *(i < len(step.emitted) - 1 for step in steps for i in range(len(step.emitted)))]
    kinds = result.predicted_modality or [None] * len(result.tokens)
    return TEMPLATE.render(
        title=title,
        result=result,
        steps=steps,
        decode=decode,
        images=[_inline(image) for image in images],
        extra=extra,
        tokens=list(zip(result.tokens, kinds, drafted, strict=False)),
        gains=[[round(gain, 3) for row in token for gain in row] for token in gains or ()],
        grid=len(gains[0]) if gains else 0,
        kinds={*kinds, *(node.modality for step in steps for node in step.nodes)},
        colours=COLOURS,
        other=OTHER,
    )


def _inline(image: Image.Image) -> str:
    """Returns a smaller copy of an image as a data URL."""
    small = image.convert("RGB")
    small.thumbnail((LARGEST, LARGEST))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
