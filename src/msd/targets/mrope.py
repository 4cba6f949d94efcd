"""Targets with rotary positions of their own.

M-RoPE: three rotary positions (time, height, width) per token (Qwen2-VL, arXiv 2409.12191, 2.1).

A token has a *cache slot*, its column, and one *rotary position* per axis, from the model's own `get_rope_index`. The
three are equal for text and differ in images, which occupy fewer positions than columns. The model also stores a *rope
delta* (rotary position minus column after the prompt) as a side effect of its last prompt; this adapter never reads it
and passes positions in every call. A tree continues each axis from the newest token, as `generate()` does.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from msd.core.layout import Layout
from msd.targets.base import Target


class MRope(Target):
    """Qwen2-VL and its successors.

    Qwen3-VL's deepstack features enter early layers only at image columns of the prompt, so trees need none.
    """

    def layout_positions(self, position_ids: Tensor) -> Tensor:
        """[3, B, L], from [3, B, L] or from [4, B, L], whose first axis counts columns."""
        return position_ids[-3:]

    def position_ids(self, positions: Tensor) -> Tensor:
        """[3, B, N], unchanged."""
        return positions


class HunYuan(MRope):
    """HunYuan-VL: as many axes as the config has sections, usually four; none of them counts columns.

    One axis has the number of the image "in the input sequence", as the documentation of the library's
    `get_rope_index` says; its code counts on from row to row of a batch. Here each row counts its own, so that its
    answer is that of `generate()` for the row alone. `position_ids` that are given are used unchanged.
    """

    def lay_out(self, input_ids: Tensor, model_kwargs: dict[str, Any], capacity: int) -> tuple[Layout, Tensor]:
        """See `Target`."""
        grids, types = model_kwargs.get("image_grid_thw"), model_kwargs.get("mm_token_type_ids")
        given = model_kwargs.get("position_ids") is not None
        if len(input_ids) > 1 and not given and grids is not None and types is not None:
            first = (types == 1) & (torch.nn.functional.pad(types, (1, 0))[:, :-1] != 1)
            rows = zip(
                input_ids, types, model_kwargs["attention_mask"], grids.split(first.sum(1).tolist()), strict=True
            )
            positions = [
                self.model._prepare_position_ids_for_generation(
                    ids[None],
                    {"mm_token_type_ids": kinds[None], "attention_mask": mask[None], "image_grid_thw": shown}
                    if len(shown)
                    else {"attention_mask": mask[None]},
                )
                for ids, kinds, mask, shown in rows
            ]
            model_kwargs = {**model_kwargs, "position_ids": torch.cat(positions, 1)}
        return super().lay_out(input_ids, model_kwargs, capacity)

    def layout_positions(self, position_ids: Tensor) -> Tensor:
        """[A, B, L], unchanged."""
        return position_ids


class Columns(Target):
    """EXAONE 4.5: its `prepare_inputs_for_generation` drops the positions, so they are columns, with the padding."""

    def layout_positions(self, position_ids: Tensor) -> Tensor:
        """[B, L] columns, for [B, L]."""
        return torch.arange(position_ids.shape[-1], device=position_ids.device).expand_as(position_ids)
