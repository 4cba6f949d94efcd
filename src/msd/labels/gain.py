"""Measures how much the image, or the events, influence the target's prediction of each answer token.

The image gain at an answer position is KL(p(·|image, prefix) ‖ p(·|prefix)) in nats under the target. The distribution
without the image comes from one pass of `run_teacher` that masks all image columns and leaves positions unchanged.
`msd.labels.label_thresholds` turns gains into labels.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from msd.errors import UserError
from msd.labels import CELL_KINDS
from msd.targets.base import Target
from msd.targets.teacher import run_teacher


@torch.no_grad()
def image_gain(
    target: Target,
    inputs: dict[str, Any],
    answers: Sequence[Sequence[int]],
    logits: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    """Returns the gain of each answer token in nats, one float64 tensor [T_i] ≥ 0 per row; 0 in rows without an image.

    inputs: processor output of B prompts, with images encoded or not. answers: B lists of token ids. logits: the
    `answer_logits` of these rows, if already computed; distributions are their softmaxes, without logits processors.
    UserError if an answer is empty or contains an image placeholder, which the model would replace by features.
    """
    if any(token in target.placeholders for answer in answers for token in answer):
        raise UserError(
            "an answer contains an image placeholder token, which cannot be taught; cut the answer before it"
        )
    inputs = target.encode_images(dict(inputs))
    return masking_cost(target, inputs, answers, image_columns(target, inputs["input_ids"]), logits)


@torch.no_grad()
def masking_cost(
    target: Target,
    inputs: dict[str, Any],
    answers: Sequence[Sequence[int]],
    masked: Tensor,
    logits: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    """Returns KL(p(·|all columns, prefix) ‖ p(·|unmasked columns, prefix)) of each answer token, as in `image_gain`.

    inputs: with images encoded. masked: [B, L] bool prompt columns; a row without masked columns costs exactly 0.
    """
    rows = masked.any(1).tolist()
    if not any(rows):
        return [torch.zeros(len(answer), dtype=torch.float64) for answer in answers]
    if logits is None:
        logits = answer_logits(target, inputs, answers)
    without = run_teacher(target, inputs, answers, masked).logits
    return [
        _divergence(p, without[row, : len(p)]) if rows[row] else torch.zeros(len(p)).double()
        for row, p in enumerate(logits)
    ]


@torch.no_grad()
def gain_of_blocks(target: Target, inputs: dict[str, Any], answer: Sequence[int], side: int = 4) -> Tensor | None:
    """Returns the cost of masking each block of an image: [T, side, side] nats, row by row, for each answer token.

    inputs: processor output of one prompt. The result is None unless its image tokens form a single square grid of at
    least `side` by `side`.
    """
    inputs = target.encode_images(dict(inputs))
    blocks = image_blocks(target, inputs["input_ids"], side)
    if not blocks:
        return None
    logits = answer_logits(target, inputs, [answer])
    gains = [masking_cost(target, inputs, [answer], masked, logits)[0] for masked in blocks]
    return torch.stack(gains, -1).view(-1, side, side)


def image_blocks(target: Target, input_ids: Tensor, side: int) -> list[Tensor]:
    """Returns the columns of each block of the image, side · side tensors [1, L] bool, row by row.

    input_ids: [1, L]. Empty unless the image tokens form a single square grid of at least `side` by `side`.
    """
    at = image_columns(target, input_ids)[0].nonzero()[:, 0]
    grid = math.isqrt(len(at))
    if len(input_ids) > 1 or grid < side or grid * grid != len(at):
        return []
    block = torch.arange(grid, device=at.device) * side // grid
    blocks = (block[:, None] * side + block[None]).flatten()
    return _masks(input_ids, [at[blocks == number] for number in range(side * side)])


def image_frames(target: Target, input_ids: Tensor, count: int) -> list[Tensor]:
    """Returns the columns of each of `count` images of one size, tensors [1, L] bool, in their order.

    input_ids: [1, L]. Empty if the image tokens cannot be those of so many images.
    """
    at = image_columns(target, input_ids)[0].nonzero()[:, 0]
    if not count or len(at) < count or len(at) % count:
        return []
    return _masks(input_ids, at.view(count, -1))


def _masks(input_ids: Tensor, groups: Iterable[Tensor]) -> list[Tensor]:
    """Returns a tensor [1, L] bool for each group of columns of input_ids [1, L], True there."""
    masks = []
    for columns in groups:
        masked = torch.zeros_like(input_ids, dtype=torch.bool)
        masked[0, columns] = True
        masks.append(masked)
    return masks


def answer_logits(target: Target, inputs: dict[str, Any], answers: Sequence[Sequence[int]]) -> list[Tensor]:
    """Returns the logits [T_i, V] that predict each answer's tokens, with no column masked."""
    teacher_batch = run_teacher(target, inputs, answers)
    return [teacher_batch.logits[row, :n] for row, n in enumerate(teacher_batch.lengths)]


