"""The target as a teacher: one pass over prompts with their answers, as training and labelling need it.

Gives what the decode loop would have seen position by position: hidden states at the tap layers and the logits that
predict each answer token. With columns *hidden* it is the same but for one thing: no other column sees their keys
(positions unchanged). Hiding all image columns gives the target's distribution without the picture.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from msd.core.layout import Layout
from msd.errors import UserError
from msd.targets import masks
from msd.targets.base import Target

_TYPES = "token_type_ids"
# of processor output, by those of whole rows, or by none
_REPLACED = ("attention_mask", "position_ids", _TYPES, "mm_token_type_ids", "labels")


@dataclass
class TeacherBatch:
    """B prompts of L columns (left-padded) with answers of up to A tokens (right-padded).

    layout: prompt and answer of every row, `end` after its answer. prompt: L. lengths: tokens of each answer, [B].
    taps: [B, L+A, T*H], or None without taps. logits: [B, A, V] float32; entry t predicts answer token t.
    beside: [B, E, H] tokens that only a drafter sees, zero in rows without any.
    """

    layout: Layout
    prompt: int
    lengths: list[int]
    taps: Tensor | None
    logits: Tensor
    beside: Tensor | None = None

    @property
    def answers(self) -> Tensor:
        """[B, A] int64 answer tokens; what is beyond a row's length has no meaning."""
        return self.layout.tokens[:, self.prompt :]

    def spoken(self) -> Tensor:
        """[B, A] bool: which answer columns are real."""
        device = self.layout.tokens.device
        width = self.layout.tokens.shape[1] - self.prompt
        return torch.arange(width, device=device) < torch.tensor(self.lengths, device=device)[:, None]


@torch.no_grad()
def teach(
    target: Target,
    inputs: dict[str, Any],
    answers: Sequence[Sequence[int]],
    hidden: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> TeacherBatch:
    """Runs the target over prompts (processor output, images encoded or not) followed by `answers` (token ids).

    hidden: [B, L] bool, prompt columns that no other column sees. dtype: of the language model's matrix products where
    it is not the weights' own (autocast).

    UserError when an answer is empty, or holds a token that stands for image features, which a whole row at once
    cannot tell from an image.
    """
    if any(len(a) == 0 for a in answers):
        raise UserError("an answer without tokens teaches nothing; leave its prompt out")
    spelled = target.placeholders.keys() & {t for a in answers for t in a}
    if spelled:
        raise UserError(f"an answer holds token {min(spelled)}, which stands for image features; leave its prompt out")
    device = target.model.device
    inputs = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in target.encode_images(dict(inputs)).items()}
    ids = inputs.pop("input_ids")
    L = ids.shape[1]
    A = max(map(len, answers))
    layout, _ = target.lay_out(ids, inputs, L + A)
    typed = inputs.get(_TYPES) is not None  # without token types no model sees both ways
    inputs = {k: v for k, v in inputs.items() if k not in _REPLACED}
    for row, answer in enumerate(answers):
        layout.append(row, list(answer))
        rest = torch.arange(1, L + A - layout.end[row] + 1, device=ids.device)
        layout.positions[:, row, layout.end[row] :] = layout.positions[:, row, layout.end[row] - 1, None] + rest
    cast = torch.autocast(device.type, dtype, enabled=dtype is not None)
    recording = target.recording() if dtype is None else target.taps.recording()  # a backend has its own dtype
    with recording as taps, cast:
        output = target.model(
            input_ids=torch.cat([ids, layout.tokens[:, L:]], 1),  # a layout pads with the first token, maybe an image
            attention_mask=_mask(target, layout, L, typed, hidden),
            position_ids=target.positions(layout.positions),
            use_cache=False,
            logits_to_keep=A + 1,
            return_dict=True,
            **inputs,
        )
    return TeacherBatch(layout, L, [len(a) for a in answers], taps.take(), output.logits[:, -A - 1 : -1].float())


def _mask(target: Target, layout: Layout, prompt: int, typed: bool, hidden: Tensor | None) -> masks.Mask:
    """Additive masks [B, 1, S, S] of whole rows; padding columns see themselves: no row of them is empty."""
    S, device = layout.capacity, layout.tokens.device
    seen, back = masks.row_view(layout.start, S, device)
    both = target.both_ways(layout, prompt) if typed else None
    if both is not None:
        seen = seen | both
    if hidden is not None:
        seen = seen & ~torch.nn.functional.pad(hidden.to(device), (0, S - prompt))[:, None, :]
    seen = seen | torch.eye(S, dtype=torch.bool, device=device)
    return masks.masks(seen, back, target.windows, target.model.dtype)
