"""How a target's passes are computed: by the model itself, or fused where that is the same and faster here.

On request alone, and lossy: `bf16`, the fused pass with products rounded to bfloat16.

`running()` hands the passes made inside to a backend and leaves all others, such as `generate()` by the library itself,
to the model's own code. A model may be changed at any time: what a fused pass was made from is compared with what the
model is now, and where the two differ it is made again, or the model's own code runs.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from msd.backends import trial
from msd.backends.fused import FusedDecoder, UnsupportedDecoderError, code
from msd.backends.packed import Packed, can_pack
from msd.backends.revision import Revision, inside
from msd.backends.trial import Calls, Dispatcher, redirected
from msd.errors import UserError

NAMES = ("measure", "plain", "fused", "bf16")
TOLERANCE = {
    torch.float32: 1e-4,
    torch.bfloat16: 0.1,
}  # largest difference from the model's own pass, as a share of its largest value
Keep = Callable[[int, Tensor], None] | None
_chosen: WeakKeyDictionary[PreTrainedModel, dict[str, Plain | Fused]] = WeakKeyDictionary()


class Plain:
    """The model's own code."""

    name, lossy = "plain", False

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = ref(model)

    def refresh(self) -> Revision:
        """The language model as it is now."""
        return Revision(_text(_alive(self._model)))

    @contextmanager
    def running(self, keep: Keep = None, check: bool = True) -> Iterator[bool]:
        """Passes inside, of this context, are the model's own; False: `keep` is not called."""
        with redirected({}):
            yield False


class Fused:
    """The fused decoder pass, and a packed output layer where the model has an ordinary one.

    measured: only where it says what the model says and is faster. Without, and where the model has no fused pass when
    this is made, `reason` says why. Later the model's own code runs wherever there is none, or where the model has
    hooks: they get to see the passes. Modules are only touched while a pass runs.
    """

    def __init__(self, model: PreTrainedModel, dtype: torch.dtype = torch.float32, measured: bool = False) -> None:
        self.dtype, self.lossy, self.measured = dtype, dtype != torch.float32, measured
        self.reason = ""
        self._model = ref(model)
        self._pass: FusedPass | None = None
        self._packed: Revision | None = None  # of which there is, or is not, a fused pass
        self._lock = threading.RLock()
        self._latest = self.refresh()

    @property
    def name(self) -> str:
        """Of the backend that is in use."""
        return "plain" if self.measured and self._pass is None else "bf16" if self.lossy else "fused"

    def refresh(self) -> Revision:
        """The language model as it is now; the fused pass is made again if it has changed.

        Reads all weights while there is a fused pass, since no other way tells for certain that they are the same.
        """
        model = _alive(self._model)
        with self._lock:
            now, known = Revision(_text(model), code(model.get_decoder())), self._packed
            self._latest = now
            if now.hooked():
                return now
            if known is None or now.structure != known.structure:
                self._make(model, now, self.measured)
            elif self._pass is not None and not now.same(known):
                self._make(model, now, False)
            self._packed = now
        return now

    def _make(self, model: PreTrainedModel, now: Revision, timed: bool) -> None:
        """The fused pass of the model as it is, if it has one of use."""
        self._pass, self.reason = None, ""
        try:
            fused = FusedPass(model, self.dtype)
            apart = trial.difference(model, fused.calls())
            if not apart <= TOLERANCE[self.dtype]:
                raise UnsupportedDecoderError(f"its fused pass differs from its own by {apart:.1e}")
        except UnsupportedDecoderError as reason:
            self.reason = str(reason)
            return
        if not timed or trial.faster(model, fused.calls()):
            self._pass = fused
            now.read()

    @contextmanager
    def running(self, keep: Keep = None, check: bool = True) -> Iterator[bool]:
        """Passes inside, of this context, are fused; `keep(index, states)` is given every layer's hidden states.

        False where the model's own code runs. check: compare the whole model first (`refresh`), once in a request;
        otherwise only hooks, places and versions of tensors are compared: 0.1 ms for 30 layers.
        """
        with self._lock:
            now = self._latest
            if check or now is not self._packed or (self._pass is not None and now.moved()):
                now = self.refresh()
            own = now is not self._packed or now.hooked() or torch.is_autocast_enabled("cpu")
            fused = None if own else self._pass
        with redirected({} if fused is None else fused.calls(keep)):
            yield fused is not None


class FusedPass:
    """What is made of a model's weights as they are: the fused pass of its decoder, and its output layer packed."""

    def __init__(self, model: PreTrainedModel, dtype: torch.dtype) -> None:
        self._decoder, self._output = model.get_decoder(), model.get_output_embeddings()
        self._fused, self._packed = FusedDecoder(self._decoder, dtype), None
        if type(self._output) is nn.Linear and can_pack(self._output.weight):
            if not isinstance(vars(self._output).get("forward"), Dispatcher | None):
                raise UnsupportedDecoderError("the forward of its output layer has been replaced")
            self._packed = Packed.of(self._output, dtype=dtype)

    def calls(self, keep: Keep = None) -> Calls:
        """What stands in for the modules. The output layer does its own work where it is no ordinary one."""
        decoder: Calls = {self._decoder: partial(self._fused.forward, keep=keep)}
        return decoder if self._packed is None else {**decoder, self._output: self._packed}


Backend = Plain | Fused


def choose(model: PreTrainedModel, name: str = "measure") -> Backend:
    """The backend of a model: the faster one by a short measurement, or the one named. Made once per model.

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
        return Plain(model)
    backend = Fused(model, torch.bfloat16 if name == "bf16" else torch.float32, name == "measure")
    if backend.reason and not backend.measured:
        raise UserError(f"this model has no {name} backend: {backend.reason}; use backend 'plain'")
    return backend


def _alive(model: ref[PreTrainedModel]) -> PreTrainedModel:
    found = model()
    assert found is not None, "whoever asks for passes holds the model"
    return found


def _text(model: PreTrainedModel) -> list[nn.Module]:
    """All modules that a pass goes through once pictures are encoded: the decoder's and the output layer's."""
    parts = [part for part in (model.get_decoder(), model.get_output_embeddings()) if part is not None]
    return list(dict.fromkeys(module for part in parts for module in inside(part)[0]))
