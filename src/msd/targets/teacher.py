"""Teacher passes: one target pass over prompts with their answers, for training and labelling.

The pass gives, for each position, what decoding would give: hidden states of the tap layers and the logits that predict
each answer token. Prompt columns can be masked: no other column attends to them, and positions do not change. With all
image columns masked the logits are those of the target without the image.
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

_TYPES = ("token_type_ids", "mm_token_type_ids")
# tensors of processor output that cover the prompt only: `run_teacher` replaces or drops these, and extends those
_REPLACED = ("attention_mask", "position_ids", *_TYPES, "labels")
_EXTENDED = ("moe_mm_token_type_ids",)  # the expert of a column; an answer has those of text


@dataclass
class TeacherBatch:
    """B prompts of L columns (left-padded) with answers of up to A tokens (right-padded).

    layout: prompt and answer of each row, `end` after its answer. prompt: L. lengths: tokens of each answer, [B].
    taps: [B, L+A, T*H]; T is 0 without taps. logits: [B, A, V] float32; entry t predicts answer token t.
    auxiliary: [B, E, H] tokens that only a drafter sees, zero in rows without any.
    """

    layout: Layout
    prompt: int
    lengths: list[int]
    taps: Tensor
    logits: Tensor
    auxiliary: Tensor | None = None

    @property
    def answers(self) -> Tensor:
        """[B, A] int64 answer tokens; columns beyond a row's length are padding."""
        return self.layout.tokens[:, self.prompt :]

    def answer_mask(self) -> Tensor:
        """[B, A] bool: True at answer tokens, False at padding."""
        tokens = self.answers
        lengths = torch.tensor(self.lengths, device=tokens.device)
        return torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None]


@torch.no_grad()
def run_teacher(
    target: Target,
    inputs: dict[str, Any],
    answers: Sequence[Sequence[int]],
    masked: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> TeacherBatch:
    """Runs the target over prompts (processor output, images encoded or not) followed by `answers` (token ids).

    masked: [B, L] bool, prompt columns that no other column attends to. dtype: autocast the pass to it.

    UserError for an empty answer, and for one with an image placeholder, which the model would replace by features.
    """
    if any(len(a) == 0 for a in answers):
        raise UserError("an answer without tokens cannot be taught; remove its prompt")
    reserved = target.placeholders.keys() & {t for a in answers for t in a}
    if reserved:
        raise UserError(
            f"an answer contains token {min(reserved)}, the placeholder of image features; remove its prompt"
        )
    device = target.model.device
    inputs = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in target.encode_images(dict(inputs)).items()}
    ids = inputs.pop("input_ids")
    L = ids.shape[1]
    A = max(map(len, answers))
    layout, _ = target.lay_out(ids, inputs, L + A)
    types = next((inputs[name] for name in _TYPES if inputs.get(name) is not None), None)
    inputs = {k: v for k, v in inputs.items() if k not in _REPLACED}
    inputs |= {k: torch.nn.functional.pad(inputs[k], (0, A)) for k in _EXTENDED if inputs.get(k) is not None}
    for row, answer in enumerate(answers):
        layout.append(row, list(answer))
        rest = torch.arange(1, L + A - layout.end[row] + 1, device=ids.device)
        layout.positions[:, row, layout.end[row] :] = layout.positions[:, row, layout.end[row] - 1, None] + rest
    cast = torch.autocast(device.type, dtype, enabled=dtype is not None)
    recording = target.recording() if dtype is None else target.taps.recording()  # no backend runs under autocast
    with recording as taps, cast:
        output = target.model(
            input_ids=torch.cat(
                [ids, layout.tokens[:, L:]], 1
            ),  # not the layout's padding, which may be an image token
            attention_mask=_mask(target, layout, L, types, masked),
            position_ids=target.position_ids(layout.positions),
            use_cache=False,
            logits_to_keep=target.kept_logits(A + 1),
            return_dict=True,
            **inputs,
        )
    logits, states = output.logits[:, -A - 1 : -1].float(), taps.take()
    states = logits.new_empty(len(answers), L + A, 0) if states is None else states
    return TeacherBatch(layout, L, [len(a) for a in answers], states, logits)


def _mask(target: Target, layout: Layout, prompt: int, types: Tensor | None, masked: Tensor | None) -> masks.Mask:
    """Additive masks [B, 1, S, S] of whole rows. Padding columns attend to themselves, so that no softmax is empty."""
    S, device = layout.capacity, layout.tokens.device
    visible, distance, column = masks.row_tables(layout.start, S, device)
    columns = column >= 0  # [B, S]
    if masked is not None:
        columns = columns & ~torch.nn.functional.pad(masked.to(device), (0, S - prompt))

    def found(visible: Tensor) -> masks.Mask:
        seen = (visible & columns[:, None]) | torch.eye(S, dtype=torch.bool, device=device)
        return masks.masks((seen, distance, column), target.windows, target.model.dtype)

    mask, only = found(visible), target.bidirectional_layers
    both = None if types is None else target.bidirectional_mask(layout, types)  # without token types all are causal
    if both is not None:
        wide = found(visible | both)
        if only is None or isinstance(mask, Tensor) or isinstance(wide, Tensor):
            mask = wide
        else:
            mask = {**mask, only: wide[only]}
    return target.layer_masks(mask, columns)
