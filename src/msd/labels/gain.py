"""Image gain: how much the picture says about each answer token.

The gain at an answer position is KL(p(·|image, prefix) ‖ p(·|prefix)) in nats under the target. A pass of
`teach` with all image columns masked, positions unchanged, gives the distribution without the image.
`msd.labels.label_thresholds` makes labels of gains.
This module knows nothing of drafters or of how answers are decoded.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from msd.errors import UserError
from msd.events import cells
from msd.events.recording import Events
from msd.labels.label_thresholds import KINDS
from msd.targets.base import Target
from msd.targets.teacher import teach


@torch.no_grad()
def image_gain(
    target: Target,
    inputs: dict[str, Any],
    answers: Sequence[Sequence[int]],
    seeing: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    """Gains in nats of every answer token, one [T_i] float64 tensor per row, ≥ 0; exactly 0 in rows without an image.

    inputs: processor output of B prompts, images encoded or not. answers: B lists of token ids. p is the softmax of
    the raw logits, without processors. seeing: the logits [T_i, V] of each answer's tokens with the image, where they
    are known already, as they are to whoever wrote the answers. UserError when an answer is empty or holds an image
    placeholder, whose place the model would fill with features.
    """
    if any(token in target.placeholders for answer in answers for token in answer):
        raise UserError("an answer holds an image placeholder token; cut it there, it cannot be taught")
    inputs = target.encode_images(dict(inputs))
    return cost_of_hiding(target, inputs, answers, image_columns(target, inputs["input_ids"]), seeing)


@torch.no_grad()
def cost_of_hiding(
    target: Target,
    inputs: dict[str, Any],
    answers: Sequence[Sequence[int]],
    hidden: Tensor,
    seeing: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    """KL(p(·|all, prefix) ‖ p(·|all but the hidden columns, prefix)) of every answer token, as `image_gain` gives it.

    inputs: with encoded images. hidden: [B, L] bool prompt columns; a row without any costs exactly 0.
    """
    some = hidden.any(1).tolist()
    if not any(some):
        return [torch.zeros(len(answer), dtype=torch.float64) for answer in answers]
    if seeing is None:
        seeing = answer_logits(target, inputs, answers)
    less = teach(target, inputs, answers, hidden)
    return [
        _divergence(p, less.logits[row, : len(p)]) if some[row] else torch.zeros(len(p)).double()
        for row, p in enumerate(seeing)
    ]


@torch.no_grad()
def gain_of_blocks(target: Target, inputs: dict[str, Any], answer: Sequence[int], side: int = 4) -> Tensor | None:
    """The image gain of each part of a picture: [T, side, side] nats, rows first, for every token of one answer.

    Each is the cost of hiding the image tokens of one block alone. inputs: processor output of one prompt whose only
    picture is a square grid of at least `side` by `side` tokens; None for any other prompt.
    """
    inputs = target.encode_images(dict(inputs))
    at = image_columns(target, inputs["input_ids"])[0].nonzero()[:, 0]
    grid = math.isqrt(len(at))
    if len(inputs["input_ids"]) > 1 or grid < side or grid * grid != len(at):
        return None
    block = torch.arange(grid, device=at.device) * side // grid
    blocks = block[:, None] * side + block[None]  # [grid, grid]
    seeing, gains = answer_logits(target, inputs, [answer]), []
    for number in range(side * side):
        hidden = torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
        hidden[0, at[blocks.flatten() == number]] = True
        gains += cost_of_hiding(target, inputs, [answer], hidden, seeing)
    return torch.stack(gains, -1).view(-1, side, side)


def answer_logits(target: Target, inputs: dict[str, Any], answers: Sequence[Sequence[int]]) -> list[Tensor]:
    """The logits [T_i, V] of each answer's tokens, without masked columns."""
    teacher_batch = teach(target, inputs, answers)
    return [teacher_batch.logits[row, :n] for row, n in enumerate(teacher_batch.lengths)]


def image_columns(target: Target, input_ids: Tensor) -> Tensor:
    """[B, L] bool: the columns that stand for image features."""
    return torch.isin(input_ids, torch.tensor(list(target.placeholders), device=input_ids.device))


