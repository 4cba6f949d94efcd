"""Taps: hidden states of chosen layers, recorded in passing for drafters.

Index i means `hidden_states[i]` of `transformers`: 0 is the embedding, i the input of layer i, and the number of layers
the final, normalised state. The model is as it was outside `recording()`, and inside for all other contexts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from msd.errors import UserError

Places = dict[int, tuple[nn.Module | None, nn.Module]]  # index -> (layer whose input it is, or None; the final norm)
Running = Callable[[Callable[[int, Tensor], None] | None], AbstractContextManager[bool]]


class Recording:
    """What one pass leaves."""

    def __init__(self, indices: tuple[int, ...]) -> None:
        self.indices = indices
        self._seen: dict[int, Tensor] = {}

    def keep(self, index: int, hidden: Tensor) -> None:
        """Takes hidden state `index`, if it is wanted."""
        if index in self.indices:
            self._seen[index] = hidden

    def take(self) -> Tensor | None:
        """The last pass's states, concatenated in tap order: [B, N, T*H]; None without taps."""
        if not self.indices:
            return None
        seen, self._seen = self._seen, {}
        return torch.cat([seen[i] for i in self.indices], dim=-1)


_recorded: ContextVar[Recording | None] = ContextVar("msd_recorded", default=None)


class Taps:
    """Records the hidden states `indices` of what `decoder()` gives: a module with `.layers` and `.norm`.

    UserError for an index that it has not.
    """

    def __init__(self, decoder: Callable[[], nn.Module], indices: tuple[int, ...] = ()) -> None:
        self.indices, self._decoder = tuple(indices), decoder
        self._places()

    @contextmanager
    def recording(self, running: Running | None = None) -> Iterator[Recording]:
        """Records the pass made inside. running: the backend's that computes it; by default the model's own code."""
        recorded, places = Recording(self.indices), self._places()
        begun = nullcontext(False) if running is None else running(recorded.keep if self.indices else None)
        with begun as kept, ExitStack() as hooks:
            if not kept:
                _hook(recorded, places, hooks)
            yield recorded

    def _places(self) -> Places:
        """Where the states are now; UserError for an index that the model has not, or not any more."""
        if not self.indices:
            return {}
        decoder = self._decoder()
        layers, norm = decoder.layers, decoder.norm
        assert isinstance(layers, nn.ModuleList) and isinstance(norm, nn.Module)
        layers = layers[: getattr(decoder.config, "num_hidden_layers", None)]  # as the model's own code does
        for index in self.indices:
            if not 0 <= index <= len(layers):
                raise UserError(f"tap {index} is outside the model's {len(layers)} layers; use 0 to {len(layers)}")
        return {index: (layers[index] if index < len(layers) else None, norm) for index in self.indices}


def _hook(recorded: Recording, places: Places, hooks: ExitStack) -> None:
    """Has the model's own code keep its states, as long as `hooks` lasts."""
    token = _recorded.set(recorded)
    hooks.callback(_recorded.reset, token)

    def before(index: int) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> None:
            if _recorded.get() is recorded:  # another thread's pass may come by
                recorded.keep(index, args[0] if args else (kwargs or {})["hidden_states"])

        return hook

    def after(index: int) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: Any, output: Tensor) -> None:
            if _recorded.get() is recorded:
                recorded.keep(index, output)

        return hook

    for index, (layer, norm) in places.items():
        if layer is None:
            handle = norm.register_forward_hook(after(index))
        else:
            handle = layer.register_forward_pre_hook(before(index), with_kwargs=True)
        hooks.callback(handle.remove)
