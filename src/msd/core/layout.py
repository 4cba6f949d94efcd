"""Layout: what stands where. Token ids, modalities, rotary positions and cache slots are four different things.

Rows are left-padded to a common column count, as `transformers` processors give them; a token's cache slot is its
column, whatever its rotary position is. Two numbers per row bound what is real: `start`, the first column after the
padding, and `end`, one past the newest token. The newest token is not in the key/value cache yet.
This module knows nothing of models or trees.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from msd.core.modality import LANGUAGE
from msd.errors import UserError


@dataclass
class Layout:
    """The text so far of a batch of B requests, with room for C columns.

    tokens:    [B, C] int64; padding columns hold the row's first real token, so that penalties see no foreign token.
    modality:  [B, C] int64 ids of `msd.core.modality`.
    positions: [A, B, C] int64; A rotary axes (1, or 3 for M-RoPE).
    start:     B host integers, first real column (also the first valid cache slot).
    end:       B host integers, one past the newest token.
    """

    tokens: Tensor
    modality: Tensor
    positions: Tensor
    start: list[int]
    end: list[int]

    @classmethod
    def from_prompt(
        cls,
        input_ids: Tensor,
        capacity: int,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        placeholders: dict[int, int] | None = None,
    ) -> Layout:
        """Lays out a prompt.

        input_ids [B, L] int64, attention_mask [B, L] of 0/1 (left padding only), position_ids [L], [B, L] or [A, B, L],
        placeholders: placeholder token id -> modality id (the rest is language). UserError on any other padding.
        """
        B, L = input_ids.shape
        if attention_mask is not None and not _is_left_padded(attention_mask):
            raise UserError("the attention mask hides tokens after visible ones; pad prompts on the left")
        start = [0] * B if attention_mask is None else (L - attention_mask.long().sum(-1)).tolist()
        column = torch.arange(L, device=input_ids.device)
        first = torch.tensor(start, device=input_ids.device)[:, None]
        if position_ids is None:
            position_ids = (column[None] - first).clamp_min(0)
        if position_ids.dim() < 3:
            position_ids = position_ids.reshape(1, -1, L)
        tokens = input_ids.new_zeros(B, capacity)
        tokens[:, :L] = torch.where(column[None] < first, input_ids.gather(1, first), input_ids)
        modality = torch.full_like(tokens, LANGUAGE.id)
        for token, kind in (placeholders or {}).items():
            modality[:, :L][input_ids == token] = kind
        positions = input_ids.new_zeros(position_ids.shape[0], B, capacity)
        positions[:, :, :L] = position_ids.expand(-1, B, -1)
        return cls(tokens, modality, positions, [int(s) for s in start], [L] * B)

    @property
    def batch(self) -> int:
        """B."""
        return self.tokens.shape[0]

    @property
    def capacity(self) -> int:
        """C."""
        return self.tokens.shape[1]

    def newest(self) -> Tensor:
        """The newest token of every row, [B]: the root of the next draft tree."""
        return self.tokens[torch.arange(self.batch), [e - 1 for e in self.end]]

    def next_positions(self, depths: Tensor, among: list[int] | None = None) -> Tensor:
        """Rotary positions of nodes `depths` [R, N] below the newest token (depth 0) of the rows `among`: [A, R, N].

        Text continues every axis from the newest token, also under M-RoPE (Qwen2-VL, section 2.1).
        """
        rows = list(range(self.batch)) if among is None else among
        newest = self.positions[:, rows, [self.end[row] - 1 for row in rows]]  # [A, R]
        return newest[:, :, None] + depths[None]

    def line(self) -> Tensor:
        """Positions on one axis for whoever has only one, such as a drafter: [B, C].

        Text stands at the same place on every axis, which is its place here; a picture's token under M-RoPE stands at
        the furthest of its three, so that an image ends right before the text that follows it.
        """
        return self.positions.amax(0) if len(self.positions) > 1 else self.positions[0]

    def append(self, row: int, tokens: list[int]) -> None:
        """Emits text `tokens` to `row`."""
        at, n = self.end[row], len(tokens)
        self.tokens[row, at : at + n] = torch.tensor(tokens, device=self.tokens.device)
        step = torch.arange(1, n + 1, device=self.tokens.device)
        self.positions[:, row, at : at + n] = self.positions[:, row, at - 1, None] + step
        self.end[row] = at + n

    def history(self, row: int) -> Tensor:
        """All columns of `row` up to its newest token, padding included (so lengths are the prompt's own): [end]."""
        return self.tokens[row, : self.end[row]]


def _is_left_padded(attention_mask: Tensor) -> bool:
    """Whether every row of the mask [B, L] is zeros, if any, then ones, and at least one."""
    seen = attention_mask.bool()
    return bool(seen[:, -1].all() & (seen[:, 1:] >= seen[:, :-1]).all())