def assert_images_matter(target: Target, inputs: dict[str, Any], answers: Sequence[Sequence[int]]) -> None:
    """Refuses a target that its pictures or sounds do not reach: others must change the logits of every prompt.

    inputs: processor output with pixels, not encoded yet; answers as in `image_gain`. UserError otherwise.
    """
    other = {name: _negative(inputs[name]) for name in target.raw if inputs.get(name) is not None}
    if not other:
        raise UserError("there are no pixels to change; give prompts with images, as the processor prepares them")
    one, two = teach(target, inputs, answers), teach(target, {**inputs, **other}, answers)
    change = ((one.logits - two.logits).abs().amax(-1) * one.spoken()).amax(-1)  # [B]
    for row, shown in enumerate(_shows_images(target, inputs["input_ids"])):
        if shown and change[row] <= 1e-5:
            raise UserError(
                f"the target's answer does not change with its images (prompt {row}: other pixels, the same logits); "
                "check that pixel values reach the model before training on it"
            )


def _shows_images(target: Target, input_ids: Tensor) -> list[bool]:
    """For every row of [B, L], whether it has image placeholders."""
    return image_columns(target, input_ids).any(1).tolist()


def _negative(pixels: Tensor) -> Tensor:
    """Negative and mirrored; tiles of zeros, which fill up a batch, stay so."""
    other = 1.0 - pixels.flip(-1)
    if pixels.dim() == 5:
        other[~pixels.flatten(2).any(-1)] = 0.0
    return other


def _divergence(p: Tensor, q: Tensor) -> Tensor:
    """KL(p ‖ q) of logits [T, V] in nats, [T] float64 on the host."""
    p, q = p.double().log_softmax(-1), q.double().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1).clamp_min(0.0).cpu()


def cell_kinds(recording: Events, frames: int, tokens: int) -> NDArray[np.int64]:
    """[frames, tokens] modality ids of the cells that `tokens` image tokens a frame stand for, rows first; -1 for none.

    Frames share the recording's time equally, each being its part's middle. tokens: a square grid, or one more, whose
    first is a class token that stands for no cell. UserError for another number.
    """
    side = math.isqrt(tokens)
    first = tokens - side * side
    if first > 1:
        raise UserError(f"{tokens} image tokens a frame are no square grid, so events have no cells there")
    kinds = cells(recording, (side, side), frames, "time").kinds.reshape(frames, -1)
    return np.pad(kinds, ((0, 0), (first, 0)), constant_values=-1)


@torch.no_grad()
def event_costs(
    target: Target,
    inputs: dict[str, Any],
    answers: Sequence[Sequence[int]],
    kinds: Sequence[NDArray[np.int64] | Tensor],
    seeing: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    """Costs of every answer token in nats, [T_i, 2 + F] float64 for each row: sparse cells, dense cells, each frame.

    inputs, answers, seeing: as for `image_gain`. kinds: [F, C] of each row's image columns, frame after frame (see
    `cell_kinds`). UserError where a row's image columns are not F·C.
    """
    inputs = target.encode_images(dict(inputs))
    columns = image_columns(target, inputs["input_ids"])
    if len({len(some) for some in kinds}) != 1:
        raise UserError("clips of a batch differ in their number of frames; take those alike together")
    hidden = torch.stack([_groups(row, torch.as_tensor(some)) for row, some in zip(columns, kinds, strict=True)], 1)
    if seeing is None:
        seeing = answer_logits(target, inputs, answers)
    costs = [cost_of_hiding(target, inputs, answers, some, seeing) for some in hidden]
    return [torch.stack(parts, -1) for parts in zip(*costs, strict=True)]


def costs_of_recordings(
    target: Target,
    inputs: dict[str, Any],
    answers: Sequence[Sequence[int]],
    recordings: Sequence[Events],
    frames: Sequence[int],
    seeing: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    """`event_costs` of rows whose images are the `frames[row]` frames of a scene that `recordings[row]` saw too."""
    columns = image_columns(target, inputs["input_ids"]).sum(1).tolist()
    kinds = [cell_kinds(r, count, n // count) for r, count, n in zip(recordings, frames, columns, strict=True)]
    return event_costs(target, inputs, answers, kinds, seeing)


def _groups(columns: Tensor, kinds: Tensor) -> Tensor:
    """[2 + F, L] bool: which columns of a row [L] are sparse cells, dense cells, and of each frame."""
    at = columns.nonzero()[:, 0]
    if len(at) != kinds.numel():
        raise UserError(f"{len(at)} image tokens for {kinds.numel()} cells of events; show the frames and nothing else")
    frame = torch.arange(len(kinds))[:, None].expand_as(kinds).flatten()
    flat = kinds.flatten()
    groups = [flat == kind.id for kind in KINDS] + [frame == f for f in range(len(kinds))]
    found = columns.new_zeros(len(groups), len(columns))
    for row, members in zip(found, groups, strict=True):
        row[at[members.to(at.device)]] = True
    return found
