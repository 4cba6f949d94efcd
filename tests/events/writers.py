"""Writes files of every event format, event by event in plain Python, as reference for the readers."""

from __future__ import annotations

import io
import pickle
import struct
from pathlib import Path
from typing import Any

import numpy as np

from msd.events import EventStream

SIZE = (48, 34)


def scene(count: int = 500, seed: int = 0, size: tuple[int, int] = SIZE, step: int = 300) -> EventStream:
    """Returns random events up to `step` µs apart, some at the same time, some in corners of the sensor."""
    draw = np.random.default_rng(seed)
    t = np.cumsum(draw.choice([0, 1, 5, step], count))
    x, y = draw.integers(0, size[0], count), draw.integers(0, size[1], count)
    if count > 1:
        x[:2], y[:2] = (0, size[0] - 1), (0, size[1] - 1)
    return EventStream(t, x, y, draw.integers(0, 2, count), size)


def rows(stream: EventStream) -> list[tuple[int, int, int, int]]:
    return [tuple(map(int, row)) for row in zip(stream.t, stream.x, stream.y, stream.p, strict=True)]  # type: ignore[misc]


def arrays(stream: EventStream) -> dict[str, np.ndarray]:
    return {"x": stream.x, "y": stream.y, "t": stream.t, "p": stream.p}


def evt2(stream: EventStream) -> bytes:
    data, high = f"% evt 2.0\n% geometry {SIZE[0]}x{SIZE[1]}\n% end\n".encode(), None
    for t, x, y, p in rows(stream):
        if t >> 6 != high:
            high = t >> 6
            data += struct.pack("<I", 8 << 28 | high % (1 << 28))
        data += struct.pack("<I", p << 28 | (t & 63) << 22 | x << 11 | y)
        data += struct.pack("<I", 0xA << 28)  # a trigger, to be passed over
    return data


def evt3(stream: EventStream) -> bytes:
    """Writes runs of events with the same time, row and polarity as vectors, all others one by one."""
    words: list[int] = []
    all_rows = rows(stream)
    high = low = row = None
    i = 0
    while i < len(all_rows):
        t, x, y, p = all_rows[i]
        if t >> 12 != high:
            high, low = t >> 12, 0
            words += [8 << 12 | high % 4096, 7 << 12]
        if t & 4095 != low:
            low = t & 4095
            words += [6 << 12 | low]
        if y != row:
            row = y
            words += [y]
        n = 1
        while i + n < len(all_rows) and n < 20 and all_rows[i + n] == (t, x + n, y, p):
            n += 1
        if n == 1:
            words += [2 << 12 | p << 11 | x]
        else:
            words += [3 << 12 | p << 11 | x, 4 << 12 | (1 << min(n, 12)) - 1]
            if n > 12:
                words += [5 << 12 | (1 << n - 12) - 1]
        i += n
    header = f"% camera_integrator_name X\n% format EVT3;height={SIZE[1]};width={SIZE[0]}\n% end\n".encode()
    return header + b"".join(struct.pack("<H", word) for word in words)


def dat(stream: EventStream) -> bytes:
    data = (
        f"% Data file containing CD events.\n% Version 2\n% Height {SIZE[1]}\n% Width {SIZE[0]}\n".encode()
        + b"\x0c\x08"
    )
    for t, x, y, p in rows(stream):
        data += struct.pack("<II", t % (1 << 32), p << 28 | y << 14 | x)
    return data


def es(stream: EventStream) -> bytes:
    data, last = bytearray(b"Event Stream\x02\x00\x00\x01" + struct.pack("<HH", *SIZE)), 0
    for t, x, y, p in rows(stream):
        wait, last = t - last, t
        data += b"\xff" * (wait // 127) + b"\xfe" * (x == 7)
        data += struct.pack("<BHH", (wait % 127) << 1 | p, x, SIZE[1] - 1 - y)
    return bytes(data)


def nmnist(stream: EventStream) -> bytes:
    data, clock = b"", 0
    for t, x, y, p in rows(stream):
        while t - clock >= 1 << 23:
            clock += 1 << 13
            data += bytes([0, 240, 0, 0, 0])
        data += bytes([x, y, p << 7 | (t - clock) >> 16, (t - clock) >> 8 & 255, (t - clock) & 255])
    return data


def csv(stream: EventStream) -> bytes:
    lines = [
        f"%geometry:{SIZE[0]},{SIZE[1]}",
        "x,y,polarity,timestamp",
        *(f"{x},{y},{p},{t}" for t, x, y, p in rows(stream)),
    ]
    return ("\n".join(lines) + "\n").encode()


def seconds(stream: EventStream) -> bytes:
    """The format of the Event Camera Dataset: t in seconds, x, y, p, without names."""
    return "".join(f"{t / 1e6:.6f} {x} {y} {p}\n" for t, x, y, p in rows(stream)).encode()


def npy_dict(stream: EventStream) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.array(arrays(stream), object), allow_pickle=True)
    return buffer.getvalue()


