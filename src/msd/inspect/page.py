"""A record of the draft trees of a generation and of what the target took of them."""

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
    """A drafted token. parent: index of its node in the step, 0 for the root. q: None where the drafter knows none.

    p, q: probability of the token given its parent's path, under the target (without logits processors) and the draft.
    modality: of the subtree that it is of. accepted: whether the target took it.
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
    """One target pass of a row. root: the newest token; nodes: what was drafted below it, parents first, node 1 first.

    emitted: the accepted drafts and the target's own token after them. seconds: of the draft, and of the pass.
    """

    root: int
    nodes: tuple[Node, ...]
    emitted: tuple[int, ...]
    draft_seconds: float
    score_seconds: float


@dataclass
class Trace:
    """The passes of a row, to be given to `SpeculativeVLM.generate(on_step=…)`."""

    row: int = 0
    passes: list[Pass] = field(default_factory=list)

    def __call__(self, step: Step) -> None:
        """Keeps one step, unless the row has ended before, or it is the one that prefill gives."""
        if step.prefill or not step.accepted.tokens[self.row] or self.row in step.accepted.padded:
            return
        tree, row = step.tree, self.row
        parts = (tree.tokens, tree.parents, tree.depths, tree.modality, tree.valid)
        tokens, parents, depths, kinds, valid = (part[row].tolist() for part in parts)
        above = tree.parents[row].clamp_min(0)
        p = step.scores.logits[row].float().softmax(-1)[above, tree.tokens[row]].tolist()
        q = [None] * tree.size if tree.q is None else tree.q[row].tolist()
        names, taken = known(), set(step.accepted.nodes[row])
        drafted = [n for n in range(1, tree.size) if valid[n]]
        index = {n: i for i, n in enumerate([0, *drafted])}
        nodes = tuple(
            Node(tokens[n], index[parents[n]], depths[n], names[kinds[n]].name, p[n], q[n], n in taken) for n in drafted
        )
        emitted = tuple(step.accepted.tokens[row])
        self.passes.append(Pass(tokens[0], nodes, emitted, step.draft_seconds, step.score_seconds))


COLOURS = {
    "language": "#e7a13c", "vision": "#4c8fd6", "fusion": "#58a65c", "event_sparse": "#b07cc6",
    "event_dense": "#d65c8a", "video_reasoning": "#2fa8a0", "audio": "#8d8d3a", "depth": "#8a6a54",
}  # fmt: skip
OTHER = "#999999"
WIDE = 320  # pixels of a shown image, at most
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
.step > small { min-width: 9rem } .photo { position: relative; line-height: 0 } .token[data-gain] { cursor: pointer }
.photo > div { position: absolute; inset: 0; display: grid } .photo > div > i { background: #d62728 }
.token.asked { outline: 2px solid #d62728 }
"""
# a click on a token shades the blocks of the picture by their gain there
SCRIPT = """
const cells = document.querySelectorAll('.photo > div > i'), told = document.querySelector('#told');
function show(token) {
  document.querySelectorAll('.asked').forEach(other => other.classList.remove('asked'));
  token.classList.add('asked');
  const gains = JSON.parse(token.dataset.gain), most = Math.max(...gains, 0.05);
  cells.forEach((cell, i) => { cell.style.opacity = 0.75 * gains[i] / most; cell.title = gains[i] + ' nats'; });
  told.textContent = 'largest gain of one block at “' + token.textContent + '”: ' + Math.max(...gains) + ' nats';
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
HINT = "<p><small id='told'>Click a token to see where in the picture its information lies.</small></p>\n"
Word = Callable[[int], str]


def page(
    title: str,
    result: Result,
    steps: Sequence[Pass],
    word: Word,
    images: Sequence[Image.Image] = (),
    beside: str = "",
    gains: Sequence[Grid] | None = None,
) -> str:
    """HTML of one answer. word: a token id as text. images: what was shown. beside: more HTML, such as event frames.

    gains: for every token, the image gain in nats of the blocks of the first image, rows first.
    """
    told = result.statistics
    facts = (
        f"method {result.method}, {len(result.tokens)} tokens in {len(steps)} target passes after the prompt: mean "
        f"acceptance length {told.mean_acceptance_length:.2f}, {result.tokens_per_second:.1f} tokens/s"
    )
    grid = 0 if not gains else len(gains[0])
    shown = "".join(_photo(image, grid if i == 0 else 0) for i, image in enumerate(images))
    kinds = {node.modality for step in steps for node in step.nodes}.union(result.predicted_modality or ())
    key = "".join(f'<i style="border-color:{COLOURS.get(k, OTHER)}">{k}</i>' for k in COLOURS if k in kinds)
    drawn = "".join(_step(number, step, word) for number, step in enumerate(steps, 1))
    return (
        f"<!doctype html><html lang='en'><head><meta charset='utf-8'><title>{html.escape(title)}</title>"
        f"<style>{STYLE}</style></head><body><h1>{html.escape(title)}</h1>\n<p>{html.escape(facts)}</p>\n"
        f"<div class='shown'>{shown}</div>\n{beside}"
        f"<p class='answer'>{_answer(result, steps, word, gains)}</p>\n"
        f"<p class='key'>{key} <small>the modality that the router predicts; drafted tokens have a green "
        "ground, the others the target gave itself</small></p>\n"
        f"{HINT if grid else ''}<h2>Step by step</h2>\n<p><small>p: the token's probability under the target; q: under "
        f"the draft</small></p>\n{drawn}{f'<script>{SCRIPT}</script>' if grid else ''}</body></html>\n"
    )


def _answer(result: Result, steps: Sequence[Pass], word: Word, gains: Sequence[Grid] | None) -> str:
    """The tokens, each with its predicted modality, and whether it was drafted."""
    drafted = [False] + [i < len(step.emitted) - 1 for step in steps for i in range(len(step.emitted))]
    kinds = result.predicted_modality or [None] * len(result.tokens)
    parts = []
    for i, (token, kind, given) in enumerate(zip(result.tokens, kinds, drafted, strict=False)):
        colour = COLOURS.get(kind, OTHER) if kind else "transparent"
        name = f' title="{kind}"' if kind else ""
        known = gains is not None and i < len(gains)
        gain = f" data-gain='{json.dumps([round(g, 3) for row in gains[i] for g in row])}'" if known and gains else ""
        parts.append(
            f'<span class="token{" drafted" if given else ""}" style="border-color:{colour}"{name}{gain}>'
            f"{html.escape(word(token))}</span>"
        )
    return "".join(parts)


def _step(number: int, step: Pass, word: Word) -> str:
    """The tree below a root, and what was emitted."""
    own = html.escape(word(step.emitted[-1]))
    root = f"<li><span>{html.escape(word(step.root))}</span>{_below(0, step.nodes, word)}</li>"
    then = f"<li><small>the target then says</small> <span>{own}</span></li>"
    took = f"draft {1000 * step.draft_seconds:.0f} ms, pass {1000 * step.score_seconds:.0f} ms"
    return f'<div class="step"><b>{number}</b><ul>{root}{then}</ul><small>{took}</small></div>\n'


def _below(parent: int, nodes: Sequence[Node], word: Word) -> str:
    """The children of a node as a list, recursively."""
    children = [(n, node) for n, node in enumerate(nodes, 1) if node.parent == parent]
    if not children:
        return ""
    return "<ul>" + "".join(_node(n, node, nodes, word) for n, node in children) + "</ul>"


def _node(n: int, node: Node, nodes: Sequence[Node], word: Word) -> str:
    chance = f" <small>p {node.p:.2f}{'' if node.q is None else f', q {node.q:.2f}'}</small>"
    colour = COLOURS.get(node.modality, OTHER)
    return (
        f'<li class="{"yes" if node.accepted else "no"}"><span title="{node.modality}" '
        f'style="border-bottom:3px solid {colour}">{html.escape(word(node.token))}</span>{chance}'
        f"{_below(n, nodes, word)}</li>"
    )


def _photo(image: Image.Image, grid: int) -> str:
    """A picture, with grid x grid cells over it that can be shaded."""
    cells = "<i></i>" * (grid * grid)
    over = f'<div style="grid-template:repeat({grid},1fr)/repeat({grid},1fr)">{cells}</div>' if grid else ""
    return f'<div class="photo"><img alt="what was shown" src="{_inline(image)}">{over}</div>'


def _inline(image: Image.Image) -> str:
    """A smaller copy as a data URL."""
    small = image.convert("RGB")
    small.thumbnail((WIDE, WIDE))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
