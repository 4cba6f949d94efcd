"""Frames, voxel grids, time surfaces and cells: the vectorised code against loops over events, whole and in chunks."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from writers import SIZE, rows, scene, write

from msd.errors import UserError
from msd.events import EventStream, cells, event_frames, frames, open_chunks, time_surface, voxel_grid
from msd.events.cells import otsu
from msd.events.recording import By
from msd.labels import EVENT_DENSE, EVENT_SPARSE

RED, BLUE, WHITE = (255, 0, 0), (0, 0, 255), (255, 255, 255)
quick = settings(deadline=None, max_examples=30)
streams = st.builds(scene, st.integers(1, 300), st.integers(0, 1000))


def runs(stream: EventStream, count: int, by: str) -> list[list[tuple[int, int, int, int]]]:
    """Returns the events of each frame, one by one."""
    found: list[list[tuple[int, int, int, int]]] = [[] for _ in range(count)]
    begin, end = stream.span
    edges = [begin + i * (end + 1 - begin) // count for i in range(count + 1)]
    for number, event in enumerate(rows(stream)):
        if by == "count":
            share = len(stream) // count
            frame = min(number // share, count - 1) if share else count - 1
        else:
            frame = max(i for i in range(count) if edges[i] <= event[0])
        found[frame].append(event)
    return found


@quick
@given(stream=streams, count=st.integers(1, 9), by=st.sampled_from(["count", "time"]))
def test_frames_equal_a_loop(stream: EventStream, count: int, by: By) -> None:
    made = event_frames(stream, count, by)
    for frame, events in enumerate(runs(stream, count, by)):
        picture = [[WHITE] * SIZE[0] for _ in range(SIZE[1])]
        for _, x, y, p in events:
            picture[y][x] = RED if p else BLUE
        np.testing.assert_array_equal(np.asarray(made.images()[frame]), picture)
        assert made.counts[frame] == len(events)
        assert tuple(made.spans[frame]) == ((events[0][0], events[-1][0]) if events else (0, 0))
    assert made.counts.sum() == len(stream)


@quick
@given(stream=streams, bins=st.integers(1, 7))
def test_voxel_grids_equal_a_loop(stream: EventStream, bins: int) -> None:
    wanted = np.zeros((bins, SIZE[1], SIZE[0]))
    begin, end = stream.span
    for t, x, y, p in rows(stream):
        at = (bins - 1) * (t - begin) / max(end - begin, 1)
        for b in range(bins):
            wanted[b, y, x] += (2 * p - 1) * max(0.0, 1 - abs(b - at))
    grid = voxel_grid(stream, bins)
    np.testing.assert_allclose(grid, wanted, atol=1e-5)
    assert grid.sum() == pytest.approx(2.0 * stream.p.sum() - len(stream), abs=1e-3), "no polarity is lost"


@quick
@given(stream=streams, tau=st.floats(10, 1e6), share=st.floats(-0.1, 1.1))
def test_time_surfaces_equal_a_loop(stream: EventStream, tau: float, share: float) -> None:
    at = int(stream.span[0] + share * (stream.span[1] - stream.span[0]))
    wanted = np.zeros((2, SIZE[1], SIZE[0]))
    for t, x, y, p in rows(stream):
        if t <= at:
            wanted[p, y, x] = math.exp(-(at - t) / tau)
    np.testing.assert_allclose(time_surface(stream, tau, at), wanted, atol=1e-6)
    np.testing.assert_array_equal(time_surface(stream, tau), time_surface(stream, tau, stream.span[1]))


@quick
@given(
    stream=streams,
    count=st.integers(1, 6),
    by=st.sampled_from(["count", "time"]),
    grid=st.sampled_from([(1, 1), (7, 5), SIZE]),
)
def test_cells_equal_a_loop(stream: EventStream, count: int, by: By, grid: tuple[int, int]) -> None:
    found = cells(stream, grid, count, by)
    begin, end = stream.span
    edges = [begin + i * (end + 1 - begin) // count for i in range(count + 1)]
    for frame, events in enumerate(runs(stream, count, by)):
        length = edges[frame + 1] - edges[frame] if by == "time" else (events[-1][0] - events[0][0] if events else 0)
        for row in range(grid[1]):
            for column in range(grid[0]):
                pixels = (
                    [
                        (x, y)
                        for x in range(SIZE[0])
                        for y in range(SIZE[1])
                        if x * grid[0] // SIZE[0] == column and y * grid[1] // SIZE[1] == row
                    ]
                    if grid != SIZE
                    else [(column, row)]
                )
                inside = set(pixels)
                number = sum((x, y) in inside for _, x, y, _ in events)
                rate = number / len(pixels) / max(length, 1000) * 1e6
                assert found.rates[frame, row, column] == pytest.approx(rate)
            if grid == SIZE:
                break  # a row of so many is enough
    dense = found.kinds == EVENT_DENSE.id
    np.testing.assert_array_equal(dense, found.rates >= found.threshold)
    assert set(np.unique(found.kinds)) <= {EVENT_SPARSE.id, EVENT_DENSE.id}
    with_frames = event_frames(stream, count, by, grid).cells
    assert with_frames is not None
    np.testing.assert_array_equal(with_frames.kinds, found.kinds)


@quick
@given(values=st.lists(st.floats(-5, 5), min_size=2, max_size=30))
def test_otsu_separates_best_of_all_thresholds(values: list[float]) -> None:
    log = np.array(values)

    def apart(threshold: float) -> float:
        low, high = log[log < threshold], log[log >= threshold]
        return len(low) * len(high) * (low.mean() - high.mean()) ** 2 if len(low) and len(high) else 0.0

    assert apart(math.log(otsu(log))) == pytest.approx(max(map(apart, [*values, -9.0])), rel=1e-6, abs=1e-9)


def test_otsu_separates_two_groups_and_keeps_one_group_whole() -> None:
    draw = np.random.default_rng(0)
    slow, fast = draw.normal(0, 0.3, 900), draw.normal(4, 0.3, 100)
    assert math.exp(1.2) < otsu(np.concatenate([slow, fast])) < math.exp(3.4)
    assert otsu(np.full(4, 1.0)) <= math.exp(1.0)
    assert otsu(np.empty(0)) == math.inf


def test_a_stored_threshold_is_used() -> None:
    stream = scene(300)
    found = cells(stream, (6, 4))
    again = cells(stream.part(0, 200), (6, 4), threshold=found.threshold)
    assert again.threshold == found.threshold
    assert (cells(stream, (6, 4), threshold=1e12).kinds == EVENT_SPARSE.id).all()


@pytest.mark.parametrize("chunk", [1, 13, 1000])
def test_a_recording_and_its_stream_have_the_same_representations(tmp_path: Path, chunk: int) -> None:
    recording = open_chunks(write(tmp_path, "es", scene(200)), chunk)
    stream = recording.read()
    for by in ("count", "time"):
        ours, theirs = (event_frames(e, 3, by, (4, 4)) for e in (recording, stream))  # type: ignore[arg-type]
        np.testing.assert_array_equal(ours.pixels, theirs.pixels)
        np.testing.assert_array_equal(ours.spans, theirs.spans)
        np.testing.assert_array_equal(ours.cells.kinds, theirs.cells.kinds)  # type: ignore[union-attr]
    np.testing.assert_allclose(voxel_grid(recording, 4), voxel_grid(stream, 4), atol=1e-6)
    np.testing.assert_array_equal(time_surface(recording), time_surface(stream))


def test_frames_of_another_size_and_of_no_events() -> None:
    assert [image.size for image in frames(scene(), 2, size=(20, 10))] == [(20, 10)] * 2
    nothing = scene().part(0, 0)
    for image in frames(nothing, 2):
        assert (np.asarray(image) == 255).all()
    assert not voxel_grid(nothing).any() and not time_surface(nothing).any()
    assert (cells(nothing, (2, 2)).kinds == EVENT_SPARSE.id).all()


@pytest.mark.parametrize(
    "call",
    [
        lambda s: frames(s, 0),
        lambda s: frames(s, 3, "size"),
        lambda s: event_frames(s, 10**9),
        lambda s: event_frames(EventStream(s.t, s.x, s.y, s.p, (60_000, 60_000))),
        lambda s: time_surface(EventStream(s.t, s.x, s.y, s.p, (60_000, 60_000))),
        lambda s: voxel_grid(s, 10**9),
        lambda s: voxel_grid(s, 0),
        lambda s: time_surface(s, 0.0),
        lambda s: cells(s, (0, 4)),
        lambda s: cells(s, (400, 4)),
        lambda s: EventStream(s.t, s.x, s.y, s.p + 3, s.size),
        lambda s: EventStream(s.t[:3], s.x, s.y, s.p, s.size),
        lambda s: EventStream(s.t * 1.5, s.x, s.y, s.p, s.size),
        lambda s: EventStream(s.t[::-1], s.x, s.y, s.p, s.size),
        lambda s: EventStream(s.t, s.x, s.y, s.p, (0, 5)),
    ],
)
def test_invalid_arguments_are_refused(call: object) -> None:
    with pytest.raises(UserError):
        call(scene())  # type: ignore[operator]


@pytest.mark.slow
def test_memory_does_not_grow_with_the_recording() -> None:
    """With 10 million events; recipes/events/speed.py measures 100 million."""
    script = Path(__file__).parents[2] / "recipes" / "events" / "speed.py"
    code = subprocess.run(
        [sys.executable, str(script), "--memory", "10000000"], capture_output=True, text=True, check=True
    )
    assert float(code.stdout.split()[0]) < 600, "MB at the most, of which Python and numpy take some 60"
