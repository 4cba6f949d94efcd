"""The draft trees of an answer for the terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from rich.console import Group
from rich.text import Text
from rich.tree import Tree

from msd.inspect import COLOURS, OTHER, Node, Pass
from msd.result import Result

Decode = Callable[[int], str]


def trace_text(result: Result, steps: Sequence[Pass], decode: Decode) -> Group:
    """Returns the answer, coloured by the modality that the router predicts, and the tree of every step.

    decode: returns the text of a token id.
    """
    kinds = result.predicted_modality or [None] * len(result.tokens)
    answer = Text()
    for token, kind in zip(result.tokens, kinds, strict=False):
        answer.append(decode(token), style=COLOURS.get(kind, OTHER) if kind else "")
    length = result.statistics.mean_acceptance_length
    head = f"method {result.method}, {len(result.tokens)} tokens, {len(steps)} target passes, τ = {length:.2f}"
    key = "p: the target's probability, q: the draft's; + accepted, - rejected"
    trees = [tree(number, step, decode) for number, step in enumerate(steps, 1)]
    return Group(answer, Text(head), Text(key), *trees)


def tree(number: int, step: Pass, decode: Decode) -> Tree:
    """Returns the draft tree of one step; its last line is the target's own token."""
    drawn = Tree(Text(f"{number}  {decode(step.root)!r}", style="bold"), guide_style="dim")
    branches = {0: drawn}
    for index, node in enumerate(step.nodes, 1):
        branches[index] = branches[node.parent].add(label(node, decode))
    drawn.add(Text(f"the target's token {decode(step.emitted[-1])!r}", style="italic"))
    return drawn


def label(node: Node, decode: Decode) -> Text:
    """Returns one line: whether the node was accepted, its token, p, q and modality."""
    return Text.assemble(*_parts(node, decode))


def _parts(node: Node, decode: Decode) -> Iterator[tuple[str, str]]:
    """The parts of a label with their styles."""
    yield ("+ ", "green") if node.accepted else ("- ", "dim")
    yield repr(decode(node.token)), "" if node.accepted else "dim"
    yield f"  p {node.p:.2f}" + ("" if node.q is None else f"  q {node.q:.2f}"), "dim"
    yield f"  {node.modality}", COLOURS.get(node.modality, OTHER)
