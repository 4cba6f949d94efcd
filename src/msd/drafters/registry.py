"""The registry of drafting methods, and the lookup of their trained weights.

A file in `msd.drafters.algorithms` registers its method with a decorator (`learned`) or a call (`add`). All files there
are imported, so a new method is a new file (docs/add_a_drafter.md). The list of methods does not depend on the weights
that are present. Trained weights are searched in the folders `ROOTS`: the ones in the wheel, and `weights/` in a source
checkout. A folder belongs to the method in its configuration; the configuration of an MSD drafter has none, and its
folder is named after the method, with a dash for the colon. Drafters of the video target are in the folder `video` of a
root: `video/msd` is `msd:video`.

`NAME+OPTION` is method NAME with an option that works with every drafter (`add_option`), such as `+prompt-lookup`.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import cache, partial
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import PreTrainedModel

from msd.drafters import algorithms as package
from msd.drafters.base import Drafter
from msd.drafters.toolkit import checkpoint
from msd.drafters.toolkit.drafter import TrainedDrafter
from msd.drafters.toolkit.network import DraftNetwork, Loss, NetworkConfig
from msd.drafters.toolkit.training import Objective
from msd.errors import UserError

DEFAULT, FALLBACK = "msd", "prompt-lookup"  # the method for a target with a trained drafter, and without
REFERENCE, VIDEO = "reference", "reference-video"  # the targets that drafters ship for
FOR_VIDEO = ":video"  # suffix of the names of drafters trained for the video target
_CHECKOUT = Path(__file__).parents[3]
ROOTS: tuple[Path, ...] = (Path(__file__).parents[1] / "weights",) + (
    (_CHECKOUT / "weights",) if (_CHECKOUT / "pyproject.toml").is_file() else ()
)


@dataclass(frozen=True)
class Method:
    """One method.

    make: creates a drafter; its arguments are the loaded `weights`. weights: names of the trained drafters that it
    uses. network: the class that `msd train` trains. load: loads a folder (in a dtype) as an argument of `make`;
    UserError if the folder is damaged. form_of: the method whose weights this one uses differently. command: how to
    train its weights. target: the name of the target that its weights are trained for. native: whether a target's own
    checkpoint brings what the method drafts with; None for a method that needs nothing of it. native_network: the class
    that trains it further; `of(model)` loads it from there.
    """

    name: str
    make: Callable[..., Drafter]
    weights: tuple[str, ...] = ()
    network: type[DraftNetwork] | None = None
    load: Callable[..., Any] | None = None
    form_of: str | None = None
    command: str = ""
    target: str = REFERENCE
    native: Callable[[PreTrainedModel], bool] | None = None
    native_network: Any = None

    @property
    def missing(self) -> list[str]:
        """Names of its weights that are not present."""
        present = folders()
        return [name for name in self.weights if name not in present]

    @property
    def hint(self) -> str:
        """How to train the first missing weights; empty if none are missing."""
        missing = self.missing
        return f"weights not here: {_known()[missing[0]].command}" if missing else ""


_BUILT_IN: dict[str, Method] = {}  # registered by files of `msd.drafters.algorithms`
_METHODS: dict[str, Method] = {}  # registered at run time; these have precedence
_OPTIONS: dict[str, Callable[[Drafter], Drafter]] = {}
K = TypeVar("K", bound=type[DraftNetwork])


def training_command(options: str) -> str:
    """Returns the command that trains a drafter, as a hint for the user."""
    return f"make them with `msd train {options} --captured FILE --images DIR --out DIR`"


def add(method: Method) -> None:
    """Registers a method of the package."""
    _BUILT_IN[method.name] = method


def add_option(name: str, wrap: Callable[[Drafter], Drafter]) -> None:
    """Registers the option `name` of all drafters: `wrap` is applied to the drafter of a method NAME in `NAME+name`."""
    _OPTIONS[name] = wrap


def learned(
    name: str,
    loss: Loss | None = None,
    objective: Callable[..., Objective] | None = None,
    config: Any = NetworkConfig,
    drafter: Callable[..., Drafter] = TrainedDrafter,
    weights: tuple[str, ...] | None = None,
) -> Callable[[K], K]:
    """Registers a `DraftNetwork` class as a method that is trained.

    loss: the published loss (`msd.train.losses`). objective: instead of a loss, a module with a loss and parameters.
    config: the class of `config.json`, with `from_json`. drafter: creates a drafter from a network and an optional
    name. weights: names of the trained drafters that it uses, by default its own.
    """

    def registered(kind: K) -> K:
        kind.method, kind.published_loss, kind.objective_type, kind.drafter = name, loss, objective, drafter

        def load(folder: Path | str, dtype: torch.dtype = torch.float32) -> DraftNetwork:
            network = checkpoint.load(folder, lambda text: kind(config.from_json(text)), dtype)
            network.provenance = checkpoint.provenance(folder)
            network.calibration = network.provenance.get("calibration")
            return network

        make = lambda network: drafter(kind.adopted(network))  # noqa: E731
        add(Method(name, make, weights or (name,), kind, load, command=training_command(f"--method {name}")))
        return kind

    return registered


def register(name: str, make: Callable[[], Drafter]) -> None:
    """Registers the method `name` at run time: `create(name)` returns `make()`."""
    _METHODS[name] = Method(name, make)


def register_folder(folder: Path | str) -> str:
    """Loads the trained drafter in `folder`, for any target, and returns the name of its method.

    The method and its other forms (such as `msd:sampled`) then use this drafter. UserError if the folder holds none.
    """
    name = _of(folder).name
    register_network(load(folder), name)
    return name


def register_network(trained: Any, name: str) -> None:
    """Makes a loaded network the one that method `name` and its other forms use."""
    for method in _known().values():
        if name in (method.name, method.form_of) and (method.weights or method.load):
            register(method.name, partial(method.make, trained))


def load(folder: Path | str, dtype: torch.dtype = torch.float32) -> Any:
    """Loads the network of the drafter in `folder`, on the CPU and without a target (`DraftNetwork.attach`).

    UserError if the folder is damaged or holds no drafter.
    """
    method = _of(folder)
    assert method.load is not None
    return method.load(folder, dtype)


_loaded = cache(load)


def catalogue() -> list[Method]:
    """Lists all methods: `ar`, those without weights, the forms of MSD, the others, and those of other targets."""
    known = _known()
    order = lambda m: (m.name != "ar", bool(m.weights), m.target != REFERENCE, DEFAULT not in (m.name, m.form_of))  # noqa: E731
    names = [m.name for m in sorted(known.values(), key=order)] + [name for name in _METHODS if name not in known]
    return [_METHODS.get(name) or known[name] for name in names]


def methods(target: str = REFERENCE) -> list[str]:
    """Names of the methods that can draft for a target: without weights, or with weights trained for it and present.

    Native methods, which only some checkpoints have, are not among them.
    """
    present, known = folders().keys(), [m for m in catalogue() if m.native is None]
    return [m.name for m in known if not m.weights or (m.target == target and present >= set(m.weights))]


def get(name: str) -> Method:
    """Returns the method `name`; UserError lists all methods, and marks those whose weights are missing."""
    known = _METHODS.get(name) or _known().get(name) or _with_option(name)
    if known is None:
        listed = [m.name + (" (weights not here)" if m.missing else "") for m in catalogue()]
        options = ", ".join(f"NAME+{option}" for option in _OPTIONS)
        near = get_close_matches(name, [m.name for m in catalogue()], 1)
        meant = f"did you mean '{near[0]}'? " if near else ""
        raise UserError(f"unknown method '{name}'; {meant}known: {', '.join(listed)}; for drafters also {options}")
    return known


def _with_option(name: str) -> Method | None:
    """Returns the method of a name `NAME+OPTION`; None for any other name. UserError if NAME drafts without weights."""
    base, _, option = name.rpartition("+")
    wrap = _OPTIONS.get(option)
    if not base or wrap is None:
        return None
    method = get(base)
    if (base not in _METHODS and not method.weights) or base.endswith((f"+{option}", ":sampled")):
        raise UserError(f"method '{name}': '+{option}' is an option of trained drafters that rank their candidates")
    make = lambda *weights: wrap(method.make(*weights))  # noqa: E731
    return replace(method, name=name, make=make, network=None, load=None, form_of=base)


def ready(name: str) -> Method:
    """Returns the method `name` if its weights are present; else UserError with the command that trains them."""
    method = get(name)
    if method.missing:
        place = _place(method.missing[0])
        alone = method.load is not None and method.weights == (name,)
        then = "name the folder DIR/drafter with --drafter" if alone else f"copy DIR/drafter to '{place}'"
        raise UserError(f"method '{name}': {method.hint}, then {then}")
    return method


def create(name: str) -> Drafter:
    """Creates a drafter of method `name`; drafters of one folder share its network. UserError as in `ready`."""
    method, present = ready(name), folders()
    return method.make(*(_loaded(present[part]) for part in method.weights))


def trainable(name: str) -> type[DraftNetwork]:
    """Returns the network class that `msd train` trains for a method; UserError lists the trainable methods."""
    kinds = {m.name: m.network for m in _known().values() if m.network is not None}
    if name in _known() and _known()[name].native_network is not None:
        raise UserError(f"method '{name}' is trained from the layers that a target brings: --start {name}")
    if name not in kinds:
        others = ", ".join(kind for kind in kinds if kind != DEFAULT)
        raise UserError(f"method '{name}' cannot be trained; choose {DEFAULT} or one of {others}")
    return kinds[name]


def is_native(name: str) -> bool:
    """Whether `name` is a method whose drafter a target's own checkpoint can bring."""
    method = _known().get(name)
    return method is not None and method.native is not None


