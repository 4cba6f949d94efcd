"""The state of one batch during generation, and the part of it that a later turn of the same conversation reuses.

A prompt reuses the cache of the previous turn up to the first column in which tokens, modalities, positions or media
content differ.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from msd.backends.revision import Revision
from msd.core.cache import KVCache
from msd.core.layout import Layout
from msd.core.modality import LANGUAGE
from msd.core.trust import Trust
from msd.inputs.prompts import Request

AUDIO_FEATURES = "input_features"
AUDIO_TENSORS = (AUDIO_FEATURES, "feature_attention_mask")  # the first dimension of each is the number of sounds


@dataclass(frozen=True)
class MediaItem:
    """The content of one image, video, tile or sound of a prompt.

    columns: the number of placeholder tokens it fills; None where all items of a modality fill equally many.
    """

    data: Tensor
    columns: int | None


Media = dict[str, list[MediaItem]]  # "image", "video" or "audio" -> items in reading order


@dataclass(frozen=True)
class Source:
    """The model that computed a state, its tap indices, and the revision of its modules at that time."""

    model: PreTrainedModel
    taps: tuple[int, ...]
    revision: Revision

    def same(self, other: Source) -> bool:
        """Whether both would compute the same state."""
        if self.model is not other.model or self.taps != other.taps:
            return False
        return self.revision is other.revision or self.revision.same(other.revision)


@dataclass
class State:
    """One batch during generation: its layout, its key/value cache and the drafter's memory of it.

    auxiliary: [B, E, H] auxiliary tokens of the drafter, zero in rows without any.
    inputs, request: the processor's output for the prompts, and what it was made of (None where the caller gave only
    tensors), for a drafter that reads prompts itself. They have one entry per prompt, which can have several rows.
    prefilled: columns that the prefill computed, without those reused from an earlier turn.
    trust: of each row, how far the chances of its drafts hold; empty before the first step. Like the memory, `Engine`
    keeps it in the order of the rows.

    Set only where a later turn may reuse the state:
    media: the content of the placeholders. tap_history: [1, C, T*H] tap states of the committed slots.
    tree_taps: [1, N, T*H] tap states of the tree that was scored last.
    """

    layout: Layout
    cache: KVCache
    memory: Any = field(default=None)
    auxiliary: Tensor | None = None
    source: Source | None = None
    inputs: dict[str, Any] = field(default_factory=dict)
    request: Request | None = None
    prefilled: int = 0
    trust: list[Trust] = field(default_factory=list)
    media: Media = field(default_factory=dict)
    tap_history: Tensor | None = None
    tree_taps: Tensor | None = None

    def select(self, rows: list[int]) -> None:
        """Drops all other rows; `rows`, all stored in the cache, become rows 0, 1, … The memory is the drafter's."""
        self.layout.select(rows)
        self.cache.select(rows)

    def join(self, other: State) -> None:
        """Appends the rows of `other`, a state of the same target; the memory is the drafter's to join.

        What only a first draft or a later turn reads is dropped: inputs, request, auxiliary tokens and tap history.
        """
        self.layout.join(other.layout)
        self.cache.join(other.cache)
        self.inputs, self.request, self.auxiliary = {}, None, None
        self.media, self.tap_history, self.tree_taps = {}, None, None

    def append_taps(self, nodes: list[int]) -> None:
        """Appends the tap states of the accepted `nodes` to the history. Call it before the cache commits."""
        if self.tap_history is not None and self.tree_taps is not None:
            end = self.cache.committed[0]
            self.tap_history[0, end : end + len(nodes)] = self.tree_taps[0, nodes]


@dataclass
class Past:
    """The state after the last answer of a conversation, or None before the first.

    Pass the same object to each generation of the conversation: it reuses the common prefix, then stores its own state.
    """

    state: State | None = None

    def renew(self, state: State) -> None:
        """Stores the state of a finished generation, without the tensors that only decoding needs."""
        state.memory = state.tree_taps = state.request = None
        state.inputs = {}
        self.state = state


def media_items(model_kwargs: dict[str, Any], sounds: list[MediaItem]) -> Media:
    """The media of a prompt, from the arguments of its prefill and its `sounds`."""
    outputs = model_kwargs.get("mm_encoder_outputs") or {}
    media = {k: [MediaItem(x, x.shape[:-1].numel()) for x in v.pooler_output] for k, v in outputs.items()}
    return {**media, "audio": sounds} if sounds else media


def reusable_prefix(
    layout: Layout, media: Media, past: State, placeholder_ids: dict[str, int]
) -> tuple[int, dict[str, int]]:
    """(columns of a single prompt that `past` has in its cache, number of media items in them by modality).

    At least the last column is never reused. placeholder_ids: modality -> id of its placeholder token.
    """
    end, old = min(past.cache.committed[0], layout.end[0] - 1), past.layout
    equal = (old.tokens[0, :end] == layout.tokens[0, :end]) & (old.modality[0, :end] == layout.modality[0, :end])
    equal &= (old.positions[:, 0, :end] == layout.positions[:, 0, :end]).all(0)
    length = _run_start(layout, int(equal.long().cumprod(0).sum()))
    placed = {kind: _placed(layout, media.get(kind, []), token) for kind, token in placeholder_ids.items()}
    for kind, (columns, ends) in placed.items():
        for new, before, first in zip(media.get(kind, []), past.media.get(kind, []), [0, *ends], strict=False):
            if first >= len(columns) or columns[first] >= length:
                break
            if new.data is not before.data and not torch.equal(new.data, before.data):  # unequal shapes too
                length = _run_start(layout, columns[first])
    return length, {
        kind: sum(end <= bisect_left(columns, length) for end in ends) for kind, (columns, ends) in placed.items()
    }


def without_reused(model_kwargs: dict[str, Any], counts: dict[str, int]) -> dict[str, Any]:
    """The arguments of a prefill without the first `counts[kind]` media items of each modality."""
    left = dict(model_kwargs)
    outputs = {}
    for kind, output in (left.pop("mm_encoder_outputs", None) or {}).items():
        n = counts.get(kind, 0)
        if n < len(output.pooler_output):
            outputs[kind] = type(output)(**{name: _later(name, value, n) for name, value in output.items()})
    if outputs:
        left["mm_encoder_outputs"] = outputs
    reused = counts.get("audio", 0)
    for name in AUDIO_TENSORS:
        sounds = left.pop(name, None)
        if sounds is not None and len(sounds) > reused:
            left[name] = sounds[reused:]
    return left


def _later(name: str, value: Any, count: int) -> Any:
    """An encoder output without its first `count` items; deepstack features are lists, or (layer, list), by layer."""
    if name == "deepstack_features":
        return [(x[0], x[1][count:]) if isinstance(x, tuple) else x[count:] for x in value]
    return value[count:] if name in ("pooler_output", "last_hidden_state") else value


def _run_start(layout: Layout, column: int) -> int:
    """`column`, or the first column of the run of placeholders that contains both it and the column before."""
    while 0 < column < layout.end[0] and layout.modality[0, column] != LANGUAGE.id != layout.modality[0, column - 1]:
        column -= 1
    return column


def _placed(layout: Layout, items: list[MediaItem], token: int) -> tuple[list[int], list[int]]:
    """(columns of the placeholder `token`, the number of them that is filled once each item is)."""
    columns = (layout.tokens[0, : layout.end[0]] == token).nonzero()[:, 0].tolist()
    counts = [item.columns for item in items if item.columns is not None]
    if len(counts) < len(items) or sum(counts) != len(columns):
        counts = [len(columns) // len(items)] * len(items) if items else []
    return columns, list(accumulate(counts))
