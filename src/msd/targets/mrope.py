"""Targets with M-RoPE: three rotary positions (time, height, width) per token (Qwen2-VL, arXiv 2409.12191, 2.1).

Four numbers of a token are different things here. Its *cache slot* is its column. Its *rotary positions*, one per axis,
come from the model's own `get_rope_index`: all three are equal at text and part at pictures, which take up fewer
positions than columns. Its *rope delta* is what rotary position minus column amounts to after the prompt; the model
keeps one as a side effect of its last prompt, and it is never read here: positions are given in every pass. A tree
continues every axis from the newest token, as `generate()` does.
"""

from __future__ import annotations

from torch import Tensor

from msd.targets.base import Target


class MRope(Target):
    """Qwen2-VL, Qwen2.5-VL and Qwen3-VL. Qwen3-VL's deepstack features enter early layers at the prompt's pictures
    alone, so that trees need nothing of them.
    """

    def rotary(self, position_ids: Tensor) -> Tensor:
        """[3, B, L] of [4, B, L], whose first axis counts columns, or of [3, B, L]."""
        return position_ids[-3:]

    def positions(self, positions: Tensor) -> Tensor:
        """[3, B, N], as they are."""
        return positions
