"""Dispatch of module calls by context: to other code in one thread, to the module's own in all others."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

Calls = Mapping[nn.Module, Callable[..., Any]]

_calls: ContextVar[Calls | None] = ContextVar("msd_calls", default=None)
_lock = threading.Lock()


class Dispatcher:
    """Takes the place of a module's `forward` while a context redirects it."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.own, self.users = module, module.forward, 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls what this context has set for the module, or its own forward."""
        return (_calls.get() or {}).get(self.module, self.own)(*args, **kwargs)


@contextmanager
def redirected(calls: Calls) -> Iterator[None]:
    """Inside, in this context, calls of these modules go to the functions given, and of all others to their own code.

    Not for modules whose `forward` somebody else has replaced.
    """
    with _lock:
        dispatchers = [_dispatcher(module) for module in calls]
    token = _calls.set(calls)
    try:
        yield
    finally:
        _calls.reset(token)
        with _lock:
            for dispatcher in dispatchers:
                dispatcher.users -= 1
                if not dispatcher.users and vars(dispatcher.module).get("forward") is dispatcher:
                    del vars(dispatcher.module)["forward"]


def _dispatcher(module: nn.Module) -> Dispatcher:
    """The module's dispatcher, with one more user."""
    found = vars(module).get("forward")
    dispatcher = found if isinstance(found, Dispatcher) else Dispatcher(module)
    vars(module)["forward"] = dispatcher
    dispatcher.users += 1
    return dispatcher


SECONDS = 0.25  # of measuring, about


def difference(model: PreTrainedModel, calls: Calls) -> float:
    """The largest between the logits of both, as a share of the largest logit."""
    own, other = _logits(model, {}, 5), _logits(model, calls, 5)
    return float((own - other).abs().max() / own.abs().max().clamp_min(1e-30))


def faster(model: PreTrainedModel, calls: Calls) -> bool:
    """Whether passes over one row and over a tree of nine are faster so, both ways measured in turn."""
    ways: tuple[Calls, Calls] = ({}, calls)
    seconds: list[list[float]] = [[], []]
    begun = time.perf_counter()
    while len(seconds[0]) < 3 or time.perf_counter() - begun < SECONDS:
        for way, taken in zip(ways, seconds, strict=True):
            start = time.perf_counter()
            _logits(model, way, 1)
            _logits(model, way, 9)
            taken.append(time.perf_counter() - start)
    return min(seconds[1]) < min(seconds[0])


@torch.inference_mode()
def _logits(model: PreTrainedModel, calls: Calls, rows: int) -> Tensor:
    """Logits of a pass over a few arbitrary tokens: [1, rows, V]."""
    tokens = torch.arange(rows)[None] * 7 % model.config.get_text_config(decoder=True).vocab_size
    with redirected(calls), torch.autocast("cpu", enabled=False):
        embeddings = model.get_input_embeddings()(tokens.to(model.device))
        states = model.get_decoder()(inputs_embeds=embeddings, use_cache=False).last_hidden_state
        out: Tensor = model.get_output_embeddings()(states)
    return out
