"""How a target's passes are computed: by the model itself, or fused where that is the same and faster here.

On request alone, and lossy: `bf16`, the fused pass with products rounded to bfloat16.

`running()` hands the passes made inside to a backend and leaves all others, such as `generate()` by the library itself,
to the model's own code.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from msd.backends.fused import FusedDecoder, UnsupportedDecoderError
from msd.backends.packed import Packed, can_pack
from msd.errors import UserError

NAMES = ("measure", "plain", "fused", "bf16")
TOLERANCE = {
    "fused": 1e-4,
    "bf16": 0.1,
}  # largest difference from the model's own pass, as a share of its largest value
TRIAL_SECONDS = 0.25  # of measuring, about
_active: ContextVar[Fused | None] = ContextVar("msd_backend", default=None)
_keep: ContextVar[Any] = ContextVar("msd_taps", default=None)
_chosen: WeakKeyDictionary[PreTrainedModel, dict[str, Plain | Fused]] = WeakKeyDictionary()


class Plain:
    """The model's own code."""

    name, lossy = "plain", False

    @contextmanager
    def running(self, keep: Callable[[int, Tensor], None] | None = None, check: bool = True) -> Iterator[None]:
        """Nothing is changed; hooks record taps."""
        yield


class Fused:
    """The fused decoder pass, and a packed output layer where the model has an ordinary one.

    Weights are packed again when the model's have been changed since. Modules are only touched while a pass runs.
    """

    def __init__(self, model: PreTrainedModel, dtype: torch.dtype = torch.float32) -> None:
        self.dtype, self.lossy = dtype, dtype != torch.float32
        self.name = "bf16" if self.lossy else "fused"
        self._decoder, self._output = model.get_decoder(), model.get_output_embeddings()
        for module in (self._decoder, self._output):
            if "forward" in vars(module):
                raise UnsupportedDecoderError(f"the forward of its {type(module).__name__} has been replaced")
        self._users, self._lock = 0, threading.Lock()
        self._pack()

    def _pack(self) -> None:
        self.decoder = FusedDecoder(self._decoder, self.dtype)
        plain = type(self._output) is torch.nn.Linear and can_pack(self._output.weight)
        self.output = Packed.of(self._output, dtype=self.dtype) if plain else None  # None: its own forward
        self._state = self._now()

    def _now(self) -> list[tuple[int, int]]:
        """Where the weights lie and how often each was written to."""
        parameters = [*self._decoder.parameters(), *self._output.parameters()]
        return [(p.data_ptr(), -1 if p.is_inference() else p._version) for p in parameters]

    @contextmanager
    def running(self, keep: Callable[[int, Tensor], None] | None = None, check: bool = True) -> Iterator[None]:
        """Passes inside, of this thread, are fused; `keep(index, states)` is given every layer's hidden states.

        check: look for changed weights first (half a millisecond for 30 layers); within a request once is enough.
        """
        with self._lock:
            if check and self._now() != self._state:
                self._pack()
            self._users += 1
            if self._users == 1:
                self._install(self._decoder, lambda **k: self.decoder.forward(**k, keep=_keep.get()))
                if self.output is not None:
                    self._install(self._output, self.output)
        active, kept = _active.set(self), _keep.set(keep)
        try:
            yield
        finally:
            _active.reset(active)
            _keep.reset(kept)
            with self._lock:
                self._users -= 1
                if self._users == 0:
                    for module in (self._decoder, self._output):
                        vars(module).pop("forward", None)

    def _install(self, module: nn.Module, fused: Callable[..., Any]) -> None:
        """Sends a module's calls to `fused`, those of other threads to its own forward."""
        own = module.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            return (fused if _active.get() is self else own)(*args, **kwargs)

        vars(module)["forward"] = forward


Backend = Plain | Fused


def choose(model: PreTrainedModel, name: str = "measure") -> Backend:
    """The backend of a model: the faster one by a short measurement, made once per model, or the one named.

    UserError for an unknown name, or when the fused pass is asked for and the model has none.
    """
    if name not in NAMES:
        raise UserError(f"backend '{name}' is unknown; choose one of {', '.join(NAMES)}")
    known = _chosen.setdefault(model, {})
    if name not in known:
        known[name] = _found(model, name)
    return known[name]


def _found(model: PreTrainedModel, name: str) -> Backend:
    """A backend that says what the model says."""
    if name == "plain":
        return Plain()
    if name == "measure":
        try:
            fused = choose(model, "fused")
        except UserError:
            return Plain()
        if isinstance(fused, Fused) and _faster(model, fused):
            return fused
        del _chosen[model]["fused"]  # its packed weights are of no use
        return Plain()
    try:
        backend = Fused(model, torch.bfloat16 if name == "bf16" else torch.float32)
        _compare(model, backend)
    except UnsupportedDecoderError as reason:
        raise UserError(f"this model has no {name} backend: {reason}; use backend 'plain'") from reason
    return backend


def _compare(model: PreTrainedModel, backend: Fused) -> None:
    """UnsupportedDecoderError unless the fused pass says what the model's own says, nearly so if it is lossy."""
    own, fused = _trial(model, Plain(), 5), _trial(model, backend, 5)
    apart = float((own - fused).abs().max() / own.abs().max().clamp_min(1e-30))
    if not apart <= TOLERANCE[backend.name]:
        raise UnsupportedDecoderError(f"its fused pass differs from its own by {apart:.1e}")


def _faster(model: PreTrainedModel, backend: Fused) -> bool:
    """Whether passes over one row and over a tree of nine are faster, both ways measured in turn."""
    seconds: dict[str, list[float]] = {"plain": [], "fused": []}
    begun = time.perf_counter()
    while len(seconds["plain"]) < 3 or time.perf_counter() - begun < TRIAL_SECONDS:
        for way in (Plain(), backend):
            start = time.perf_counter()
            _trial(model, way, 1)
            _trial(model, way, 9)
            seconds[way.name].append(time.perf_counter() - start)
    return min(seconds["fused"]) < min(seconds["plain"])


@torch.inference_mode()
def _trial(model: PreTrainedModel, backend: Backend, rows: int) -> Tensor:
    """Logits of a pass over a few rows of arbitrary embeddings: [1, rows, V]."""
    weight = model.get_input_embeddings().weight
    embeddings = weight[torch.arange(rows) * 7 % len(weight)][None]
    with backend.running():
        states = model.get_decoder()(inputs_embeds=embeddings, use_cache=False).last_hidden_state
        out: Tensor = model.get_output_embeddings()(states)
    return out
