"""Measures the speed of event representations, and the peak memory for a long recording.

python -m recipes.events.speed                      # events per second of each representation
python -m recipes.events.speed --memory 100000000   # peak MB, for an EVT 3.0 file of this many events
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from msd.events import EventStream, event_frames, open_chunks, time_surface, voxel_grid

SIZE = (640, 480)


def synthetic(count: int, seed: int = 0) -> EventStream:
    """Generates events around a moving spot; as with a camera, events are close to each other."""
    draw = np.random.default_rng(seed)
    t = np.cumsum(draw.integers(0, 2, count))
    middle = np.stack([320 + 250 * np.sin(t / 2e5), 240 + 180 * np.cos(t / 3e5)])
    x, y = np.clip(middle + draw.normal(0, 40, (2, count)), 0, [[639], [479]]).astype(np.uint16)
    return EventStream(t, x, y, draw.integers(0, 2, count, dtype=np.uint8), SIZE)


def rate(work: Callable[[], object], events: int, repeats: int = 9) -> float:
    """Returns events per second of the median run; the fastest run says little on a busy machine."""
    seconds = []
    for _ in range(repeats):
        begin = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - begin)
    return events / float(np.median(seconds))


def speeds(count: int) -> dict[str, float]:
    stream = synthetic(count)
    return {
        "frames by count": rate(lambda: event_frames(stream, 5), count),
        "frames by time": rate(lambda: event_frames(stream, 5, "time"), count),
        "frames and cells": rate(lambda: event_frames(stream, 5, grid=(24, 24)), count),
        "voxel grid": rate(lambda: voxel_grid(stream), count),
        "time surface": rate(lambda: time_surface(stream), count),
    }


def write_raw(path: Path, count: int) -> None:
    """Writes an EVT 3.0 file of `count` events, in blocks of a million."""
    block = 1 << 20
    with path.open("wb") as file:
        file.write(b"% format EVT3;height=480;width=640\n% end\n")
        for start in range(0, count, block):
            n = min(block, count - start)
            at = np.arange(start, start + n)
            words = np.empty((n, 4), np.uint16)  # upper and lower time, y, x: the longest encoding of an event
            words[:, 0] = 8 << 12 | (at >> 12) % 4096
            words[:, 1] = 6 << 12 | at % 4096
            words[:, 2] = at // 7 % 480
            words[:, 3] = 2 << 12 | (at & 1) << 11 | at % 640
            file.write(words.tobytes())


def process(path: Path) -> None:
    """Makes frames, cells, a voxel grid and a time surface of a file; prints the peak memory in MB and the events."""
    recording = open_chunks(path)
    made = event_frames(recording, 5, grid=(24, 24))
    voxel_grid(recording)
    time_surface(recording)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000, made.counts.sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--events", type=int, default=5_000_000)
    parser.add_argument("--memory", type=int, metavar="EVENTS")
    parser.add_argument("--process", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.process:
        process(options.process)
    elif options.memory:
        with tempfile.TemporaryDirectory() as folder:
            write_raw(Path(folder) / "long.raw", options.memory)
            command = [sys.executable, __file__, "--process", str(Path(folder) / "long.raw")]
            print(subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip())
    else:
        found = {name: round(value / 1e6, 1) for name, value in speeds(options.events).items()}
        about = {"events": options.events, "numpy": np.__version__, "machine": platform.machine()}
        print(json.dumps({"million events/s": found, **about}))


if __name__ == "__main__":
    main()
