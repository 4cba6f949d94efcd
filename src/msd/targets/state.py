"""State: one batch in flight, and what of it a later turn of the same conversation can use again."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from msd.backends.revision import Revision
from msd.core.cache import KVCache
from msd.core.layout import Layout
from msd.core.modality import LANGUAGE


@dataclass(frozen=True)
class Piece:
    """What fills some placeholders. columns: how many; None where all pieces of a prompt fill equally many."""

    data: Tensor
    columns: int | None


Contents = dict[str, list[Piece]]  # by modality: "image", "video" or "audio"


@dataclass(frozen=True)
class Source:
    """What a state was computed by: a model, the indices of its taps, and what the model was then."""

    model: PreTrainedModel
    taps: tuple[int, ...]
    revision: Revision

    def same(self, other: Source) -> bool:
        """Whether the one goes on where the other ended, as if it had computed all of it."""
        return self.model is other.model and self.taps == other.taps and self.revision.same(other.revision)


@dataclass
class State:
    """One batch in flight: its text, its cache, and what the drafter remembers of it.

    auxiliary: [B, E, H] tokens that only the drafter sees, zero in rows without any.
    prefilled: rows that the target computed for the prompt, columns of the batch; those of an earlier turn left out.
    contents: what stands at the placeholders, kept for comparison where the state is to be continued.
    trail: [1, C, T*H] tap states of the committed slots, where the state is to be continued and there are taps.
    """

    layout: Layout
    cache: KVCache
    memory: Any = field(default=None)
    auxiliary: Tensor | None = None
    source: Source | None = None
    prefilled: int = 0
    contents: Contents = field(default_factory=dict)
    trail: Tensor | None = None
    scored: Tensor | None = None  # [1, N, T*H] tap states of the tree scored last, where there is a trail

    def follow(self, nodes: list[int]) -> None:
        """Adds the states of the committed `nodes` of the tree scored last to the trail; before the cache commits."""
        if self.trail is not None and self.scored is not None:
            at = self.cache.committed[0]
            self.trail[0, at : at + len(nodes)] = self.scored[0, nodes]


@dataclass
class Past:
    """What a conversation has computed so far: the state after its last answer, or None before the first.

    Given to one generation after another, which begin where their prompt parts from it and leave their own state here.
    """

    state: State | None = None

    def renew(self, state: State) -> None:
        """Takes the state of a finished generation, without what only a running one needs."""
        state.memory = state.scored = None
        self.state = state


AUDIO_FEATURES = "input_features"
AUDIO_TENSORS = (AUDIO_FEATURES, "feature_attention_mask")  # that count sounds in their first dimension


def contents(model_kwargs: dict[str, Any], sounds: list[Piece]) -> Contents:
    """What fills the placeholders of a prompt, by modality and in reading order, from the arguments of its prefill."""
    outputs = model_kwargs.get("mm_encoder_outputs") or {}
    found = {k: [Piece(x, x.shape[:-1].numel()) for x in v.pooler_output] for k, v in outputs.items()}
    if sounds:
        found["audio"] = sounds
    return found


def shared(layout: Layout, held: Contents, past: State, tokens: dict[str, int]) -> tuple[int, dict[str, int]]:
    """(columns of a single row that `past` holds already, pieces among them by modality).

    At least the last column is left to compute. tokens: modality -> its placeholder token.
    """
    end = min(past.cache.committed[0], layout.end[0] - 1)
    old = past.layout
    same = (old.tokens[0, :end] == layout.tokens[0, :end]) & (old.modality[0, :end] == layout.modality[0, :end])
    same &= (old.positions[:, 0, :end] == layout.positions[:, 0, :end]).all(0)
    cut = _run_start(layout, int(same.long().cumprod(0).sum()))
    pieces: dict[str, int] = {}
    for kind, token in tokens.items():
        columns = (layout.tokens[0, : layout.end[0]] == token).nonzero()[:, 0].tolist()
        lengths = _lengths(held.get(kind, []), len(columns))
        first = 0
        for new, before, length in zip(held.get(kind, []), past.contents.get(kind, []), lengths, strict=False):
            if first >= len(columns) or columns[first] >= cut:
                break
            if not _same(new, before):
                cut = _run_start(layout, columns[first])
            first += length
    for kind, token in tokens.items():
        filled = int((layout.tokens[0, :cut] == token).sum())
        total = int((layout.tokens[0, : layout.end[0]] == token).sum())
        ends = torch.tensor(_lengths(held.get(kind, []), total)).cumsum(0)
        pieces[kind] = int((ends <= filled).sum())
    return cut, pieces


def remaining(model_kwargs: dict[str, Any], pieces: dict[str, int]) -> dict[str, Any]:
    """The arguments of a prefill without the first `pieces` of every modality, which stand in the shared columns."""
    left = dict(model_kwargs)
    outputs = {}
    for kind, output in (left.pop("mm_encoder_outputs", None) or {}).items():
        n = pieces.get(kind, 0)
        if n < len(output.pooler_output):
            parts: dict[str, Any] = {"pooler_output": output.pooler_output[n:]}
            if getattr(output, "deepstack_features", None):
                parts["deepstack_features"] = [layer[n:] for layer in output.deepstack_features]
            outputs[kind] = type(output)(**parts)
    if outputs:
        left["mm_encoder_outputs"] = outputs
    heard = pieces.get("audio", 0)
    for name in AUDIO_TENSORS:
        sounds = left.pop(name, None)
        if sounds is not None and len(sounds) > heard:
            left[name] = sounds[heard:]
    return left


def _run_start(layout: Layout, cut: int) -> int:
    """`cut`, or the first column of the run of placeholders that it would cut through."""
    while 0 < cut < layout.end[0] and layout.modality[0, cut] != LANGUAGE.id != layout.modality[0, cut - 1]:
        cut -= 1
    return cut


def _lengths(pieces: list[Piece], placeholders: int) -> list[int]:
    """Placeholders that each piece fills."""
    counts = [piece.columns for piece in pieces if piece.columns is not None]
    if len(counts) == len(pieces) and sum(counts) == placeholders:
        return counts
    return [placeholders // len(pieces)] * len(pieces) if pieces else []


def _same(one: Piece, other: Piece) -> bool:
    return one.data is other.data or (one.data.shape == other.data.shape and torch.equal(one.data, other.data))
