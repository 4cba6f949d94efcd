"""Lent modules: what calls them in one context goes elsewhere, and to their own code in all others."""

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


class Switch:
    """Stands in the place of a module's `forward` while somebody has it lent."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.own, self.users = module, module.forward, 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What this context has the module do."""
        return (_calls.get() or {}).get(self.module, self.own)(*args, **kwargs)


@contextmanager
def lend(calls: Calls) -> Iterator[None]:
    """Inside, in this context, a call of one of these modules is a call of what stands beside it, and no other's is.

    Modules whose `forward` has been replaced may not be lent.
    """
    with _lock:
        switches = [_switch(module) for module in calls]
    token = _calls.set(calls)
    try:
        yield
    finally:
        _calls.reset(token)
        with _lock:
            for switch in switches:
                switch.users -= 1
                if not switch.users and vars(switch.module).get("forward") is switch:
                    del vars(switch.module)["forward"]


def _switch(module: nn.Module) -> Switch:
    """The module's, with one user more."""
    found = vars(module).get("forward")
    switch = found if isinstance(found, Switch) else Switch(module)
    vars(module)["forward"] = switch
    switch.users += 1
    return switch
