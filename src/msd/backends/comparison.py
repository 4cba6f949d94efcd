"""Replaces module calls by other functions in one context, and compares outputs and speed of both.

All other threads and contexts keep the modules' own code.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from msd.backends.kernels import ROWS

Calls = Mapping[nn.Module, Callable[..., Any]]  # module -> the function that replaces its `forward`
SECONDS, MOST_SECONDS = 0.25, 3.0  # duration of `faster`: repeats as often as fits, and three times if that fits

_calls: ContextVar[Calls | None] = ContextVar("msd_calls", default=None)
_lock = threading.Lock()


class Dispatcher:
    """Replaces a module's `forward` while some context redirects it."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.own, self.users = module, module.forward, 0
        self.replaced = vars(module).get("forward")  # by other code, such as a hook of accelerate

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls this context's function for the module, or the module's own forward."""
        return (_calls.get() or {}).get(self.module, self.own)(*args, **kwargs)


@contextmanager
def redirected(calls: Calls) -> Iterator[None]:
    """Inside, in this context, the functions `calls` replace their modules; all other modules run their own code."""
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
                    if dispatcher.replaced is not None:
                        vars(dispatcher.module)["forward"] = dispatcher.replaced


def own_forward(module: nn.Module) -> Callable[..., Any]:
    """The module's `forward` without the functions of `redirected`."""
    forward = module.forward
    return forward.own if isinstance(forward, Dispatcher) else forward


def difference(model: PreTrainedModel, calls: Calls, rows: Iterable[int] = (5,)) -> float:
    """The largest difference between the logits with and without `calls`, relative to the largest logit.

    rows: the numbers of rows to compare. NaN where a logit is not a number.
    """
    found = []
    for count in rows:
        own, other = _logits(model, {}, count), _logits(model, calls, count)
        found.append((own - other).abs().max() / own.abs().max().clamp_min(1e-30))
    return float(torch.stack(found).max())


def faster(model: PreTrainedModel, calls: Calls) -> tuple[int, ...]:
    """The numbers of `ROWS` for which `calls` make a pass faster. Alternates both and compares the minima."""
    seconds: dict[tuple[bool, int], list[float]] = {(fused, rows): [] for rows in ROWS for fused in (False, True)}
    begin, rounds = time.perf_counter(), 0
    while not rounds or time.perf_counter() - begin < (MOST_SECONDS if rounds < 3 else SECONDS):
        for (fused, rows), times in seconds.items():
            start = time.perf_counter()
            _logits(model, calls if fused else {}, rows)
            times.append(time.perf_counter() - start)
        rounds += 1
    return tuple(rows for rows in ROWS if min(seconds[True, rows]) < min(seconds[False, rows]))


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
