"""One answer and its draft trees as a web page that needs nothing else."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Callable, Sequence

from PIL import Image

from msd.inspect.trace import Node, Step
from msd.result import Result

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
"""
Word = Callable[[int], str]


def page(
    title: str,
    result: Result,
    steps: Sequence[Step],
    word: Word,
    images: Sequence[Image.Image] = (),
    beside: str = "",
) -> str:
    """HTML of one answer. word: a token id as text. images: what was shown. beside: more HTML, such as event frames."""
    told = result.statistics
    facts = (
        f"method {result.method}, {len(result.tokens)} tokens in {len(steps)} target passes after the prompt: mean "
        f"acceptance length {told.mean_acceptance_length:.2f}, {result.tokens_per_second:.1f} tokens/s"
    )
    shown = "".join(f'<img alt="what was shown" src="{_inline(image)}">' for image in images)
    kinds = {node.modality for step in steps for node in step.nodes}.union(result.predicted_modality or ())
    key = "".join(f'<i style="border-color:{COLOURS.get(k, OTHER)}">{k}</i>' for k in COLOURS if k in kinds)
    drawn = "".join(_step(number, step, word) for number, step in enumerate(steps, 1))
    return (
        f"<!doctype html><html lang='en'><head><meta charset='utf-8'><title>{html.escape(title)}</title>"
        f"<style>{STYLE}</style></head><body><h1>{html.escape(title)}</h1>\n<p>{html.escape(facts)}</p>\n"
        f"<div class='shown'>{shown}</div>\n{beside}"
        f"<p class='answer'>{_answer(result, steps, word)}</p>\n"
        f"<p class='key'>{key} <small>the modality that the router predicts; drafted tokens have a green "
        "ground, the others the target gave itself</small></p>\n"
        f"<h2>Step by step</h2>\n{drawn}</body></html>\n"
    )


def _answer(result: Result, steps: Sequence[Step], word: Word) -> str:
    """The tokens, each with its predicted modality, and whether it was drafted."""
    drafted = [False] + [i < len(step.emitted) - 1 for step in steps for i in range(len(step.emitted))]
    kinds = result.predicted_modality or [None] * len(result.tokens)
    parts = []
    for token, kind, given in zip(result.tokens, kinds, drafted, strict=False):
        colour = COLOURS.get(kind, OTHER) if kind else "transparent"
        name = f' title="{kind}"' if kind else ""
        parts.append(
            f'<span class="token{" drafted" if given else ""}" style="border-color:{colour}"{name}>'
            f"{html.escape(word(token))}</span>"
        )
    return "".join(parts)


def _step(number: int, step: Step, word: Word) -> str:
    """The tree below a root, and what was emitted."""
    own = html.escape(word(step.emitted[-1]))
    root = f"<li><span>{html.escape(word(step.root))}</span>{_below(0, step.nodes, word)}</li>"
    then = f"<li><small>the target then says</small> <span>{own}</span></li>"
    return f'<div class="step"><b>{number}</b><ul>{root}{then}</ul></div>\n'


def _below(parent: int, nodes: Sequence[Node], word: Word) -> str:
    """The children of a node as a list, recursively."""
    children = [(n, node) for n, node in enumerate(nodes, 1) if node.parent == parent]
    if not children:
        return ""
    return "<ul>" + "".join(_node(n, node, nodes, word) for n, node in children) + "</ul>"


def _node(n: int, node: Node, nodes: Sequence[Node], word: Word) -> str:
    chance = "" if node.chance is None else f" <small>{node.chance:.2f}</small>"
    colour = COLOURS.get(node.modality, OTHER)
    return (
        f'<li class="{"yes" if node.accepted else "no"}"><span title="{node.modality}" '
        f'style="border-bottom:3px solid {colour}">{html.escape(word(node.token))}</span>{chance}'
        f"{_below(n, nodes, word)}</li>"
    )


def _inline(image: Image.Image) -> str:
    """A smaller copy as a data URL."""
    small = image.convert("RGB")
    small.thumbnail((WIDE, WIDE))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
