"""Replaces module calls by other functions in one context, and compares outputs and speed of both.

All other threads and contexts keep the modules' own code.
"""

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

Calls = Mapping[nn.Module, Callable[..., Any]]  # module -> the function that replaces its `forward`
SECONDS = 0.25  # approximate duration of `faster`

_calls: ContextVar[Calls | None] = ContextVar("msd_calls", default=None)
_lock = threading.Lock()


class Dispatcher:
    """Replaces a module's `forward` while some context redirects it."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.own, self.users = module, module.forward, 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls this context's function for the module, or the module's own forward."""
        return (_calls.get() or {}).get(self.module, self.own)(*args, **kwargs)


@contextmanager
def redirected(calls: Calls) -> Iterator[None]:
    """Inside, in this context, the functions `calls` replace their modules; all other modules run their own code.

    A module whose `forward` has been replaced by other code must not be among them.
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


def difference(model: PreTrainedModel, calls: Calls) -> float:
    """The largest difference between the logits with and without `calls`, relative to the largest logit."""
    own, other = _logits(model, {}, 5), _logits(model, calls, 5)
    return float((own - other).abs().max() / own.abs().max().clamp_min(1e-30))


def faster(model: PreTrainedModel, calls: Calls) -> bool:
    """Whether `calls` make passes over one row and over nine rows faster. Alternates both and compares the minima."""
    variants: tuple[Calls, Calls] = ({}, calls)
    seconds: list[list[float]] = [[], []]
    begin = time.perf_counter()
    while len(seconds[0]) < 3 or time.perf_counter() - begin < SECONDS:
        for variant, times in zip(variants, seconds, strict=True):
            start = time.perf_counter()
            _logits(model, variant, 1)
            _logits(model, variant, 9)
            times.append(time.perf_counter() - start)
    return min(seconds[1]) < min(seconds[0])


def _dispatcher(module: nn.Module) -> Dispatcher:
    """The module's dispatcher, with one more user."""
    forward = vars(module).get("forward")
    dispatcher = forward if isinstance(forward, Dispatcher) else Dispatcher(module)
    vars(module)["forward"] = dispatcher
    dispatcher.users += 1
    return dispatcher


@torch.inference_mode()
def _logits(model: PreTrainedModel, calls: Calls, rows: int) -> Tensor:
    """Logits [1, rows, V] of a pass over a few arbitrary tokens."""
    tokens = torch.arange(rows)[None] * 7 % model.config.get_text_config(decoder=True).vocab_size
    with redirected(calls), torch.autocast("cpu", enabled=False):
        embeddings = model.get_input_embeddings()(tokens.to(model.device))
        states = model.get_decoder()(inputs_embeds=embeddings, use_cache=False).last_hidden_state
        logits: Tensor = model.get_output_embeddings()(states)
    return logits
