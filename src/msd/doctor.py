"""Reports what is installed, how target passes run on this machine, what is missing, and the commands that mend it.

Every part of the report is plain data for JSON. torch and the other libraries are imported only where they are needed,
and only if they are installed, so a broken installation is reported too.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

import msd
from msd.errors import UserError

DISTRIBUTION = "msd-decoding"
FALLBACK = Path(__file__).parents[2] / "pyproject.toml"  # a source checkout that is not installed
USES = {  # what the packages of an extra are for
    "train": "msd train, msd capture",
    "bench": "msd bench",
    "video": "--video, --audio",
    "quantised": "quantised targets",
    "serve": "msd serve",
    "events": "HDF5 and AEDAT 4 recordings",
    "dev": "the tests and checks of a checkout",
    "docs": "make docs",
}
SECONDS = 0.5  # for which the load of other processes is counted
Report = dict[str, Any]


def examine(target: str = "reference", load: bool = True) -> Report:
    """Returns the whole report; its key "missing" lists what is wrong, each with "what", "needed" and "command".

    target: whose backend is named. load: whether to load it for that; takes seconds, or a minute at the first time,
    when the backends are measured.
    """
    report: Report = {"msd": _program(), **_packages()}
    report["machine"] = _machine()
    broken = any(row["state"] != "ok" for row in report["packages"])
    report["reference"] = _reference() if not broken else {"state": "not examined: packages are missing"}
    report["backend"] = _backend(target, load, broken, report["reference"])
    report["drafters"] = {} if broken else _drafters()
    report["caches"] = _caches()
    report["missing"] = _missing(report)
    return report


def _program() -> Report:
    """Where this program and its interpreter are."""
    return {
        "version": msd.__version__, "folder": str(Path(msd.__file__).parent), "python": platform.python_version(),
        "executable": sys.executable, "system": platform.platform(),
    }  # fmt: skip


def requirements() -> list[Requirement]:
    """Returns the requirements of the installed distribution, or those in pyproject.toml of a checkout without one."""
    try:
        return [Requirement(text) for text in metadata.requires(DISTRIBUTION) or ()]
    except metadata.PackageNotFoundError:
        import tomllib

        project = tomllib.loads(FALLBACK.read_text(encoding="utf-8"))["project"]
        extras = project["optional-dependencies"].items()
        texts = [f'{text}; extra == "{extra}"' for extra, listed in extras for text in listed]
        return [Requirement(text) for text in [*project["dependencies"], *texts]]


def _packages() -> Report:
    """The required packages, and those of each extra, with their versions."""
    packages: list[Report] = []
    extras: dict[str, Report] = {}
    for needed in requirements():
        row = _installed(needed)
        if needed.marker is None or needed.marker.evaluate({"extra": ""}):
            packages.append(row)
            continue
        for extra in (name for name in USES if needed.marker.evaluate({"extra": name})):
            part = extras.setdefault(extra, {"for": USES[extra], "packages": []})
            part["packages"].append(row)
    for part in extras.values():
        part["installed"] = all(row["state"] == "ok" for row in part["packages"])
    return {"packages": packages, "extras": extras}


def _installed(needed: Requirement) -> Report:
    """One package: its version, and whether it is ok, missing, or outside the accepted versions."""
    try:
        found = metadata.version(needed.name)
    except metadata.PackageNotFoundError:
        return {"name": needed.name, "version": None, "accepted": str(needed.specifier), "state": "missing"}
    fits = needed.specifier.contains(found, prereleases=True)
    state = "ok" if fits else "another version"
    return {"name": needed.name, "version": found, "accepted": str(needed.specifier), "state": state}


def _machine() -> Report:
    """Processor, cores, threads, other processes, and GPU."""
    from msd.system import machine

    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found: Report = {
        "processor": machine.processor(), "cores": os.cpu_count(), "usable_cores": usable,
        "busy_cores": neighbours(), "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS"), "threads": None, "gpus": [],
    }  # fmt: skip
    if importlib.util.find_spec("torch"):
        import torch

        found["threads"] = torch.get_num_threads()
        found["gpus"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return found


def neighbours(seconds: float = SECONDS) -> float | None:
    """Returns how many cores other processes keep busy, over `seconds`; None where the system has no /proc/stat."""
    try:
        before, own, ticks = _busy_ticks(), time.process_time(), os.sysconf("SC_CLK_TCK")
        time.sleep(seconds)
        busy = (_busy_ticks() - before) / ticks - (time.process_time() - own)
    except (OSError, ValueError, AttributeError):
        return None
    return round(max(0.0, busy / seconds), 2)


def _busy_ticks() -> int:
    """Clock ticks that all cores have worked since the system started."""
    user, nice, system, _idle, _iowait, *interrupts = (
        Path("/proc/stat").read_text(encoding="utf-8").splitlines()[0].split()[1:]
    )
    return int(user) + int(nice) + int(system) + sum(map(int, interrupts[:2]))


def _reference() -> Report:
    """The embedded reference models: where they are, and whether they are complete."""
    from msd import reference
    from msd.reference import folder

    def state(video: bool) -> Report:
        try:
            place = reference.location(video=video)
            if folder.is_complete(place):
                return {"state": "complete", "folder": str(place)}
            folder.locate(video)
        except UserError as error:
            return {"state": str(error), "folder": None}
        return {"state": "not assembled yet", "folder": str(place)}

    return {**state(video=False), "video": state(video=True)}


def _backend(target: str, load: bool, broken: bool, reference: Report) -> Report:
    """The backend of a target's passes, and why."""
    found: Report = {"target": target, "name": None}
    if broken:
        return {**found, "reason": "not examined: packages are missing"}
    if not load:
        return {**found, "reason": "not examined: --quick"}
    if target == "reference" and reference["state"] != "complete":
        return {**found, "reason": "not examined: the reference model is not assembled"}
    from msd import backends
    from msd.loading import load_target

    model, _ = load_target(target)
    chosen = backends.choose(model)
    return {**found, "name": chosen.name, "reason": chosen.explanation, "kernels": chosen.choice}


