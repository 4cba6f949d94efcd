"""What each answer token owes to the events of a scene: the costs of hiding kinds of cells, and whole frames.

The target sees frames; an event camera looked at the same scene. Each cell of a frame (an image token) is *sparse* or
*dense* by the rate of events there while the frame was on screen (`msd.events.cells`). The cost of hiding some cells is
KL(p(·|all) ‖ p(·|all but their keys)) in nats, as the image gain is that of hiding all of them.
`msd.labels.label_thresholds` makes labels of costs.
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
from msd.events.pieces import Events
from msd.labels.image_gain import cost_of_hiding, image_columns, whole_laws
from msd.labels.label_thresholds import KINDS
from msd.targets.base import Target


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
        seeing = whole_laws(target, inputs, answers)
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
