"""The token layout of a batch: token ids, modalities and rotary positions by column.

Rows are left-padded to a common number of columns, as `transformers` processors pad them. A token's cache slot is its
column, which can differ from its rotary position. For each row, `start` is the first column after the padding and `end`
is one past the newest token. The newest token is not in the key/value cache yet.
"""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from msd.core.modality import LANGUAGE
from msd.errors import UserError


@dataclass
class Layout:
    """The tokens of a batch of B requests, with capacity for C columns.

    tokens:    [B, C] int64. Padding columns repeat the row's first token, so that penalties see no other token.
    modality:  [B, C] int64, ids of `msd.core.modality`.
    positions: [A, B, C] int64, for A rotary axes (1, or 3 for M-RoPE).
    start:     B ints, the first column after the padding (also the first valid cache slot).
    end:       B ints, one past the newest token.
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
        """Builds the layout of a prompt.

        input_ids: [B, L] int64. attention_mask: [B, L] of 0 and 1. position_ids: [L], [B, L] or [A, B, L].
        placeholders: placeholder token id -> modality id; all other tokens are language. Raises UserError unless the
        padding is on the left.
        """
        B, L = input_ids.shape
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask.bool().long()
        if not (mask[:, -1].all() and (mask[:, 1:] >= mask[:, :-1]).all()):
            raise UserError("the attention mask hides tokens after visible ones; pad prompts on the left")
        start = (L - mask.sum(-1)).tolist()
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
        """Rotary positions of the tree nodes of rows `among` (default: all), [A, R, N].

        depths: [R, N], the depth of each node; the newest token has depth 0. Text increases the position on every axis
        by one per token, also under M-RoPE (Qwen2-VL, section 2.1).
        """
        rows = list(range(self.batch)) if among is None else among
        newest = self.positions[:, rows, [self.end[row] - 1 for row in rows]]  # [A, R]
        return newest[:, :, None] + depths[None]

    def positions_1d(self) -> Tensor:
        """Positions on a single axis, [B, C], for modules without M-RoPE, such as drafters.

        A text token has the same position on every axis. An image token under M-RoPE gets the largest of its three
        positions, so that the last image token directly precedes the text after it.
        """
        return self.positions.amax(0) if len(self.positions) > 1 else self.positions[0]

    def append(self, row: int, tokens: list[int]) -> None:
        """Appends text `tokens` to `row`."""
        end, n = self.end[row], len(tokens)
        self.tokens[row, end : end + n] = torch.tensor(tokens, device=self.tokens.device)
        step = torch.arange(1, n + 1, device=self.tokens.device)
        self.positions[:, row, end : end + n] = self.positions[:, row, end - 1, None] + step
        self.end[row] = end + n

    def history(self, row: int) -> Tensor:
        """All tokens of `row` up to the newest one, with the padding: [end]."""
        return self.tokens[row, : self.end[row]]

    def row(self, row: int) -> Layout:
        """One row as a layout that shares the tensors of this one; `start` and `end` are copies."""
        part = slice(row, row + 1)
        return Layout(
            self.tokens[part], self.modality[part], self.positions[:, part], self.start[part], self.end[part]
        )  # fmt: skip

    def of(self, rows: list[int]) -> Layout:
        """Some rows as a layout of their own, a copy."""
        part = copy(self)
        part.select(rows)
        return part

    def select(self, rows: list[int]) -> None:
        """Drops all other rows; `rows` become rows 0, 1, … in this order."""
        self.tokens, self.modality, self.positions = self.tokens[rows], self.modality[rows], self.positions[:, rows]
        self.start, self.end = [self.start[row] for row in rows], [self.end[row] for row in rows]

    def join(self, other: Layout) -> None:
        """Appends the rows of `other`. Every row keeps its columns; the capacity becomes the larger one."""
        C = max(self.capacity, other.capacity)

        def joined(mine: Tensor, theirs: Tensor) -> Tensor:
            return torch.cat([F.pad(x, (0, C - x.shape[-1])) for x in (mine, theirs)], -2)

        self.tokens, self.modality = joined(self.tokens, other.tokens), joined(self.modality, other.modality)
        self.positions = joined(self.positions, other.positions)
        self.start, self.end = self.start + other.start, self.end + other.end
