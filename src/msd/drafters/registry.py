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
_Trained = tuple[MSDNetwork, dict[str, dict[str, float]] | None]


def register(name: str, make: Callable[[], Drafter]) -> None:
    """Makes `name` a method: `create(name)` returns `make()`."""
    _METHODS[name] = make


def register_folder(folder: Path | str) -> None:
    """Makes the trained drafter in `folder` the method `msd`, and its sampled form `msd:sampled`.

    UserError now when the folder holds no drafter.
    """
    network, thresholds = _read(folder)
    for name, sampled in (("msd", False), ("msd:sampled", True)):
        register(name, partial(MSD, network, name, sampled, thresholds))


def methods(target: str = "reference") -> list[str]:
    """All method names, plain decoding first; those trained for the reference model only for that target."""
    foreign = {name for name, make in _METHODS.items() if isinstance(make, _Shipped)} if target != "reference" else ()
    return [name for name in _METHODS if name not in foreign]


def create(name: str) -> Drafter:
    """A fresh drafter of method `name`; UserError names the known ones."""
    if name not in _METHODS:
        raise UserError(f"unknown method '{name}'; known: {', '.join(_METHODS)}")
    return _METHODS[name]()


def default(target: str) -> str:
    """The method for a target (its `fingerprint`) where none is named: a drafter trained for it, or prompt lookup."""
    made = _METHODS.get("msd")
    trained = isinstance(made, _Shipped) and checkpoint.training(WEIGHTS / "msd").get("cuts", {}).get("target")
    return "msd" if trained == target else "prompt-lookup"


class _Shipped(partial[Drafter]):
    """Makes a drafter that ships."""


def _read(folder: Path | str) -> _Trained:
    """A trained network and the thresholds calibrated for it."""
    return checkpoint.load(folder), checkpoint.training(folder).get("thresholds")


def _register_shipped(root: Path) -> None:
    """Makes the folders of `root` methods, and `msd` also one that samples; methods of a folder share its network."""
    for folder in sorted(p.parent for p in root.glob(f"*/{checkpoint.CONFIG}")):
        name, read = folder.name.replace("-", ":"), cache(partial(_read, folder))
        register(name, _Shipped(_made, read, name, False))
        if name == "msd":
            register("msd:sampled", _Shipped(_made, read, "msd:sampled", True))


def _made(read: Callable[[], _Trained], name: str, sampled: bool) -> MSD:
    network, thresholds = read()
    return MSD(network, name, sampled, thresholds)


register("ar", Plain)
register("prompt-lookup", PromptLookup)
register("prompt-lookup:sampled", lambda: PromptLookup(sampled=True))
_register_shipped(WEIGHTS)
