"""Taps: hidden states of chosen layers, recorded during a pass for the drafter.

Index i means `hidden_states[i]` of `transformers`: 0 is the embedding, i the input of layer i, and the number of layers
the final, normalised state. Hooks exist only inside `recording()` and record only passes of the same context.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from msd.errors import UserError

NORMS = ("norm", "embedding_norm", "norm_f", "final_layernorm")
FINAL = -1  # index of the final, normalised state of a model with any number of layers
Running = Callable[[Callable[[int, Tensor], None] | None], AbstractContextManager[bool]]


def text_decoder(model: PreTrainedModel) -> Any:
    """The module that has the decoder's `.layers`; `get_decoder()` of Nemotron-H and Llama 4 returns the one around."""
    decoder: Any = model.get_decoder()
    return decoder if hasattr(decoder, "layers") else decoder.model


def output_layer(model: PreTrainedModel) -> Any:
    """The layer that computes the logits; Nemotron-H Omni has it in its language model only."""
    own = model.get_output_embeddings()
    return model.get_decoder().get_output_embeddings() if own is None else own


def final_norm(decoder: Any) -> nn.Module:
    """The norm after the last layer, which LFM2, Nemotron-H and Persimmon call otherwise than most."""
    norm: nn.Module = next(getattr(decoder, name) for name in NORMS if hasattr(decoder, name))
    return norm


class Recording:
    """Hidden states `indices` of the latest pass."""

    def __init__(self, indices: tuple[int, ...]) -> None:
        self.indices = indices
        self._states: dict[int, Tensor] = {}

    def record(self, index: int, states: Tensor) -> None:
        """Stores hidden states `index` [B, N, H] if it is one of the indices."""
        if index in self.indices:
            self._states[index] = states

    def take(self) -> Tensor | None:
        """Removes and returns the states, concatenated in tap order: [B, N, T*H]; None without taps."""
        if not self.indices:
            return None
        states, self._states = self._states, {}
        return torch.cat([states[i] for i in self.indices], dim=-1)


_current: ContextVar[Recording | None] = ContextVar("msd_recording", default=None)


class Taps:
    """Records hidden states `indices` of a model's decoder. UserError for an index that it does not have."""

    def __init__(self, model: PreTrainedModel, indices: tuple[int, ...] = ()) -> None:
        self.indices, self._model = tuple(indices), model
        self._modules()

    @contextmanager
    def recording(self, running: Running | None = None) -> Iterator[Recording]:
        """Records the passes inside.

        running: `running` of the backend that computes them; without it, or where it yields False, hooks on the model
        record the states.
        """
        recording, (layers, norm) = Recording(self.indices), self._modules()
        backend = nullcontext(False) if running is None else running(recording.record if self.indices else None)
        with backend as recorded, ExitStack() as hooks:
            if not recorded:
                _hook(recording, layers, norm, hooks)
            yield recording

    def _modules(self) -> tuple[list[nn.Module], nn.Module | None]:
        """(layers, final norm) of the decoder as it is now. UserError for an index outside its layers."""
        if not self.indices:
            return [], None
        decoder = text_decoder(self._model)
        layers = list(decoder.layers[: getattr(decoder.config, "num_hidden_layers", None)])  # those that `forward` runs
        for index in self.indices:
            if not 0 <= index <= len(layers):
                raise UserError(
                    f"tap {index} is outside the model's {len(layers)} layers (0 to {len(layers)}); the drafter was "
                    "made for another target, so choose another method, or train it for this one"
                )
        return layers, final_norm(decoder)


def _hook(recording: Recording, layers: list[nn.Module], norm: nn.Module | None, hooks: ExitStack) -> None:
    """Adds hooks that record the states of this context's passes, and removes them when `hooks` closes."""
    token = _current.set(recording)
    hooks.callback(_current.reset, token)

    def record(index: int, states: Tensor) -> None:
        if _current.get() is recording:  # another thread may run the same modules
            recording.record(index, states)

    for index in recording.indices:
        if index < len(layers):

            def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], index: int = index) -> None:
                record(index, args[0] if args else kwargs["hidden_states"])

            handle = layers[index].register_forward_pre_hook(before, with_kwargs=True)
        else:
            assert norm is not None
            handle = norm.register_forward_hook(lambda _module, _args, output, index=index: record(index, output))
        hooks.callback(handle.remove)
