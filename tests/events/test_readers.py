"""Readers of every event format return the written events, for any chunk size; errors are one clear line."""

from __future__ import annotations

import io
import pickle
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import writers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from writers import FORMATS, NEEDS, scene, write

from msd.errors import UserError
from msd.events import EventStream, open_chunks, read

SHARED = Path(__file__).parents[3] / "shared" / "data" / "events"
OFFSET = {"hdf5": 1_000_000}
fixture_ok = settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(params=FORMATS)
def format(request: pytest.FixtureRequest) -> str:
    if request.param in NEEDS:
        pytest.importorskip(NEEDS[request.param])
    return str(request.param)


def same(a: EventStream, b: EventStream, shift: int = 0) -> None:
    for name in "xyp":
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
    np.testing.assert_array_equal(a.t, b.t + shift)


def refusal(path: Path, **options: int) -> str:
    with pytest.raises(UserError) as caught:
        open_chunks(path, **options).read()  # type: ignore[arg-type]
    assert "\n" not in str(caught.value) and path.name in str(caught.value)
    return str(caught.value)


def test_written_events_are_read(tmp_path: Path, format: str) -> None:
    stream = scene()
    found = read(write(tmp_path, format, stream))
    same(found, stream, OFFSET.get(format, 0))
    assert (found.t.dtype, found.x.dtype, found.y.dtype, found.p.dtype) == (np.int64, np.uint16, np.uint16, np.uint8)


@pytest.mark.parametrize("chunk", [1, 7, 64, 10_000])
def test_chunks_join_to_the_whole(tmp_path: Path, format: str, chunk: int) -> None:
    stream = scene(200)
    recording = open_chunks(write(tmp_path, format, stream), chunk)
    for _ in range(2):  # every iteration is from the start
        parts = list(recording)
        assert all(len(part) for part in parts)
        same(
            EventStream(*(np.concatenate([getattr(part, n) for part in parts]) for n in "txyp"), recording.size),
            stream,
            OFFSET.get(format, 0),
        )


def test_sizes_and_counts(tmp_path: Path, format: str) -> None:
    stream = scene()
    recording = open_chunks(write(tmp_path, format, stream))
    wanted = {
        "hdf5": ((640, 480), "format"),
        **dict.fromkeys(("evt2", "evt3", "dat", "es", "csv", "npz", "aedat4"), (writers.SIZE, "header")),
    }
    assert (recording.size, recording.size_from) == wanted.get(format, (writers.SIZE, "events"))
    assert open_chunks(recording.path, size=(100, 90)).size == (100, 90)
    assert "outside the sensor of 20x90" in refusal(recording.path, size=(20, 90))  # type: ignore[arg-type]


@fixture_ok
@given(data=st.data())
def test_truncated_files_are_a_prefix_or_one_line(tmp_path: Path, format: str, data: st.DataObject) -> None:
    stream = scene(120)
    path = write(tmp_path, format, stream)
    whole = path.read_bytes()
    path.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
    try:
        found = open_chunks(path, chunk=50).read()
    except UserError as error:
        assert "\n" not in str(error) and path.name in str(error)
        return
    assert len(found) <= len(stream)
    exact = len(found) if format not in ("csv", "seconds") else max(0, len(found) - 1)  # text may lose digits
    same(found.part(0, exact), stream.part(0, exact), OFFSET.get(format, 0))


