"""Records the draft trees of a generation, with accepted and rejected nodes, and renders them as an HTML page."""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

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
        if step.prefill or not step.accepted.tokens[self.row] or self.row in step.accepted.padded:
            return
        tree, row = step.tree, self.row
        parts = (tree.tokens, tree.parents, tree.depths, tree.modality, tree.valid)
        tokens, parents, depths, kinds, valid = (part[row].tolist() for part in parts)
        parent = tree.parents[row].clamp_min(0)
        p = step.scores.logits[row].float().softmax(-1)[parent, tree.tokens[row]].tolist()
        q = [None] * tree.size if tree.q is None else tree.q[row].tolist()
        names, accepted = known(), set(step.accepted.nodes[row])
        drafted = [n for n in range(1, tree.size) if valid[n]]
        index = {n: i for i, n in enumerate([0, *drafted])}
        nodes = tuple(
            Node(tokens[n], index[parents[n]], depths[n], names[kinds[n]].name, p[n], q[n], n in accepted)
            for n in drafted
        )
        emitted = tuple(step.accepted.tokens[row])
        self.passes.append(Pass(tokens[0], nodes, emitted, step.draft_seconds, step.score_seconds))


COLOURS = {
    "language": "#e7a13c", "vision": "#4c8fd6", "fusion": "#58a65c", "event_sparse": "#b07cc6",
    "event_dense": "#d65c8a", "video_reasoning": "#2fa8a0", "audio": "#8d8d3a", "depth": "#8a6a54",
}  # fmt: skip
OTHER = "#999999"
LARGEST = 320  # pixels of an image, at most
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 68rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
.shown { display: flex; gap: .5rem; flex-wrap: wrap } .shown img { max-width: 20rem; border: 1px solid #ccc }
.answer { font-size: 1.15rem; line-height: 2.1; background: #fafafa; padding: .5rem 1rem }
.token { border-bottom: 3px solid; white-space: pre-wrap } .drafted { background: #e2f2e2 }
.step { display: flex; gap: 1rem; border-top: 1px solid #ddd; padding: .4rem 0; align-items: baseline }
.step > b { min-width: 3rem; text-align: right; color: #777; font-weight: 400 }
ul { list-style: none; margin: 0; padding-left: 1.3rem; border-left: 1px dotted #bbb }
.step > ul { border: 0; padding: 0 }
li span { white-space: pre-wrap; font-family: ui-monospace, monospace } .no { color: #888 }
.no span { text-decoration: line-through } small { color: #777 } .key i { padding: 0 .5rem; border-bottom: 3px solid }
.step > small { min-width: 9rem } .image { position: relative; line-height: 0 } .token[data-gain] { cursor: pointer }
.image > div { position: absolute; inset: 0; display: grid } .image > div > i { background: #d62728 }
.token.selected { outline: 2px solid #d62728 }
"""
# a click on a token shades the blocks of the image by their gain at that token
SCRIPT = """
const cells = document.querySelectorAll('.image > div > i'), hint = document.querySelector('#hint');
function show(token) {
  document.querySelectorAll('.selected').forEach(other => other.classList.remove('selected'));
  token.classList.add('selected');
  const gains = JSON.parse(token.dataset.gain), most = Math.max(...gains, 0.05);
  cells.forEach((cell, i) => { cell.style.opacity = 0.75 * gains[i] / most; cell.title = gains[i] + ' nats'; });
  hint.textContent = 'largest gain of one block at “' + token.textContent + '”: ' + Math.max(...gains) + ' nats';
}
document.querySelectorAll('.token[data-gain]').forEach(token => {
  token.tabIndex = 0;
  token.onclick = () => show(token);
  token.onkeydown = event => {
    if (event.key === 'Enter' || event.key === ' ') { event.preventDefault(); show(token); }
  };
});
"""
Grid = Sequence[Sequence[float]]
HINT = "<p><small id='hint'>Click a token to see the image gain of each block of the image.</small></p>\n"
Decode = Callable[[int], str]


def page(
    title: str,
    result: Result,
    steps: Sequence[Pass],
    decode: Decode,
    images: Sequence[Image.Image] = (),
    extra: str = "",
    gains: Sequence[Grid] | None = None,
) -> str:
    """Returns the HTML page of one answer.

    decode: returns the text of a token id. images: the images of the prompt. extra: HTML to add after them, such as
    event frames. gains: for each token, the image gain in nats of the blocks of the first image, by rows.
    """
    facts = (
        f"method {result.method}, {len(result.tokens)} tokens, {len(steps)} target passes after prefill, mean "
        f"acceptance length {result.statistics.mean_acceptance_length:.2f}, {result.tokens_per_second:.1f} tokens/s"
    )
    grid = 0 if not gains else len(gains[0])
    shown = "".join(_image(image, grid if i == 0 else 0) for i, image in enumerate(images))
    kinds = {node.modality for step in steps for node in step.nodes}.union(result.predicted_modality or ())
    key = "".join(f'<i style="border-color:{COLOURS.get(k, OTHER)}">{k}</i>' for k in COLOURS if k in kinds)
    rows = "".join(_step(number, step, decode) for number, step in enumerate(steps, 1))
    return (
        f"<!doctype html><html lang='en'><head><meta charset='utf-8'><title>{html.escape(title)}</title>"
        f"<style>{STYLE}</style></head><body><h1>{html.escape(title)}</h1>\n<p>{html.escape(facts)}</p>\n"
        f"<div class='shown'>{shown}</div>\n{extra}"
        f"<p class='answer'>{_answer(result, steps, decode, gains)}</p>\n"
        f"<p class='key'>{key} <small>colours: the modality that the router predicts; green background: "
        "accepted drafts; other tokens come from the target</small></p>\n"
        f"{HINT if grid else ''}<h2>Step by step</h2>\n<p><small>p: the target's probability of the token; "
        f"q: the draft's</small></p>\n{rows}{f'<script>{SCRIPT}</script>' if grid else ''}</body></html>\n"
    )


def _answer(result: Result, steps: Sequence[Pass], decode: Decode, gains: Sequence[Grid] | None) -> str:
    """Returns the tokens as HTML, marked with their predicted modality and whether they were drafted."""
    drafted = [False] + [i < len(step.emitted) - 1 for step in steps for i in range(len(step.emitted))]
    kinds = result.predicted_modality or [None] * len(result.tokens)
    parts = []
    for i, (token, kind, is_draft) in enumerate(zip(result.tokens, kinds, drafted, strict=False)):
        colour = COLOURS.get(kind, OTHER) if kind else "transparent"
        name = f' title="{kind}"' if kind else ""
        blocks = [round(g, 3) for row in gains[i] for g in row] if gains and i < len(gains) else []
        gain = f" data-gain='{json.dumps(blocks)}'" if blocks else ""
        parts.append(
            f'<span class="token{" drafted" if is_draft else ""}" style="border-color:{colour}"{name}{gain}>'
            f"{html.escape(decode(token))}</span>"
        )
    return "".join(parts)


def _step(number: int, step: Pass, decode: Decode) -> str:
    """Returns a step as HTML: the draft tree, the target's own token, and the times."""
    own = html.escape(decode(step.emitted[-1]))
    root = f"<li><span>{html.escape(decode(step.root))}</span>{_below(0, step.nodes, decode)}</li>"
    bonus = f"<li><small>the target's token</small> <span>{own}</span></li>"
    times = f"draft {1000 * step.draft_seconds:.0f} ms, pass {1000 * step.score_seconds:.0f} ms"
    return f'<div class="step"><b>{number}</b><ul>{root}{bonus}</ul><small>{times}</small></div>\n'


def _below(parent: int, nodes: Sequence[Node], decode: Decode) -> str:
    """Returns the children of a node as nested lists."""
    items = "".join(_node(n, node, nodes, decode) for n, node in enumerate(nodes, 1) if node.parent == parent)
    return f"<ul>{items}</ul>" if items else ""


def _node(n: int, node: Node, nodes: Sequence[Node], decode: Decode) -> str:
    probabilities = f" <small>p {node.p:.2f}{'' if node.q is None else f', q {node.q:.2f}'}</small>"
    colour = COLOURS.get(node.modality, OTHER)
    return (
        f'<li class="{"yes" if node.accepted else "no"}"><span title="{node.modality}" '
        f'style="border-bottom:3px solid {colour}">{html.escape(decode(node.token))}</span>{probabilities}'
        f"{_below(n, nodes, decode)}</li>"
    )


def _image(image: Image.Image, grid: int) -> str:
    """Returns an image with grid x grid cells over it, which the script shades."""
    cells = "<i></i>" * (grid * grid)
    overlay = f'<div style="grid-template:repeat({grid},1fr)/repeat({grid},1fr)">{cells}</div>' if grid else ""
    return f'<div class="image"><img alt="image of the prompt" src="{_inline(image)}">{overlay}</div>'


def _inline(image: Image.Image) -> str:
    """Returns a smaller copy of an image as a data URL."""
    small = image.convert("RGB")
    small.thumbnail((LARGEST, LARGEST))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
