"""Method names and how to make their drafters: those made of code alone, and the trained ones that ship.

Every folder of `WEIGHTS` is a drafter trained for the reference model; its name is the method's, with a dash for the
colon. It is read when it is first used. So are the rivals of `RIVAL_WEIGHTS` and the drafters of the video target in
`VIDEO_WEIGHTS`, which a source checkout has and the wheel has not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

from msd.drafters import eventgpt, rivals, stored
from msd.drafters.base import Drafter
from msd.drafters.combined import Combined
from msd.drafters.eventgpt import checkpoint as eventgpt_checkpoint
from msd.drafters.msd import MSD, MSDNetwork, checkpoint
from msd.drafters.plain import Plain
from msd.drafters.prompt_lookup import PromptLookup
from msd.drafters.repeats import Repeats
from msd.errors import UserError

WEIGHTS = Path(__file__).parents[1] / "weights"
COMBINED = ("eagle3", "dspark")  # trunks of the `msd+NAME` methods: the best known of either kind
REPEATS = "msd+prompt-lookup"
RIVAL_WEIGHTS = Path(__file__).parents[3] / "weights"
VIDEO_WEIGHTS = RIVAL_WEIGHTS / "video"
REFERENCE, VIDEO = "reference", "reference-video"  # names of the targets that drafters ship for
_METHODS: dict[str, Callable[[], Drafter]] = {}
_Trained = tuple[MSDNetwork, dict[str, dict[str, float]] | None]


def register(name: str, make: Callable[[], Drafter]) -> None:
    """Makes `name` a method: `create(name)` returns `make()`."""
    _METHODS[name] = make


def register_folder(folder: Path | str) -> str:
    """Makes the trained drafter in `folder` the method it is of, whose name is returned.

    `msd` has a sampled form too, `msd:sampled`. UserError now when the folder holds no drafter.
    """
    method = stored.method(Path(folder))
    if method == eventgpt.METHOD:
        parts = eventgpt_checkpoint.load(folder)
        register(method, partial(eventgpt.EventGPTDrafter, *parts))
        return method
    if method is not None:
        network = rivals.load(folder)
        register(method, partial(rivals.RivalDrafter, network))
        return method
    trained, thresholds = _read(folder)
    for name, sampled in (("msd", False), ("msd:sampled", True)):
        register(name, partial(MSD, trained, name, sampled, thresholds))
    register(REPEATS, lambda: Repeats(create("msd")))
    return "msd"


def methods(target: str = REFERENCE) -> list[str]:
    """All method names, plain decoding first; of those trained for a target that ships, only that target's."""
    foreign = {name for name, make in _METHODS.items() if isinstance(make, _Shipped) and make.target != target}
    return [name for name in _METHODS if name not in foreign]


def known() -> list[str]:
    """The method names of all targets."""
    return list(_METHODS)


def create(name: str) -> Drafter:
    """A fresh drafter of method `name`; UserError names the known ones."""
    if name not in _METHODS:
        raise UserError(f"unknown method '{name}'; known: {', '.join(_METHODS)}")
    return _METHODS[name]()


def default(target: str) -> str:
    """The method for a target (its `fingerprint`) where none is named: a drafter trained for it, or prompt lookup."""
    for folder, name in ((WEIGHTS / "msd", REPEATS), (VIDEO_WEIGHTS / "msd", _for_video(REPEATS))):
        shipped = isinstance(_METHODS.get(name), _Shipped)
        cuts = stored.training(folder).get("cuts") if shipped else None
        if isinstance(cuts, dict) and cuts.get("target") == target:
            return name
    return "prompt-lookup"


@dataclass(frozen=True)
class _Shipped:
    """Makes a drafter that ships. target: the name of the one it was trained for."""

    make: Callable[[], Drafter]
    target: str = REFERENCE

    def __call__(self) -> Drafter:
        return self.make()


def _read(folder: Path | str) -> _Trained:
    """A trained network and the thresholds calibrated for it."""
    return checkpoint.load(folder), stored.thresholds(folder)


def _register_shipped(root: Path) -> None:
    """Makes the folders of `root` methods, and `msd` also one that samples; methods of a folder share its network."""
    for folder in sorted(p.parent for p in root.glob(f"*/{stored.CONFIG}")):
        name, read = folder.name.replace("-", ":"), cache(partial(_read, folder))
        register(name, _Shipped(partial(_made, read, name, False)))
        if name == "msd":
            register("msd:sampled", _Shipped(partial(_made, read, "msd:sampled", True)))
            register(REPEATS, _Shipped(partial(_repeats, read, name)))


def _register_rivals(root: Path) -> None:
    """Makes the folders of `root` methods: rivals by the name in their configuration, others by the folder's."""
    for folder in sorted(p.parent for p in root.glob(f"*/{stored.CONFIG}")):
        try:
            method = stored.method(folder)
        except UserError as error:  # whoever does not ask for it is not stopped by it
            register(folder.name, _Shipped(partial(_refused, error)))
            continue
        if method is None:
            name = folder.name.replace("-", ":")
            register(name, _Shipped(partial(_made, cache(partial(_read, folder)), name, False)))
        elif method in rivals.RIVALS:
            read = cache(partial(rivals.load, folder))
            register(method, _Shipped(partial(_rival, read)))
            if method in COMBINED and (WEIGHTS / "msd" / stored.CONFIG).exists():
                register(f"msd+{method}", _Shipped(partial(_combined, read)))
            if method == rivals.Eagle2.method:  # prunes what that drafter sees, with its weights
                register(rivals.SpecVLMVideo.method, _Shipped(partial(_pruned, read)))


def _register_video(folder: Path) -> None:
    """Makes the MSD drafter of the video target in `folder` two methods: `msd:video`, and with repeats looked up."""
    if (folder / stored.CONFIG).is_file():
        name, read = _for_video("msd"), cache(partial(_read, folder))
        register(name, _Shipped(partial(_made, read, name, False), VIDEO))
        register(_for_video(REPEATS), _Shipped(partial(_repeats, read, name), VIDEO))


def _for_video(method: str) -> str:
    """What a method is called when it was trained for the video target."""
    return method.replace("msd", "msd:video", 1)


def _refused(error: UserError) -> Drafter:
    raise error


def _rival(read: Callable[[], rivals.Rival]) -> rivals.RivalDrafter:
    return rivals.RivalDrafter(read())


def _combined(read: Callable[[], rivals.Rival]) -> Combined:
    return Combined(read(), checkpoint.load(WEIGHTS / "msd"))


def _pruned(read: Callable[[], rivals.Rival]) -> rivals.RivalDrafter:
    trained = read()
    assert isinstance(trained, rivals.Eagle2)
    return rivals.RivalDrafter(rivals.SpecVLMVideo.from_eagle2(trained))


def _made(read: Callable[[], _Trained], name: str, sampled: bool) -> MSD:
    network, thresholds = read()
    return MSD(network, name, sampled, thresholds)


def _repeats(read: Callable[[], _Trained], name: str) -> Repeats:
    return Repeats(_made(read, name, False))


register("ar", Plain)
register("prompt-lookup", PromptLookup)
register("prompt-lookup:sampled", lambda: PromptLookup(sampled=True))
_register_shipped(WEIGHTS)
if (RIVAL_WEIGHTS.parent / "pyproject.toml").is_file():  # a source checkout
    _register_rivals(RIVAL_WEIGHTS)
    _register_video(VIDEO_WEIGHTS / "msd")
