"""Methods: everything the package knows of a drafter, given in one place, the file of the method itself.

A file in `msd.drafters.algorithms` registers its method with a decorator (`learned`) or a call (`add`); all of them are
found there, so a new method is a new file (docs/add_a_drafter.md). Which methods there are is the same everywhere. What
they need to draft, weights trained for a target that ships, is looked up in the folders `ROOTS`: those that the wheel
carries, and in a source checkout `weights/`. A folder belongs to the method that its configuration names; one of MSD's
names none and is known by its own name, with a dash for the colon. Drafters of the video target are in the folder
`video` of a root: `video/msd` is `msd:video`.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

import torch

from msd.drafters import algorithms as package
from msd.drafters.base import Drafter
from msd.drafters.toolkit import checkpoint
from msd.drafters.toolkit.drafter import TrainedDrafter
from msd.drafters.toolkit.network import DraftNetwork, Loss, NetworkConfig
from msd.drafters.toolkit.training import Objective
from msd.errors import UserError

DEFAULT, FALLBACK = "msd", "prompt-lookup"  # what a target has a drafter of, or has none
REFERENCE, VIDEO = "reference", "reference-video"  # names of the targets that drafters ship for
FOR_VIDEO = ":video"  # ends the names of drafters trained for the video target
_CHECKOUT = Path(__file__).parents[3]
ROOTS: tuple[Path, ...] = (Path(__file__).parents[1] / "weights",) + (
    (_CHECKOUT / "weights",) if (_CHECKOUT / "pyproject.toml").is_file() else ()
)


@dataclass(frozen=True)
class Method:
    """What is known of a method.

    make: a drafter from what `load` gives of each of the `weights`, which are names of trained drafters. network: the
    class that `msd train` trains. load: a folder (and a dtype) to a network, or whatever `make` takes; UserError says
    what is wrong. form_of: the method whose weights it drafts with in another way. command: makes its weights. target:
    the name of the one that its weights are trained for.
    """

    name: str
    make: Callable[..., Drafter]
    weights: tuple[str, ...] = ()
    network: type[DraftNetwork] | None = None
    load: Callable[..., Any] | None = None
    form_of: str | None = None
    command: str = ""
    target: str = REFERENCE

    @property
    def missing(self) -> list[str]:
        """Which of its weights are not here."""
        here = folders()
        return [name for name in self.weights if name not in here]

    @property
    def hint(self) -> str:
        """How to get the weights that are missing; empty where none is."""
        made_by = [_known()[name] for name in self.missing]
        return f"weights not here: {made_by[0].command}" if made_by else ""


_BUILT_IN: dict[str, Method] = {}  # what files of `msd.drafters.algorithms` registered
_METHODS: dict[str, Method] = {}  # what was registered at run time, which comes first
K = TypeVar("K", bound=type[DraftNetwork])


def training_command(options: str) -> str:
    """How `msd train` makes a drafter."""
    return f"make them with `msd train {options} --captured FILE --images DIR --out DIR`"


def add(method: Method) -> None:
    """Adds a method to those of the package."""
    _BUILT_IN[method.name] = method


def learned(
    name: str,
    loss: Loss | None = None,
    objective: Callable[..., Objective] | None = None,
    config: Any = NetworkConfig,
    drafter: Callable[..., Drafter] = TrainedDrafter,
    weights: tuple[str, ...] | None = None,
) -> Callable[[K], K]:
    """Registers a `DraftNetwork` class as a method that is trained.

    loss: as published (`msd.train.losses`), or an objective that has more to it than a loss. config: of its folders,
    has `from_json`. drafter: makes one of a network and, perhaps, a name. weights: of the methods that it drafts with,
    by default its own.
    """

    def registered(kind: K) -> K:
        kind.method, kind.published_loss, kind.objective_type, kind.drafter = name, loss, objective, drafter

        def load(folder: Path | str, dtype: torch.dtype = torch.float32) -> DraftNetwork:
            network = checkpoint.load(folder, lambda text: kind(config.from_json(text)), dtype)
            network.provenance = checkpoint.provenance(folder)
            return network

        make = lambda network: drafter(kind.adopted(network))  # noqa: E731
        add(Method(name, make, weights or (name,), kind, load, command=training_command(f"--method {name}")))
        return kind

    return registered


def register(name: str, make: Callable[[], Drafter]) -> None:
    """Makes `name` a method: `create(name)` returns `make()`."""
    _METHODS[name] = Method(name, make)


def register_folder(folder: Path | str) -> str:
    """Loads the trained drafter in `folder` as the method it is of, for any target; the name of the method.

    Its other forms (such as `msd:sampled`) draft with it too. UserError now when the folder holds no drafter.
    """
    trained = load(folder)
    name = _of(folder).name
    for method in _known().values():
        if name in (method.name, method.form_of) and method.weights:
            register(method.name, partial(method.make, trained))
    return name


def load(folder: Path | str, dtype: torch.dtype = torch.float32) -> Any:
    """What the drafter in `folder` is made of: its network, on the CPU and without a target (`DraftNetwork.attach`).

    UserError says what is wrong with the folder.
    """
    method = _of(folder)
    assert method.load is not None
    return method.load(folder, dtype)


def catalogue() -> list[Method]:
    """All methods, plain decoding first, then those without weights, MSD's own forms, the rest, and other targets'."""
    known = _known()
    order = lambda m: (m.name != "ar", bool(m.weights), m.target != REFERENCE, DEFAULT not in (m.name, m.form_of))  # noqa: E731
    names = [m.name for m in sorted(known.values(), key=order)] + [name for name in _METHODS if name not in known]
    return [_METHODS.get(name) or known[name] for name in names]


def methods(target: str = REFERENCE) -> list[str]:
    """Names of the methods that can draft here for a target: of those with weights, the ones trained for it."""
    here = folders().keys()
    return [m.name for m in catalogue() if not m.weights or (m.target == target and here >= set(m.weights))]


def get(name: str) -> Method:
    """The method `name`; UserError lists all there are, with a mark where weights are not here."""
    known = _METHODS.get(name) or _known().get(name)
    if known is None:
        listed = [m.name + (" (weights not here)" if m.missing else "") for m in catalogue()]
        raise UserError(f"unknown method '{name}'; known: {', '.join(listed)}")
    return known


def ready(name: str) -> Method:
    """The method `name`, which can draft; UserError as in `get`, or naming the command that makes its weights."""
    method = get(name)
    if method.missing:
        place = _place(method.missing[0])
        alone = method.load is not None and method.weights == (name,)
        then = "name the folder DIR/drafter with --drafter" if alone else f"copy DIR/drafter to '{place}'"
        raise UserError(f"method '{name}': {method.hint}, then {then}")
    return method


def create(name: str) -> Drafter:
    """A fresh drafter of method `name`; methods of a folder share its network. UserError as in `ready`."""
    method, here = ready(name), folders()
    return method.make(*(_shared(here[part]) for part in method.weights))


def trainable(name: str) -> type[DraftNetwork]:
    """The network of a method that `msd train` trains; UserError names the known ones."""
    kinds = {m.name: m.network for m in _known().values() if m.network is not None}
    if name not in kinds:
        others = ", ".join(kind for kind in kinds if kind != DEFAULT)
        raise UserError(f"method '{name}' cannot be trained; choose {DEFAULT} or one of {others}")
    return kinds[name]


def default(target: str) -> str:
    """The method for a target (its `fingerprint`) where none is named: a drafter trained for it, or prompt lookup."""
    here = folders()
    for name in (DEFAULT, DEFAULT + FOR_VIDEO):
        if name in here and name not in _METHODS:
            thresholds = checkpoint.training(here[name]).get("cuts")
            if isinstance(thresholds, dict) and thresholds.get("target") == target:
                return f"{name}+{FALLBACK}"
    return FALLBACK


def folders() -> dict[str, Path]:
    """Name of a trained drafter -> its folder in `ROOTS`, the first one that has it.

    A damaged folder counts as what it is called: the error is for whoever asks for that drafter.
    """
    found: dict[str, Path] = {}
    for root in ROOTS:
        for place, ending in ((root, ""), (root / "video", FOR_VIDEO)):
            for folder in sorted(p.parent for p in place.glob(f"*/{checkpoint.CONFIG}")):
                try:
                    method = checkpoint.method(folder)
                except UserError:
                    method = None
                found.setdefault((method or folder.name.replace("-", ":")) + ending, folder)
    return found


def _place(name: str) -> Path:
    """Where `folders` finds a drafter that is made here."""
    base = name.removesuffix(FOR_VIDEO)
    return (ROOTS[-1] if base == name else ROOTS[-1] / "video") / base.replace(":", "-")


def _known() -> dict[str, Method]:
    _discover()
    return _BUILT_IN


@cache
def _discover() -> None:
    """Imports every file of `msd.drafters.algorithms`, which register their methods."""
    for module in pkgutil.iter_modules(package.__path__):
        import_module(f"{package.__name__}.{module.name}")


def _of(folder: Path | str) -> Method:
    """The method that a folder's configuration names, or MSD."""
    name = checkpoint.method(Path(folder)) or DEFAULT
    found = _known().get(name)
    if found is None or found.load is None:
        raise UserError(f"drafter '{folder}' is of method '{name}', which is not known here")
    return found


@cache
def _shared(folder: Path) -> Any:
    return load(folder)
