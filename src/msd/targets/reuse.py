"""What a new prompt shares with a conversation so far: the columns whose keys and values need not be computed again.

A column is shared when everything before it is, and its token, its modality, its rotary positions and, at a
placeholder, the picture or sound that fills it are the same. The cut never falls inside a run of placeholders, because
a model may let those see each other.
"""

from __future__ import annotations

from typing import Any

import torch

from msd.core.layout import Layout
from msd.core.modality import LANGUAGE
from msd.targets.state import Contents, Piece, State

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