def startable(name: str) -> Any:
    """Returns the network class that `msd train --start` trains: of `trainable`, or of a method that targets bring."""
    method = _known().get(name)
    return method.native_network if method is not None and method.native_network else trainable(name)


def default(target: str, model: PreTrainedModel | None = None) -> str:
    """Returns the default method for a target's `fingerprint`; see `choose`."""
    return choose(target, model)[0]


def choose(target: str, model: PreTrainedModel | None = None) -> tuple[str, str]:
    """Returns (the default method for a target's `fingerprint`, why).

    A drafter trained for it, or else what the checkpoint of `model` brings, or else prompt lookup.
    """
    present = folders()
    for name in (DEFAULT, DEFAULT + FOR_VIDEO):
        if name in present and name not in _METHODS:
            thresholds = checkpoint.training(present[name]).get("cuts")
            if isinstance(thresholds, dict) and thresholds.get("target") == target:
                return f"{name}+{FALLBACK}", "a drafter trained for this target"
    for method in catalogue() if model is not None else ():
        if method.native is not None and method.native(model):
            return method.name, "the target's checkpoint brings it"
    return FALLBACK, "there is no drafter for this target"


def folders() -> dict[str, Path]:
    """Maps the name of each trained drafter to its folder, in the first of `ROOTS` that has it.

    A damaged folder is listed under its own name, so that only loading this drafter fails.
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
    """Returns the folder where `folders` finds a newly trained drafter."""
    base = name.removesuffix(FOR_VIDEO)
    return (ROOTS[-1] if base == name else ROOTS[-1] / "video") / base.replace(":", "-")


def _known() -> dict[str, Method]:
    """Returns the methods of the package. Their files register them when they are imported, here at first use."""
    for module in pkgutil.iter_modules(package.__path__):
        import_module(f"{package.__name__}.{module.name}")
    return _BUILT_IN


def _of(folder: Path | str) -> Method:
    """Returns the method in a folder's configuration, or MSD."""
    name = checkpoint.method(Path(folder)) or DEFAULT
    found = _known().get(name)
    if found is None or found.load is None:
        raise UserError(f"drafter '{folder}' is of method '{name}', which is not known here")
    return found