def image_columns(target: Target, input_ids: Tensor) -> Tensor:
    """Returns [B, L] bool: the columns that hold image placeholders."""
    return torch.isin(input_ids, torch.tensor(list(target.placeholders), device=input_ids.device))


def assert_images_matter(target: Target, inputs: dict[str, Any], answers: Sequence[Sequence[int]]) -> None:
    """Raises UserError unless other images (or sounds) change the logits of every prompt that has any.

    inputs: processor output with pixels, not encoded yet. answers: as in `image_gain`.
    """
    other = {name: _negative(inputs[name]) for name in target.media_tensors if inputs.get(name) is not None}
    if not other:
        raise UserError("there are no pixels to change; give prompts with images, as the processor prepares them")
    one, two = run_teacher(target, inputs, answers), run_teacher(target, {**inputs, **other}, answers)
    change = ((one.logits - two.logits).abs().amax(-1) * one.answer_mask()).amax(-1)  # [B]
    for row, has_image in enumerate(image_columns(target, inputs["input_ids"]).any(1).tolist()):
        if has_image and change[row] <= 1e-5:
            raise UserError(
                f"the target's answer does not change with its images (prompt {row}: other pixels, the same logits); "
                "check that pixel values reach the model before training on it"
            )


@torch.no_grad()
def event_costs(
    target: Target,
    inputs: dict[str, Any],
    answers: Sequence[Sequence[int]],
    kinds: Sequence[NDArray[np.int64] | Tensor],
    logits: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    """Returns per row float64 [T_i, 2 + F] nats: the cost of masking the sparse cells, the dense cells, each frame.

    inputs, answers, logits: as for `image_gain`. kinds: per row the [F, C] kinds of its image columns, frame by frame
    (`msd.events.cells.cell_kinds`). UserError if a row does not have F·C image columns.
    """
    inputs = target.encode_images(dict(inputs))
    columns = image_columns(target, inputs["input_ids"])
    if len({len(of_row) for of_row in kinds}) != 1:
        raise UserError("the clips of a batch have different numbers of frames; batch clips with the same number")
    masked = torch.stack([_groups(row, torch.as_tensor(k)) for row, k in zip(columns, kinds, strict=True)], 1)
    if logits is None:
        logits = answer_logits(target, inputs, answers)
    costs = [masking_cost(target, inputs, answers, group, logits) for group in masked]
    return [torch.stack(of_row, -1) for of_row in zip(*costs, strict=True)]


def _groups(columns: Tensor, kinds: Tensor) -> Tensor:
    """Returns [2 + F, L] bool: the columns of a row [L] that are sparse cells, dense cells, and each frame."""
    at = columns.nonzero()[:, 0]
    if len(at) != kinds.numel():
        raise UserError(f"{len(at)} image tokens for {kinds.numel()} cells of events; show the frames and nothing else")
    frame = torch.arange(len(kinds))[:, None].expand_as(kinds).flatten()
    groups = [kinds.flatten() == kind.id for kind in CELL_KINDS] + [frame == f for f in range(len(kinds))]
    masks = columns.new_zeros(len(groups), len(columns))
    for mask, members in zip(masks, groups, strict=True):
        mask[at[members.to(at.device)]] = True
    return masks


def _negative(pixels: Tensor) -> Tensor:
    """Returns the image inverted and mirrored; tiles of zeros, which pad a batch, stay zero."""
    other = 1.0 - pixels.flip(-1)
    if pixels.dim() == 5:
        other[~pixels.flatten(2).any(-1)] = 0.0
    return other


def _divergence(p: Tensor, q: Tensor) -> Tensor:
    """Returns KL(p ‖ q) of logits [T, V] in nats: [T] float64 on the CPU."""
    p, q = p.double().log_softmax(-1), q.double().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1).clamp_min(0.0).cpu()
