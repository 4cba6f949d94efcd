"""Taps: hidden states of chosen layers, recorded in passing for drafters.

Index i means `hidden_states[i]` of `transformers`: 0 is the embedding, i the input of layer i, and the number of layers
the final, normalised state. Nothing is recorded, and nothing costs, outside `recording()`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from msd.errors import UserError


class Taps:
    """Records the hidden states `indices` of `decoder` (a model with `.layers` and `.norm`)."""

    def __init__(self, decoder: nn.Module, indices: tuple[int, ...] = ()) -> None:
        self.indices = tuple(indices)
        self._seen: dict[int, Tensor] = {}
        self._on = False
        if not self.indices:
            return
        layers, norm = decoder.layers, decoder.norm
        assert isinstance(layers, nn.ModuleList) and isinstance(norm, nn.Module)
        for index in self.indices:
            if not 0 <= index <= len(layers):
                raise UserError(f"tap {index} is outside the model's {len(layers)} layers; use 0 to {len(layers)}")
            if index == len(layers):
                norm.register_forward_hook(lambda _m, _a, output, i=index: self.keep(i, output))
            else:
                layers[index].register_forward_pre_hook(
                    lambda _m, args, kwargs, i=index: self.keep(i, args[0] if args else kwargs["hidden_states"]),
                    with_kwargs=True,
                )

    def keep(self, index: int, hidden: Any) -> None:
        """Takes hidden state `index` of the pass that is being recorded, if it is wanted."""
        if self._on and index in self.indices:
            self._seen[index] = hidden

    @contextmanager
    def recording(self) -> Iterator[Taps]:
        """Records the forward pass made inside."""
        self._seen, self._on = {}, bool(self.indices)
        try:
            yield self
        finally:
            self._on = False

    def take(self) -> Tensor | None:
        """The last pass's states, concatenated in tap order: [B, N, T*H]; None without taps."""
        if not self.indices:
            return None
        seen, self._seen = self._seen, {}
        return torch.cat([seen[i] for i in self.indices], dim=-1)
