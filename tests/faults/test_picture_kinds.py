"""Pictures of every kind keep their content: transparency at each depth, and every form of source."""

from __future__ import annotations

import base64
import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from msd.errors import UserError
from msd.inputs.images import load_image

GREY, COLOUR, PALETTE, GREY_ALPHA, COLOUR_ALPHA = 0, 2, 3, 4, 6  # PNG colour types
WHITE = 255


def png(depth: int, kind: int, samples: list[int], key: bytes = b"", palette: bytes = b"") -> bytes:
    """A PNG of one row."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    width = len(samples) // {GREY: 1, COLOUR: 3, PALETTE: 1, GREY_ALPHA: 2, COLOUR_ALPHA: 4}[kind]
    bits = "".join(f"{sample:0{depth}b}" for sample in samples)
    bits += "0" * (-len(bits) % 8)
    row = bytes(int(bits[i : i + 8], 2) for i in range(0, len(bits), 8))
    header = struct.pack(">IIBBBBB", width, 1, depth, kind, 0, 0, 0)
    chunks = [(b"IHDR", header), *([(b"PLTE", palette)] if palette else []), *([(b"tRNS", key)] if key else [])]
    chunks += [(b"IDAT", zlib.compress(b"\0" + row)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(name, data) for name, data in chunks)


def pixels(source: Any) -> list[Any]:
    image = load_image(source)
    assert image.mode == "RGB"
    return np.asarray(image)[0].tolist()


@pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
def test_a_transparent_grey_of_every_depth_is_white(depth: int) -> None:
    top = (1 << depth) - 1
    for key in {0, 1, top // 2, top - 1}:
        samples = sorted({0, 1, top // 2, top - 1, top})
        found = pixels(png(depth, GREY, samples, struct.pack(">H", key)))
        for sample, (red, green, blue) in zip(samples, found, strict=True):
            assert red == green == blue
            assert red == (WHITE if sample == key else pytest.approx(255 * sample / top, abs=1))


@pytest.mark.parametrize("depth", [8, 16])
def test_a_transparent_colour_is_white(depth: int) -> None:
    scale = 257 if depth == 16 else 1
    colours = [(10, 20, 30), (200, 0, 7), (10, 20, 31)]
    samples = [value * scale for colour in colours for value in colour]
    key = struct.pack(">3H", *(value * scale for value in colours[0]))
    assert pixels(png(depth, COLOUR, samples, key)) == [[WHITE] * 3, *map(list, colours[1:])]


@pytest.mark.parametrize("depth", [8, 16])
def test_alpha_of_grey_and_colour(depth: int) -> None:
    top = (1 << depth) - 1
    assert pixels(png(depth, GREY_ALPHA, [0, 0, 0, top, top, top])) == [[WHITE] * 3, [0] * 3, [WHITE] * 3]
    half = pixels(png(depth, COLOUR_ALPHA, [0, 0, 0, top // 2]))[0]
    assert half == pytest.approx([128] * 3, abs=1)


@pytest.mark.parametrize("depth", [1, 2, 8])
def test_transparent_entries_of_a_palette(depth: int) -> None:
    palette = bytes([1, 2, 3, 9, 9, 9])
    assert pixels(png(depth, PALETTE, [0, 1], bytes([0]), palette)) == [[WHITE] * 3, [9] * 3]
    assert pixels(png(depth, PALETTE, [0, 1], bytes([255, 0]), palette)) == [[1, 2, 3], [WHITE] * 3]


@pytest.mark.parametrize("mode", ["RGBA", "RGBa", "LA", "La", "PA"])
def test_modes_with_transparency(mode: str) -> None:
    assert pixels(Image.new(mode, (2, 2))) == [[WHITE] * 3] * 2


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr", "HSV", "I", "I;16", "F"])
def test_modes_without_transparency_keep_their_colour(mode: str) -> None:
    source = Image.new("RGB", (2, 2), "black")
    if mode in ("I", "I;16", "F"):
        image = Image.fromarray(np.zeros((2, 2), {"I": np.int32, "I;16": np.uint16, "F": np.float32}[mode]))
    else:
        image = source.convert(mode)
    assert np.asarray(load_image(image)).max() <= 3


def test_a_transparent_sixteen_bit_picture_that_is_open_already() -> None:
    data = png(16, GREY, [0, 1000, 65535], struct.pack(">H", 1000))
    image = Image.open(io.BytesIO(data))
    image.load()
    assert pixels(image) == [[0] * 3, [WHITE] * 3, [WHITE] * 3]


def test_a_source_is_not_changed() -> None:
    image = Image.open(io.BytesIO(png(4, GREY, [0, 5, 15], struct.pack(">H", 5))))
    assert pixels(image)[1] == [WHITE] * 3
    assert image.info["transparency"] == 5


@pytest.mark.parametrize("size", [(1, 2000), (2000, 1), (1, 1), (3, 900), (900, 3)])
def test_long_and_small_pictures(size: tuple[int, int]) -> None:
    assert load_image(Image.new("RGB", size)).size == size


def test_every_form_of_source_for_one_file(tmp_path: Path) -> None:
    colour = (10, 200, 30)
    path = tmp_path / "a picture ü.png"
    Image.new("RGB", (2, 1), colour).save(path)
    data = path.read_bytes()
    text = base64.b64encode(data).decode()
    padded = np.zeros((1, 4, 3), np.uint8)
    padded[:, ::2] = colour
    for source in (
        path, str(path), path.as_uri(), f"file://localhost{path.as_uri()[7:]}", f"file://{path}",
        data, bytearray(data), memoryview(data), io.BytesIO(data), path.open("rb"),
        f"data:image/png;base64,{text}", f"DATA:;base64,{text.rstrip('=')}", f"data:;base64,{text[:20]}\n{text[20:]}",
        f"data:image/png;base64,{base64.urlsafe_b64encode(data).decode()}",
        "data:image/png," + "".join(f"%{byte:02x}" for byte in data),
        padded[:, ::2], np.asfortranarray(padded[:, ::2]), padded[:, ::2].astype(">u2") * np.array(257, ">u2"),
        padded[:, ::2] / 255, (padded[:, ::2] / 255).astype(">f4"),
    ):  # fmt: skip
        assert pixels(source) == [list(colour)] * 2


class Unreadable(io.RawIOBase):
    def read(self, size: int = -1) -> bytes:
        raise OSError("gone")


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("http://host/a.png", "fetching is off"),
        ("FILE://host/a.png", "fetching is off"),
        ("data:image/png;base64,!!!!", "no data URI"),
        ("data:image/png;base64,", "0 bytes"),
        ("data:text/plain,hello", "not a readable image"),
        (Unreadable(), "cannot be read"),
        (np.full((2, 2, 3), np.nan), "nan"),
        (np.array([[0.5, np.nan]], np.float32), "nan"),
        (np.array([[0.5, np.inf]]), "inf"),
        (np.zeros((3, 8, 8), np.uint8), "channels last"),
        (np.zeros((8, 8), np.complex64), "complex64"),
        (Image.fromarray(np.array([[np.nan]], np.float32)), "nan"),
    ],
)
def test_invalid_sources_are_refused(source: Any, said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        load_image(source)
    assert "\n" not in str(caught.value)


def test_a_closed_file() -> None:
    file = io.BytesIO(b"x")
    file.close()
    with pytest.raises(UserError, match="cannot be read"):
        load_image(file)
