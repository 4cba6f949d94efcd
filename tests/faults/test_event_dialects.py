"""Event files of other programs: text of spreadsheets, pandas and numpy; HDF5 and numpy arrays of every type."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from msd.errors import UserError
from msd.events import open_chunks, read

T = (0, 1_500_000, 1_500_007, 2_000_000)
X, Y, P = (3, 0, 7, 5), (1, 2, 0, 9), (1, 0, 0, 1)
ROWS = list(zip(T, X, Y, P, strict=True))


def lines(form: str, rows: Any = ROWS, end: str = "\n", head: str = "") -> str:
    written = [
        form.format(t=t, x=x, y=y, p=p, s=t / 1e6, b=bool(p), m=2 * p - 1, i=i) for i, (t, x, y, p) in enumerate(rows)
    ]
    return head + end.join(written) + end


def numbered(path: Path) -> list[tuple[int, ...]]:
    """Returns the events of a file after checking that they are the same for every chunk size."""
    stream = read(path)
    for chunk in (1, 3):
        parts = [
            [tuple(map(int, row)) for row in zip(s.t, s.x, s.y, s.p, strict=True)] for s in open_chunks(path, chunk)
        ]
        found = [row for part in parts for row in part]
        assert found == [tuple(map(int, row)) for row in zip(stream.t, stream.x, stream.y, stream.p, strict=True)]
    return found


def comma(text: str) -> str:
    return text.replace(".", ",")


TEXTS: dict[str, str | bytes] = {
    "plain": lines("{t},{x},{y},{p}"),
    "prophesee": lines("{x},{y},{p},{t}"),
    "windows": lines("{t},{x},{y},{p}", end="\r\n"),
    "blank lines": "\n\n" + lines("{t},{x},{y},{p}", end="\n\n") + "\n \n",
    "no end": lines("{t} {x} {y} {p}").rstrip(),
    "blanks around": lines("  {t} ,  {x} , {y} ,{p} "),
    "separator at the end": lines("{t},{x},{y},{p},", head="t,x,y,p,\n"),
    "separator at the end, no names": lines("{t},{x},{y},{p},"),
    "mark of bytes": lines("{t},{x},{y},{p}", head="\ufefft,x,y,p\n"),
    "mark of bytes, no names": "\ufeff" + lines("{t},{x},{y},{p}"),
    "excel unicode": lines("{t}\t{x}\t{y}\t{p}", head="t\tx\ty\tp\n", end="\r\n").encode("utf-16"),
    "excel german": comma(lines("{s:.6f};{x};{y};{p}", head="Zeit;x;y;p\n").replace("Zeit", "t [s]")),
    "excel truth": lines("{t};{x};{y};{b}", head="t;x;y;p\n").upper(),
    "excel sep": lines("{t};{x};{y};{p}", head="sep=;\nx;t;y;p\n").replace("x;t;y;p", "t;x;y;p"),
    "decimal commas and tabs": comma(lines("{s:.6f}\t{x}\t{y}\t{p}")),
    "decimal commas and blanks": comma(lines("{s:.6f} {x} {y} {p}")),
    "quoted": lines('"{t}","{x}","{y}","{p}"', head='"t","x","y","p"\n'),
    "quoted names": lines("{t},{x},{y},{p}", head='"Timestamp","X","Y","Polarity"\n'),
    "pandas": lines("{i},{t},{x},{y},{p}", head=",t,x,y,p\n"),
    "pandas named": lines("{i},{t},{x},{y},{p}", head="Unnamed: 0,t,x,y,p\n"),
    "pandas truth": lines("{t},{x},{y},{b}", head="t,x,y,p\n"),
    "truth without names": lines("{t},{x},{y},{b}"),
    "pandas printed": lines("{i}  {t}  {x}  {y}  {p}", head="         t  x  y  p\n"),
    "pandas seconds": lines("{s},{x},{y},{p}", head="t,x,y,p\n"),
    "pandas floats": lines("{t}.0,{x}.0,{y}.0,{p}.0", head="t_us,x,y,p\n"),
    "numpy": lines("{t:.18e} {x:.18e} {y:.18e} {p:.18e}"),
    "numpy seconds": lines("{s:.18e} {x:.18e} {y:.18e} {p:.18e}"),
    "numpy header": lines("{x} {y} {t} {p}", head="# x y t p\n"),
    "numpy header of commas": lines("{p},{t},{y},{x}", head="# p,t,y,x\n"),
    "numpy header of units": lines("{x} {y} {s:.6f} {p}", head="# x y t(s) p\n"),
    "scientific": lines("{t:e},{x},{y},{p}", [(t // 1000 * 1000, *r) for t, *r in ROWS], head="t,x,y,p\n"),
    "zero without a point": lines("{s},{x},{y},{p}").replace("0.0,", "0,", 1),
    "zeros without a point": "0,1,1,1\n" * 3 + "0.000012,1,1,0\n",
    "signs": lines("{t} {x} {y} {m:+d}"),
    "other order": lines("{p},{y},{x},{t}", head="pol,y,x,ts\n"),
    "more columns": lines("{i},a,{t},{x},{y},{p},b", head="n,name,t,x,y,p,camera\n"),
    "empty column": lines("{t},{x},,{y},{p}", head="t,x,,y,p\n"),
}  # fmt: skip
WANTED = {
    "scientific": [(t // 1000 * 1000, *r) for t, *r in ROWS],
    "zeros without a point": [(0, 1, 1, 1)] * 3 + [(12, 1, 1, 0)],
}


@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize("suffix", ["csv", "txt"])
def test_dialects_of_text(tmp_path: Path, name: str, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    text = TEXTS[name]
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    assert numbered(path) == WANTED.get(name, ROWS)


@pytest.mark.parametrize(
    ("names", "scale"),
    [
        *((f"t{name}", 1) for name in (" [us]", " (us)", "_us", "(µs)", " [μs]", " [microseconds]", "[us]", "-us")),
        *((f"timestamp{name}", 1000) for name in (" [ns]", "_ns", " (ns)", "_nsec")),
        *((f"ts{name}", 0.001) for name in (" [ms]", "_ms", "(ms)")),
        *((f"Time{name}", 1e-6) for name in (" [s]", "_s", "(s)", " (seconds)", "_sec")),
        ("times", 1), ("TIMESTAMPS", 1),
    ],
)  # fmt: skip
def test_units_in_names(tmp_path: Path, names: str, scale: float) -> None:
    path = tmp_path / "a.csv"
    times = [t * scale if scale < 1 else t * int(scale) for t in T]
    body = lines("{t},{x},{y},{p}", list(zip(times, X, Y, P, strict=True)), head=f"{names},x [px],y (px),p [0/1]\n")
    path.write_text(body, encoding="utf-8")
    assert numbered(path) == ROWS
    path.write_text(body, encoding="cp1252" if "μ" not in body else "utf-16")
    assert numbered(path) == ROWS


def test_whole_seconds_with_a_unit(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("t_s,x,y,p\n0,1,1,1\n2,1,1,0\n")
    assert numbered(path) == [(0, 1, 1, 1), (2_000_000, 1, 1, 0)]
    path.write_text("t_us,x,y,p\n0.4,1,1,1\n1.6,1,1,0\n")
    assert numbered(path) == [(0, 1, 1, 1), (2, 1, 1, 0)]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("1.0,1,1,1\n2.0,1,1,0\n", "may be seconds or microseconds; name the unit"),
        ("0,5,1,2,1\n1,5,1,2,1\n", "5 columns without names"),
        (lines("{i},{t},{x},{y},{p}"), "5 columns without names"),
        ("t,x,y,p\n0,5,1,2,1\n", "5 columns for 4 names"),
        ("t,x,y,p,t\n1,1,1,1,1\n", "does not name t, x, y and p"),
        ("ticks,x,y,p\n1,1,1,1\n", "does not name t, x, y and p"),
        ("t [ticks],x,y,p\n1,1,1,1\n", "does not name t, x, y and p"),
        ("1,500;1;1;1\n2,000;1;1;1\n", "may have a decimal comma or be in thousands"),
        ("t,x,y,p\n1,,1,1\n", "number 1 to 1 is not made of numbers"),
        ("t,x,y,p\n1,1,1,yes\n", "not made of numbers"),
        ("t,x,y,p\nnan,1,1,1\n", "no number"),
        ("t,x,y,p\n1,1.5,1,1\n", "column x has fractions"),
        ("t,x,y,p\n1,1,1,255\n", "polarity 255"),
        ("0,1,1,1\n" * 1200 + "0.5,1,1,1\n", "have fractions later; name their unit"),
        ("sep=;\n", "no lines"),
        ("\ufeff", "no lines"),
        ("99999999999999999999,1,1,1\n", "a time is no number, or too large"),
    ],
)
def test_ambiguous_and_broken_texts_are_refused(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "a.csv"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError) as caught:
        read(path)
    assert said in str(caught.value) and "\n" not in str(caught.value) and "a.csv" in str(caught.value)


KINDS = {
    "t": ("<i8", ">i8", "<u8", ">u8", "<i4", "<u4", ">u4", "<f8"),
    "x": ("<i2", ">i2", "<u2", ">u2", "u1", "i1", "<i4", "<i8", "<u8", "<f4", "<f8"),
    "p": ("?", "u1", "i1", ">i2", "<i8", "<u8", "<f4"),
}
SHAPES: dict[str, Callable[[Any], Any]] = {
    "[N]": lambda a: a, "[N, 1]": lambda a: a[:, None], "[1, N]": lambda a: a[None],
    "[1, 1, N]": lambda a: a[None, None],
}  # fmt: skip


def columns(kind: dict[str, str], shape: str = "[N]", count: int = 4) -> dict[str, Any]:
    """Returns arrays of the given types with the first `count` events."""
    kinds = {"t": "<i8", "x": "<i8", "p": "<i8", **kind}
    table = {"t": (T, kinds["t"]), "x": (X, kinds["x"]), "y": (Y, kinds["x"]), "p": (P, kinds["p"])}
    return {name: SHAPES[shape](np.array(v[:count], np.dtype(k))) for name, (v, k) in table.items()}


def write(path: Path, table: dict[str, Any], offset: Any = None) -> Path:
    """Writes HDF5, `.npz` or `.npy`, depending on the suffix."""
    if path.suffix == ".h5":
        h5py = pytest.importorskip("h5py")
        with h5py.File(path, "w") as root:
            for name, values in table.items():
                root[f"events/{name}"] = values
            if offset is not None:
                root["t_offset"] = offset
    elif path.suffix == ".npz":
        np.savez(path, **table)
    else:
        np.save(path, np.array(table, object), allow_pickle=True)
    return path


@pytest.mark.parametrize("suffix", [".h5", ".npz", ".npy"])
@pytest.mark.parametrize(("column", "kind"), [(c, k) for c, kinds in KINDS.items() for k in kinds])
def test_numbers_of_every_type(tmp_path: Path, suffix: str, column: str, kind: str) -> None:
    assert numbered(write(tmp_path / f"a{suffix}", columns({column: kind}))) == ROWS


@pytest.mark.parametrize("suffix", [".h5", ".npz", ".npy"])
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(tmp_path: Path, suffix: str, shape: str) -> None:
    assert numbered(write(tmp_path / f"a{suffix}", columns({}, shape))) == ROWS
    assert numbered(write(tmp_path / f"b{suffix}", columns({}, shape, 1))) == ROWS[:1]


@pytest.mark.parametrize("suffix", [".h5", ".npz"])
def test_one_event_as_scalars(tmp_path: Path, suffix: str) -> None:
    assert numbered(write(tmp_path / f"a{suffix}", {n: v[0] for n, v in columns({}).items()})) == ROWS[:1]


@pytest.mark.parametrize("kind", ["<i8", "<u8", "<u4", ">i8"])
@pytest.mark.parametrize(
    "offset",
    [
        7,
        np.int64(7),
        np.uint64(7),
        np.uint32(7),
        np.array([7]),
        np.array([[7]], ">i4"),
        np.float64(7),
        np.array([7], "u8"),
    ],
    ids=repr,
)
def test_offsets_of_time(tmp_path: Path, kind: str, offset: Any) -> None:
    path = write(tmp_path / "a.h5", columns({"t": kind}), offset)
    assert numbered(path) == [(t + 7, *row) for t, *row in ROWS]


def test_an_offset_of_many_digits(tmp_path: Path) -> None:
    """A 64-bit float would lose the last digits."""
    base = (1 << 62) + 1
    path = write(tmp_path / "a.h5", columns({"t": "<u8"}), np.uint64(base))
    assert numbered(path) == [(t + base, *row) for t, *row in ROWS]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("suffix", [".h5", ".npz"])
def test_half_precision_is_read_without_a_warning(tmp_path: Path, suffix: str) -> None:
    assert numbered(write(tmp_path / f"a{suffix}", columns({"x": "<f2", "p": "<f2"}))) == ROWS


def test_polarities_of_minus_one(tmp_path: Path) -> None:
    table = columns({})
    for suffix in (".h5", ".npz", ".npy"):
        for kind in (np.int8, np.int64, np.float32):
            signs = (2 * table["p"] - 1).astype(kind)
            assert numbered(write(tmp_path / f"a{suffix}", {**table, "p": signs})) == ROWS


def test_structured_arrays(tmp_path: Path) -> None:
    table = np.zeros((4, 1), [("timestamp_ns", ">u8"), ("x", "<i2"), ("y", "u1"), ("polarity", "?")])
    for name, values in zip(table.dtype.names or (), (np.array(T) * 1000, X, Y, P), strict=True):
        table[name] = np.reshape(values, (4, 1))
    np.save(tmp_path / "a.npy", table)
    assert numbered(tmp_path / "a.npy") == ROWS
    h5py = pytest.importorskip("h5py")
    for place in ("events", "camera/left/events"):
        with h5py.File(tmp_path / "a.h5", "w") as root:
            root.create_dataset(place, data=table[:, 0], compression="gzip")
        assert numbered(tmp_path / "a.h5") == ROWS


def test_groups_of_other_names(tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py")
    path = tmp_path / "a.h5"
    names = {"t": "Timestamp [us]", "x": "X", "y": "Y", "p": "Polarity"}
    with h5py.File(path, "w") as root:
        for name, values in columns({"t": "<u8", "p": "?"}).items():
            root.create_dataset(f"recording/dvs/{names[name]}", data=values, chunks=(2,), compression="lzf")
        root["recording/frames"] = np.zeros((2, 3))
        root["dangling"] = h5py.SoftLink("/no/where")
        root["recording/dvs"].attrs["width"], root["recording/dvs"].attrs["height"] = np.array([48]), np.uint16(34)
    assert numbered(path) == ROWS and open_chunks(path).size == (48, 34)
    with h5py.File(path, "a") as root:
        root.copy("recording", "another")
    with pytest.raises(UserError, match="events in another/dvs, recording/dvs"):
        read(path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"t": np.zeros((2, 2), np.int64)}, "axes|lists of one length|list of numbers"),
        ({"t": np.array(T[:3])}, "lengths|one length"),
        ({"p": np.array([1, 0, 0, 255], np.uint8)}, "polarity 255"),
        ({"t": np.array([0, 1, 2, 1 << 63], np.uint64)}, "below 2\\*\\*63"),
        ({"t": np.array([0, 0.5, 1, 2])}, "column t has fractions"),
        ({"x": np.array([0, 1, 2, np.nan])}, "column x has fractions"),
    ],
)
@pytest.mark.parametrize("suffix", [".h5", ".npz", ".npy"])
def test_arrays_that_are_no_events(tmp_path: Path, suffix: str, change: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        read(write(tmp_path / f"a{suffix}", {**columns({}), **change}))
    assert "\n" not in str(caught.value)