def _drafters() -> dict[str, str]:
    """The folders of the trained drafters that are present, by method."""
    from msd.drafters import registry

    return {name: str(place) for name, place in registry.folders().items()}


def _caches() -> list[Report]:
    """The folders that this program and the model hub keep, with their sizes."""
    found: list[Report] = []
    if importlib.util.find_spec("platformdirs"):
        import platformdirs

        root = Path(platformdirs.user_cache_dir("msd", appauthor=False))
        parts = sorted(root.iterdir()) if root.is_dir() else []
        found += [{"path": str(part), "bytes": _size(part)} for part in parts if part.is_dir()]
        if not parts:
            found.append({"path": str(root), "bytes": 0})
    hub = os.environ.get("HF_HOME") or Path("~/.cache/huggingface").expanduser()
    hub = Path(os.environ.get("HF_HUB_CACHE") or Path(hub) / "hub")
    return [*found, {"path": str(hub), "bytes": _size(hub), "offline": bool(os.environ.get("HF_HUB_OFFLINE"))}]


def _size(folder: Path) -> int:
    """Bytes of all files in a folder; 0 for one that does not exist. Links to files are not counted."""
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file() and not p.is_symlink())


def _missing(report: Report) -> list[Report]:
    """What is missing, whether msd cannot run without it, and the command that mends it."""
    rows = [row for row in report["packages"] if row["state"] != "ok"]
    found = [
        {
            "what": f"{row['name']} {row['version'] or 'is missing'}, but msd needs {row['name']}{row['accepted']}",
            "needed": True, "command": f"pip install '{row['name']}{row['accepted']}'",
        }
        for row in rows
    ]  # fmt: skip
    found += _missing_reference(report["reference"])
    for name, part in report["extras"].items():
        if not part["installed"] and name not in ("dev", "docs"):
            lacking = ", ".join(row["name"] for row in part["packages"] if row["state"] != "ok")
            what = f"{lacking} (extra '{name}') for {part['for']}"
            found.append({"what": what, "needed": False, "command": f"pip install '{DISTRIBUTION}[{name}]'"})
    return [*found, *_advice(report["machine"])]


def _missing_reference(reference: Report) -> list[Report]:
    """The command that makes the reference model complete; its state is a message with a command where a part lacks."""
    if reference["state"] == "not assembled yet":
        return [{"what": "the reference model is not assembled", "needed": False, "command": "msd reference install"}]
    what, _, command = reference["state"].partition("; run: ")
    return [{"what": what, "needed": False, "command": command}] if command else []


def _advice(machine: Report) -> list[Report]:
    """Fewer threads than cores, and neighbours that take cores from them."""
    found: list[Report] = []
    cores, busy, threads = machine["usable_cores"] or 1, machine["busy_cores"] or 0.0, machine["threads"] or 1
    if machine["OMP_NUM_THREADS"] and threads < min(cores, machine["cores"] or 1):
        what = f"OMP_NUM_THREADS={machine['OMP_NUM_THREADS']} limits torch to {threads} of {cores} cores"
        found.append({"what": what, "needed": False, "command": "unset OMP_NUM_THREADS"})
    if busy >= 0.5 and busy > cores - threads:
        spare = max(1, int(cores - busy))
        what = f"other processes use {busy:.1f} of {machine['cores']} cores: answers are slower, and measurements wrong"
        found.append({"what": what, "needed": False, "command": f"stop them, or export OMP_NUM_THREADS={spare}"})
    return found


def is_broken(report: Report) -> bool:
    """Whether something is missing that msd cannot run without."""
    needed: Callable[[Report], bool] = lambda row: bool(row["needed"])  # noqa: E731
    return any(map(needed, report["missing"]))
