"""Backends: run the target's passes by the model's own code ("plain"), or by a fused pass that computes the same.

"fused" uses the fastest measured kernel for each product. "measure" also measures whole passes, and uses for each
number of rows the faster of both. "bf16", with products in bfloat16, is lossy.

Passes inside `running()` use the backend; all others, such as those of `generate()`, use the model's own code. A model
may change at any time. A backend compares it with its `Revision` at the time when the fused pass was built. After a
change it builds the pass again; if the changed model cannot be fused, it runs the model's own code.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from weakref import WeakKeyDictionary, ref

import torch
from torch import nn
from transformers import PreTrainedModel

from msd.backends import comparison, fused
from msd.backends.comparison import redirected
from msd.backends.fused import FUSED, FusedPass, Record, UnsupportedDecoderError, called_functions
from msd.backends.kernels import ROWS, Choice
from msd.backends.packed import multiplies_in_bf16
from msd.backends.revision import Revision, inside
from msd.errors import UserError

NAMES = ("measure", "plain", "fused", "bf16")
# largest difference between the logits of both passes, relative to the largest logit
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.1}
_chosen: WeakKeyDictionary[PreTrainedModel, dict[str, Backend]] = WeakKeyDictionary()


class Backend:
    """Runs a model's passes: fused where its requested name allows that and the model has a fused pass, else plain.

    reason: why the model has no fused pass, or "". While the model has hooks its own code runs, so that they run too.
    choice: the kernels in use by product and number of `ROWS`, and under "pass" which code runs whole passes.
    """

    def __init__(self, model: PreTrainedModel, requested: str) -> None:
        self.requested, self.lossy, self.reason = requested, requested == "bf16", ""
        self.choice: Choice = {}
        self._model = ref(model)
        self._pass: FusedPass | None = None
        self._built: Revision | None = None  # the revision for which `_pass` was built, or found not to be useful
        self._lock = threading.RLock()
        self._latest = self.refresh()

    @property
    def name(self) -> str:
        """The name of the backend in use: "plain", "fused" or "bf16"."""
        return self.requested if self.requested != "measure" else "fused" if self._pass else "plain"

    @property
    def explanation(self) -> str:
        """Why this backend is in use, in one line."""
        if self.reason:
            return self.reason
        if self.requested != "measure":
            return "requested"
        rows = [str(n) for n, code in zip(ROWS, self.choice.get("pass", ()), strict=False) if code == "fused"]
        if not rows:
            return "measured: the model's own code is as fast as the fused pass"
        return f"measured: the fused pass is faster over {', '.join(rows)} rows"

    def refresh(self, frozen: bool = False) -> Revision:
        """The current revision of the language model. Builds the fused pass again if the model has changed.

        Reads the weights of which the fused pass has copies: only their content proves that they are unchanged. It
        compares all else where the caller says that they are `frozen`.
        """
        model = self._model()
        assert model is not None, "the caller holds a reference to the model"
        with self._lock:
            now = Revision(_text_modules(model), called_functions(model.get_decoder()))
            known, self._latest = self._built, now
            if frozen and known is not None and now.same(known, ()):
                self._latest = known
                return known
            if now.hooked():
                return now
            if known is None or now.structure != known.structure:
                self.choice = {}
                self._build(model, now)
            elif self._pass is not None and not now.same(known, self._pass.copied):
                self._build(model, now)
            self._built = now
        return now

    def _build(self, model: PreTrainedModel, now: Revision) -> None:
        """Builds the fused pass, if it is allowed, accurate and, for "measure", faster for some number of rows."""
        self._pass, self.reason = None, ""
        if self.requested == "plain":
            return
        try:
            with torch.autocast("cpu", enabled=False):
                self._pass = self._useful_pass(model)
        except UnsupportedDecoderError as reason:
            self.reason, self.choice = str(reason), {}
        if self._pass is not None:
            now.read(self._pass.copied)

    def _useful_pass(self, model: PreTrainedModel) -> FusedPass | None:
        """The fused pass with the fastest kernels; None if the model's own code is faster for all numbers of rows."""
        if self.lossy and not multiplies_in_bf16():
            raise UnsupportedDecoderError("this CPU has no products in bfloat16 (AVX512)")
        decoder, dtype = model.get_decoder(), torch.bfloat16 if self.lossy else torch.float32
        if not self.choice and not self.lossy:
            self.choice = fused.kernel_choice(decoder, model.get_output_embeddings())
            if self.requested == "measure":
                self.choice = fused.pass_choice(decoder, self.choice)
        if "fused" not in self.choice.get("pass", FUSED):
            return None
        built = FusedPass(model, dtype, self.choice)
        difference = comparison.difference(model, built.calls(), built.distinct_rows())
        if not difference <= TOLERANCE[dtype]:
            raise UnsupportedDecoderError(f"its fused pass differs from its own by {difference:.1e}")
        return built

    @contextmanager
    def running(self, record: Record = None, check: bool = True) -> Iterator[bool]:
        """Context manager: in its block, calls of the model from this thread run the backend's pass.

        Yields whether the fused pass runs. record: called by it with (layer index, output [B, L, H] of that layer);
        never called if the model's own code runs. check: compare the whole model first (`refresh`); callers pass True
        once per request. With False only hooks, addresses and version counters are compared, in 0.1 ms for 30 layers.
        """
        with self._lock:
            now = self._latest
            moved = check or now is not self._built or (self._pass is not None and now.moved())
            if moved and self.requested != "plain":
                now = self.refresh()
            usable = now is self._built and not now.hooked() and not torch.is_autocast_enabled("cpu")
            built = self._pass if usable else None
        with redirected({} if built is None else built.calls(record)):
            yield built is not None


def choose(model: PreTrainedModel, name: str = "measure") -> Backend:
    """The backend `name` of a model; "measure" times both and uses the faster. Built once per model and name.

    UserError for an unknown name, and for "fused" and "bf16" where the model has no fused pass.
    """
    if name not in NAMES:
        raise UserError(f"backend '{name}' is unknown; choose one of {', '.join(NAMES)}")
    known = _chosen.setdefault(model, {})
    if name not in known:
        backend = Backend(model, name)
        if backend.reason and name != "measure":
            raise UserError(f"this model has no {name} backend: {backend.reason}; use backend 'plain'")
        known[name] = backend
    return known[name]


def _text_modules(model: PreTrainedModel) -> list[nn.Module]:
    """All modules of the language model: the decoder's and the output layer's."""
    parts = [part for part in (model.get_decoder(), model.get_output_embeddings()) if part is not None]
    return list(dict.fromkeys(module for part in parts for module in inside(part)[0]))
