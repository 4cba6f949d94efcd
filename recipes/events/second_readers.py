"""Compares the events that `msd.events` reads with those of other libraries, event by event.

    python -m venv other && other/bin/pip install . faery evlib expelliarmus dv-processing aedat
    other/bin/python -m recipes.events.second_readers ../shared/data/events

These libraries are not dependencies of this project; README.md gives the reasons.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from msd.events import read

Columns = tuple[Any, Any, Any, Any]


def faery(path: Path) -> Columns:
    import faery as library

    events = np.concatenate(list(library.events_stream_from_file(path)))
    return events["t"], events["x"], events["y"], events["p"]


def evlib(path: Path) -> Columns:
    import evlib as library

    table = library.load_events(str(path)).collect()
    t, x, y, p = (table[name] for name in ("t", "x", "y", "polarity"))
    return t.dt.total_microseconds().to_numpy(), x.to_numpy(), y.to_numpy(), p.to_numpy() > 0


def expelliarmus(path: Path) -> Columns:
    import expelliarmus as library

    encoding = {".raw": "evt2" if "evt2" in path.name else "evt3", ".dat": "dat"}[path.suffix]
    events = library.Wizard(encoding=encoding).read(str(path))
    return events["t"], events["x"], events["y"], events["p"]


def dv_processing(path: Path) -> Columns:
    import dv_processing as library

    recording = library.io.MonoCameraRecording(str(path))
    parts = []
    while recording.isRunning():
        batch = recording.getNextEventBatch()
        if batch is not None:
            parts.append(batch.numpy())
    events = np.concatenate(parts)
    return events["timestamp"], events["x"], events["y"], events["polarity"]


def numpy_pickle(path: Path) -> Columns:
    """Executes the file's pickle, which `msd.events` never does: use it only for trusted files."""
    found = np.load(path, allow_pickle=True).item()
    table = found[0] if isinstance(found, list) else found
    return table["t"], table["x"], table["y"], table["p"]


def loop(path: Path) -> Columns:
    """Decodes N-MNIST bit by bit."""
    data, events, clock = path.read_bytes(), [], 0
    for i in range(0, len(data), 5):
        number = int.from_bytes(data[i : i + 5], "big")
        x, y, p, t = number >> 32, number >> 24 & 255, number >> 23 & 1, number & 0x7FFFFF
        if y == 240:
            clock += 1 << 13
        else:
            events.append((t + clock, x, y, p))
    t, x, y, p = np.array(events).T
    return t, x, y, p


READERS: dict[str, tuple[Callable[[Path], Columns], ...]] = {
    "eventgpt_sample1.npy": (numpy_pickle,),
    "evt2_sample.raw": (faery, evlib, expelliarmus),
    "evt3_sample.raw": (evlib, faery, expelliarmus),
    "dvs.es": (faery,),
    "sample.aedat4": (faery, dv_processing),
    "sample_ncars.dat": (expelliarmus,),
    "sample_nmnist.bin": (loop,),
}


def differences(folder: Path) -> Iterator[str]:
    for name, readers in READERS.items():
        ours = read(folder / name)
        for reader in readers:
            theirs = reader(folder / name)
            if len(theirs[0]) != len(ours):
                yield f"{name}: {len(ours)} events, by {reader.__name__} {len(theirs[0])}"
                continue
            columns = zip("txyp", (ours.t, ours.x, ours.y, ours.p), theirs, strict=True)
            unequal = {c: int((a.astype(np.int64) != np.asarray(b).astype(np.int64)).sum()) for c, a, b in columns}
            told = ", ".join(f"{n} {c}" for c, n in unequal.items() if n) or "none"
            yield f"{name}: {len(ours)} events, differences from {reader.__name__}: {told}"


if __name__ == "__main__":
    for line in differences(Path(sys.argv[1])):
        print(line)