@fixture_ok
@given(changes=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=6))
def test_damaged_files_raise_only_user_errors(tmp_path: Path, format: str, changes: list[tuple[float, int]]) -> None:
    path = write(tmp_path, format, scene(120))
    data = bytearray(path.read_bytes())
    for place, value in changes:
        data[int(place * len(data))] = value
    path.write_bytes(data)
    try:
        open_chunks(path, chunk=50).read()
    except UserError as error:
        assert "\n" not in str(error) and path.name in str(error)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.raw", b"", "0 bytes"),
        ("a.raw", b"noise noise noise", "does not begin as a .raw file does"),
        ("a.raw", b"% evt 4.0\n% end\n", "'4.0'"),
        ("a.raw", b"% evt 3.0\n% geometry 0x9\n% end\n\0\x80\0\x20", "0x9"),
        ("a.raw", b"% evt 3.0\n% geometry axb\n% end\n", "'axb'"),
        ("a.raw", b"% evt 2.0\n% endianness big\n% end\n", "big-endian"),
        ("a.dat", b"% Version 2\n", "truncated"),
        ("a.dat", b"% Version 9\n\0\x08", "version '9'"),
        ("a.dat", b"% Version 2\n\x07\x08", "type 7"),
        ("a.es", b"Event Stream\x01\0\0\x01" + bytes(4), "version 1.0.0"),
        ("a.es", b"Event Stream\x02\0\0\x02" + bytes(4), "ATIS"),
        ("a.es", b"Event Stream\x02\0\0\x01" + bytes(9), "0x0"),
        ("a.bin", b"1234", "whole number"),
        ("a.csv", b"a,b,c\n1,2,3\n", "does not name t, x, y and p"),
        ("a.csv", b"1,2,3\n", "fewer than four"),
        ("a.csv", b"# nothing\n", "no lines"),
        ("a.csv", b"0,1,1,0\n1,1,x,0\n", "number 1 to 2"),
        ("a.csv", b"0,1,5,2\n", "polarity 2"),
        ("a.csv", b"9,1,1,1\n3,1,1,1\n", "times go back from 9 to 3"),
        ("a.csv", b"0,-4,1,1\n", "x = -4"),
        ("a.csv", b"1" * 3000, "1000 characters"),
        ("a.npy", b"\x93NUMPY\x01\0", "header"),
        ("a.npz", b"PK\x03\x04junk", "unpacked"),
        ("a.xyz", b"what is this", "known: .npy"),
        ("a.h5", b"\x89HDF\r\n\x1a\n", "HDF5 cannot read it"),
        ("a.aedat4", b"#!AER-DAT4.0\r\n", "header"),
    ],
)
def test_broken_files_are_one_clear_line(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    if name.endswith((".h5", ".aedat4")):
        pytest.importorskip({"h5": "h5py", "aedat4": "aedat"}[name.split(".")[-1]])
    (tmp_path / name).write_bytes(content)
    assert said in refusal(tmp_path / name)


def test_panics_of_the_aedat_package_are_user_errors(tmp_path: Path) -> None:
    """Damage of the header, where one panic ends the process, and a packet of two bytes."""
    pytest.importorskip("aedat")
    path = write(tmp_path, "aedat4", scene(120))
    whole = path.read_bytes()
    for place in range(14, 80):
        for value in (0, 127, 255):
            path.write_bytes(whole[:place] + bytes([value]) + whole[place + 1 :])
            try:
                read(path)
            except UserError as error:
                assert "\n" not in str(error)
    path.write_bytes(whole + struct.pack("<iI", 0, 2) + b"ab")
    assert "a packet cannot be read" in refusal(path)


def test_missing_files_and_folders_are_refused(tmp_path: Path) -> None:
    assert "no file" in refusal(tmp_path / "none.raw")
    assert "a folder" in refusal(tmp_path)


def test_a_file_with_another_extension_is_recognised_by_its_first_bytes(tmp_path: Path) -> None:
    path = write(tmp_path, "es", scene())
    same(read(path.rename(tmp_path / "a.raw")), scene())
    same(read((tmp_path / "a.raw").rename(tmp_path / "b")), scene())


def test_orders_of_text_columns(tmp_path: Path) -> None:
    stream = scene(50)
    path = tmp_path / "a.csv"
    for line, names in (
        ("{t},{x},{y},{p}", ""),
        ("{x},{y},{p},{t}", ""),
        ("{p};{t};{x};{y}", "Polarity;TS;X;Y\n"),
        ("{t} {x} {y} {s}", "# t x y p\n"),
    ):
        lines = [line.format(t=t, x=x, y=y, p=p, s=2 * p - 1) for t, x, y, p in writers.rows(stream)]
        path.write_text(names + "\n".join(lines))
        same(read(path), stream)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_pickles_of_every_protocol(tmp_path: Path, protocol: int) -> None:
    path = tmp_path / "a.npy"
    path.write_bytes(writers.npy_list(scene(), protocol))
    if protocol == 2:  # in which bytes are the result of a call of _codecs.encode
        assert "_codecs" in refusal(path)
    else:
        same(read(path), scene())


class _Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return exec, ("raise SystemExit('code of a file was executed')",)


def test_no_code_of_a_pickle_runs(tmp_path: Path) -> None:
    path = tmp_path / "a.npy"
    for thing in (_Evil(), {"t": _Evil()}, [np.float64(3)], {"x": slice(3)}):
        buffer = io.BytesIO()
        np.save(buffer, np.array(thing, object), allow_pickle=True)
        path.write_bytes(buffer.getvalue())
        assert "numpy.savez" in refusal(path)
    path.write_bytes(buffer.getvalue()[:128] + pickle.dumps({"a": 1}))
    assert "columns" in refusal(path)


def test_recordings_of_an_archive(tmp_path: Path) -> None:
    first, second = scene(30, 1), scene(50, 2)
    path = tmp_path / "a.npz"
    both = {n: np.concatenate([getattr(first, n), getattr(second, n)]) for n in "txyp"}
    np.savez(path, **both, offsets=[0, 30, 80], label=[3, 4])  # type: ignore[arg-type]
    same(open_chunks(path, 7).read(), first)
    same(read(path, recording=1), second)
    assert "it holds 2" in refusal(path, recording=2)
    assert "number 0" in refusal(write(tmp_path, "es", first), recording=1)


@pytest.mark.parametrize(("format", "wrap"), [("evt2", 34), ("evt3", 24), ("dat", 32)])
def test_clocks_that_wrap(tmp_path: Path, format: str, wrap: int) -> None:
    t = (1 << wrap) * 3 - 200 + np.arange(40) * 10 - 2 * (1 << wrap)
    t = np.concatenate([t, t + (1 << wrap), t + 2 * (1 << wrap)])  # passes the wrap three times
    t = np.unique(np.concatenate([t, np.arange(t[0], t[-1], (1 << wrap) // 5)]))
    stream = EventStream(t, t % 40, t % 30, t % 2, writers.SIZE)
    path = write(tmp_path, format, stream)
    shift = -(int(t[0]) >> wrap << wrap)  # what came before the file is not in it
    for chunk in (3, 1000):
        same(open_chunks(path, chunk).read(), stream, shift)


def test_a_missing_package_is_named(tmp_path: Path) -> None:
    for name, magic in (("a.h5", b"\x89HDF\r\n\x1a\n"), ("a.aedat4", b"#!AER-DAT4.0\r\n")):
        path = tmp_path / name
        path.write_bytes(magic)
        code = (
            "import sys; sys.modules.update(h5py=None, aedat=None)\n"
            f"from msd.cli import main; main(['events', {str(path)!r}])"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert done.returncode == 2 and "msd-decoding[events]" in done.stderr and done.stderr.count("\n") == 1


FACTS = {  # file: events, first and last time (µs), sensor; other readers agree (recipes/events/README.md)
    "eventgpt_sample1.npy": (132_268, 0, 49_595, (640, 480)),
    "evt2_sample.raw": (539_481, 1_317_888, 1_367_888, (640, 480)),
    "evt3_sample.raw": (219_596, 11_718_656, 11_727_457, (1280, 720)),
    "dvs.es": (473_225, 0, 999_000, (320, 240)),
    "sample.aedat4": (111_954, 1_605_537_493_718_345, 1_605_537_494_308_262, (320, 240)),
    "sample_ncars.dat": (2_009, 0, 99_952, (78, 42)),
    "sample_nmnist.bin": (4_325, 654, 311_175, (34, 34)),
    "nmnist_200.npz": (4_681, 893, 305_924, (34, 34)),
    "sample.csv": (100, 0, 99, (100, 100)),
}


@pytest.mark.parametrize("name", FACTS)
def test_recordings_of_real_cameras(name: str) -> None:
    if not SHARED.exists():
        pytest.skip("no ../shared/data/events")
    if name.endswith(".aedat4"):
        pytest.importorskip("aedat")
    stream = read(SHARED / name)
    assert (len(stream), *stream.span, stream.size) == FACTS[name]
