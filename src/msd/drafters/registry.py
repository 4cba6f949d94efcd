"""Method names and how to make their drafters."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from msd.drafters.base import Drafter
from msd.drafters.msd import MSD, checkpoint
from msd.drafters.plain import Plain
from msd.drafters.prompt_lookup import PromptLookup
from msd.errors import UserError

_METHODS: dict[str, Callable[[], Drafter]] = {}


def register(name: str, make: Callable[[], Drafter]) -> None:
    """Makes `name` a method: `create(name)` returns `make()`."""
    _METHODS[name] = make


def register_folder(folder: Path | str) -> None:
    """Makes the trained drafter in `folder` the method `msd`, and its sampled form `msd:sampled`.

    UserError now when the folder holds no drafter.
    """
    network, thresholds = checkpoint.load(folder), checkpoint.training(folder).get("thresholds")
    for name, sampled in (("msd", False), ("msd:sampled", True)):
        register(name, partial(MSD, network, name, sampled, thresholds))


def methods() -> list[str]:
    """All method names, plain decoding first."""
    return list(_METHODS)


def create(name: str) -> Drafter:
    """A fresh drafter of method `name`; UserError names the known ones."""
    if name not in _METHODS:
        raise UserError(f"unknown method '{name}'; known: {', '.join(_METHODS)}")
    return _METHODS[name]()


register("ar", Plain)
register("prompt-lookup", PromptLookup)
register("prompt-lookup:sampled", lambda: PromptLookup(sampled=True))
