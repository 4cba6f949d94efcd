"""Method names and how to make their drafters: those made of code alone, and the trained ones that ship.

Every folder of `WEIGHTS` is a drafter trained for the reference model; its name is the method's, with a dash for the
colon. It is read when it is first used.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

from msd.drafters.base import Drafter
from msd.drafters.msd import MSD, MSDNetwork, checkpoint
from msd.drafters.plain import Plain
from msd.drafters.prompt_lookup import PromptLookup
from msd.errors import UserError

WEIGHTS = Path(__file__).parents[1] / "weights"
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


def shipped() -> dict[str, Path]:
    """Folders of the drafters that ship, by method name."""
    return {p.parent.name.replace("-", ":"): p.parent for p in sorted(WEIGHTS.glob(f"*/{checkpoint.CONFIG}"))}


def methods(target: str = "reference") -> list[str]:
    """All method names, plain decoding first; those trained for the reference model only for that target."""
    foreign = {name for name, make in _METHODS.items() if isinstance(make, _Shipped)} if target != "reference" else ()
    return [name for name in _METHODS if name not in foreign]


def create(name: str) -> Drafter:
    """A fresh drafter of method `name`; UserError names the known ones."""
    if name not in _METHODS:
        raise UserError(f"unknown method '{name}'; known: {', '.join(_METHODS)}")
    return _METHODS[name]()


class _Shipped(partial[Drafter]):
    """Makes a drafter that ships."""


@cache
def _read(folder: Path) -> tuple[MSDNetwork, dict[str, dict[str, float]] | None]:
    return checkpoint.load(folder), checkpoint.training(folder).get("thresholds")


def _from_shipped(folder: Path, name: str, sampled: bool) -> Drafter:
    network, thresholds = _read(folder)
    return MSD(network, name, sampled, thresholds)


register("ar", Plain)
register("prompt-lookup", PromptLookup)
register("prompt-lookup:sampled", lambda: PromptLookup(sampled=True))
for _name, _folder in shipped().items():
    register(_name, _Shipped(_from_shipped, _folder, _name, False))
    if _name == "msd":
        register("msd:sampled", _Shipped(_from_shipped, _folder, "msd:sampled", True))
