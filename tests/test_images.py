"""`load_image` turns every accepted source into upright 8-bit RGB, and refuses others in one clear line."""

import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from msd.errors import UserError
from msd.inputs.images import MAX_BYTES, load_image

FORMATS = ["JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM"]


def noise(height: int = 40, width: int = 60, channels: int = 3) -> np.ndarray:
    values = np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)
    return values[:, :, 0] if channels == 1 else values


def encoded(image: Image.Image, format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def png_header(width: int, height: int) -> bytes:
    """Returns a PNG with this size in its header and ten bytes of pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 10)) + chunk(b"IEND", b"")
    )


def refusal(source: object) -> str:
    """Returns the one line of the error for a source."""
    with pytest.raises(UserError) as caught:
        load_image(source)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_every_kind_of_source_gives_the_same_pixels(tmp_path: Path) -> None:
    pixels = noise()
    data = encoded(Image.fromarray(pixels), "PNG")
    path = tmp_path / "x.png"
    path.write_bytes(data)
    for source in (path, str(path), data, bytearray(data), io.BytesIO(data), Image.fromarray(pixels), pixels):
        image = load_image(source)
        assert image.mode == "RGB"
        np.testing.assert_array_equal(np.asarray(image), pixels)


@pytest.mark.parametrize("format", FORMATS)
def test_common_formats_are_read(format: str) -> None:
    image = load_image(encoded(Image.fromarray(noise()), format))
    assert (image.mode, image.size) == ("RGB", (60, 40))


@pytest.mark.parametrize("format", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(format: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(Image.fromarray(noise()), format, exif=exif)
    wanted = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    np.testing.assert_array_equal(np.asarray(load_image(data)), np.asarray(wanted))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "P"])
def test_transparent_pixels_become_white(mode: str) -> None:
    image = Image.new(mode, (4, 4))
    source = encoded(image, "PNG", transparency=0) if mode == "P" else image
    assert np.asarray(load_image(source)).min() == 255


def test_half_transparent_black_becomes_grey() -> None:
    assert load_image(Image.new("RGBA", (2, 2), (0, 0, 0, 128))).getpixel((0, 0)) == (127, 127, 127)


def test_cmyk_jpeg_keeps_its_colours() -> None:
    data = encoded(Image.new("RGB", (16, 16), (200, 30, 60)).convert("CMYK"), "JPEG")
    np.testing.assert_allclose(load_image(data).getpixel((8, 8)), (200, 30, 60), atol=6)


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_sixteen_bit_grey_uses_the_full_range(format: str) -> None:
    grey = noise(channels=1)
    image = load_image(encoded(Image.fromarray(grey.astype(np.uint16) * 257), format))
    np.testing.assert_array_equal(np.asarray(image)[:, :, 0], grey)


@pytest.mark.parametrize("format", ["GIF", "WEBP", "TIFF", "PNG"])
def test_the_first_picture_of_several_is_used(format: str) -> None:
    red, blue = Image.new("RGB", (16, 16), "red"), Image.new("RGB", (16, 16), "blue")
    image = load_image(encoded(red, format, save_all=True, append_images=[blue]))
    np.testing.assert_allclose(image.getpixel((8, 8)), (255, 0, 0), atol=8)


@pytest.mark.parametrize(
    ("array", "value"),
    [
        (np.ones((3, 5), bool), 255),
        (np.full((3, 5, 1), 7, np.uint8), 7),
        (np.full((3, 5, 3), 65535, np.uint16), 255),
        (np.full((3, 5), 0.5, np.float64), 128),
        (np.ones((3, 5, 4), np.float16), 255),
    ],
)
def test_arrays_of_each_type(array: np.ndarray, value: int) -> None:
    image = load_image(array)
    assert image.size == (5, 3)
    assert np.asarray(image).min() == np.asarray(image).max() == value


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((0, 5, 3), np.uint8),
        np.zeros((3, 5, 7), np.uint8),
        np.zeros(5, np.uint8),
        np.zeros((2, 2, 2, 3), np.uint8),
        np.zeros((5, 5, 3), np.int64),
        np.zeros((5, 5), object),
        np.full((5, 5, 3), 2.0),
        np.full((5, 5), -0.1),
        np.full((5, 5), np.nan),
        np.zeros((7000, 7000), np.uint8),
    ],
)
def test_other_arrays_are_refused(array: np.ndarray) -> None:
    assert "x".join(map(str, array.shape)) in refusal(array)


def test_the_result_shares_nothing_with_the_source() -> None:
    source = Image.fromarray(noise())
    load_image(source).paste("red", (0, 0, 60, 40))
    np.testing.assert_array_equal(np.asarray(source), noise())


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("http://host/a.jpg", "fetching is off"),
        ("https:\\\\host\\a.jpg", "fetching is off"),
        ("file://host/a.jpg", "fetching is off"),
        ("file:///no/such.jpg", "there is no file"),
        ("data:image/png;base64,AAAA", "not a readable image"),
        ("data:image/png;base64,A", "no data URI"),
        ("data:image/png", "no data URI"),
        ("", "empty"),
        ("no-such-file.jpg", "'no-such-file.jpg'"),
        ("a\0b.jpg", "cannot read"),
        ("x" * 5000, "cannot read"),
        (b"", "0 bytes"),
        (b"hello " * 50, "not a readable image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not a readable image"),
        (b"\xff" * (MAX_BYTES + 1), "20 MB"),
        (io.StringIO("text"), "'rb'"),
        (7, "int"),
        (None, "NoneType"),
        (Image.new("RGB", (0, 0)), "0x0"),
        (png_header(0, 0), "not a readable image"),
        (png_header(8000, 8000), "8000x8000"),
        (png_header(20000, 20000), "too many pixels"),
        (png_header(2**31 - 1, 2**31 - 1), "too many pixels"),
        (png_header(50, 50), "broken or truncated"),
    ],
)
def test_invalid_sources_are_refused_in_one_line(source: object, said: str) -> None:
    assert said in refusal(source)


def test_files_that_are_no_image_are_refused_by_name(tmp_path: Path) -> None:
    text = tmp_path / "text.jpg"
    text.write_text("not a picture")
    pipe = tmp_path / "pipe.jpg"
    os.mkfifo(pipe)
    huge = tmp_path / "huge.jpg"
    with huge.open("wb") as file:
        file.truncate(MAX_BYTES + 1)
    for path in (text, pipe, huge, tmp_path):
        assert str(path)[:100] in refusal(path)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("format", [*FORMATS, "JPEG2000"])
def test_truncated_files_are_refused(format: str) -> None:
    data = encoded(Image.fromarray(noise()), format)
    for length in range(0, len(data) * 9 // 10, max(1, len(data) // 40)):
        refusal(data[:length])


@pytest.mark.filterwarnings("error")
@settings(deadline=None, max_examples=200)
@given(
    format=st.sampled_from(FORMATS),
    changes=st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), min_size=1, max_size=8),
)
def test_damaged_files_raise_only_user_errors(format: str, changes: list[tuple[int, int]]) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    options = {"exif": exif} if format in ("JPEG", "PNG", "TIFF", "WEBP") else {}
    data = bytearray(encoded(Image.fromarray(noise()), format, **options))
    for position, value in changes:
        data[position] = value
    try:
        image = load_image(bytes(data))
    except UserError:
        return
    assert image.mode == "RGB"
