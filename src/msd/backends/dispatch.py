"""Dispatch of module calls by context: to other code in one thread, to the module's own in all others."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch import nn

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