def npy_list(stream: EventStream, protocol: int = 3) -> bytes:
    """A dict in a list in an array, with the pickle protocol of older numpy versions."""
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": "|O", "fortran_order": False, "shape": ()})
    pickle.dump([arrays(stream)], buffer, protocol=protocol)
    return buffer.getvalue()


def npy_table(stream: EventStream) -> bytes:
    table = np.zeros(len(stream), [("t", "<i8"), ("x", "<u2"), ("y", "<u2"), ("p", "?")])
    for name in "txyp":
        table[name] = getattr(stream, name)
    buffer = io.BytesIO()
    np.save(buffer, table)
    return buffer.getvalue()


def npz(stream: EventStream) -> bytes:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, size=np.array(SIZE), **arrays(stream))  # type: ignore[arg-type]
    return buffer.getvalue()


def hdf5(stream: EventStream) -> bytes:
    """DSEC's layout, with an offset of one second."""
    import h5py

    buffer = io.BytesIO()
    with h5py.File(buffer, "w") as root:
        for name, values in arrays(stream).items():
            root[f"events/{name}"] = values
        root["t_offset"] = np.int64(1_000_000)
        root["ms_to_idx"] = np.zeros(1, np.uint64)
    return buffer.getvalue()


def aedat4(stream: EventStream, packet: int = 100) -> bytes:
    """Uncompressed packets; the FlatBuffers tables are laid out by hand."""
    about = (
        '<dv version="2.0"><node name="outInfo" path="/"><node name="0" path="/0/">'
        '<attr key="compression" type="string">NONE</attr><attr key="typeIdentifier" type="string">EVTS</attr>'
        '<node name="info" path="/0/info/">'
        f'<attr key="sizeX" type="int">{SIZE[0]}</attr><attr key="sizeY" type="int">{SIZE[1]}</attr>'
        "</node></node></node></dv>"
    ).encode()
    # root and identifier, vtable (compression, data table position, info), the table itself, the text
    vtable = struct.pack("<HHHHH", 10, 20, 16, 8, 4)
    table = struct.pack("<iIqi", 10, 16, -1, 0)  # offset back to the vtable, text, position, compression
    header = struct.pack("<I4s6x", 24, b"IOHE") + vtable + table
    header += struct.pack("<I", len(about)) + about + b"\0"
    data = b"#!AER-DAT4.0\r\n" + struct.pack("<I", len(header)) + header
    all_rows = rows(stream)
    for start in range(0, len(all_rows), packet):
        events = all_rows[start : start + packet]
        body = b"".join(struct.pack("<qhhBxxx", t, x, y, p) for t, x, y, p in events)
        # size prefix, root, identifier, vtable (1 field), table, vector
        inner = struct.pack("<I4sHHHxx", 16, b"EVTS", 6, 8, 4)
        inner += struct.pack("<iI", 8, 8) + b"\0\0\0\0" + struct.pack("<I", len(events)) + body
        data += struct.pack("<iI", 0, len(inner) + 4) + struct.pack("<I", len(inner)) + inner
    return data


FORMATS: dict[str, tuple[str, Any]] = {
    "evt2": ("a.raw", evt2),
    "evt3": ("a.raw", evt3),
    "dat": ("a.dat", dat),
    "es": ("a.es", es),
    "nmnist": ("a.bin", nmnist),
    "csv": ("a.csv", csv),
    "seconds": ("a.txt", seconds),
    "npy dict": ("a.npy", npy_dict),
    "npy list": ("a.npy", npy_list),
    "npy table": ("a.npy", npy_table),
    "npz": ("a.npz", npz),
    "hdf5": ("a.h5", hdf5),
    "aedat4": ("a.aedat4", aedat4),
}
NEEDS = {"hdf5": "h5py", "aedat4": "aedat"}


def write(folder: Path, format: str, stream: EventStream) -> Path:
    """Writes a file of that format in `folder`."""
    name, writer = FORMATS[format]
    path = folder / name
    path.write_bytes(writer(stream))
    return path
