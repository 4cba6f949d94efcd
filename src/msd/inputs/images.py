"""Loads images (`load_image`), and treats every file as hostile.

Size limits are checked on the header, before any pixel is decoded. Only common raster formats are opened, so no
external program (Ghostscript for EPS) is started. All errors of a decoder become UserErrors.
"""

import io
import os
import re
import warnings
from typing import Any, BinaryIO, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from msd.errors import UserError
from msd.system.files import open_media, shortened

MAX_BYTES = 20 * 1000 * 1000
MAX_PIXELS = 40 * 1000 * 1000
LIMIT = f"{MAX_PIXELS // 10**6} million pixels"
FORMATS = ("JPEG", "MPO", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
ALPHA_MODES = ("RGBA", "RGBa", "LA", "La", "PA")
ORIENTATION_TAG = 0x0112
UPRIGHT = {  # EXIF orientation -> the operation that makes the image upright (EXIF 2.32, section 4.6.4)
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

ImageSource: TypeAlias = str | os.PathLike[str] | bytes | bytearray | memoryview | BinaryIO | Image.Image | np.ndarray


def load_image(source: ImageSource) -> Image.Image:
    """Returns an upright 8-bit RGB image that shares no memory with the source.

    It applies the EXIF orientation, puts transparent images on white, scales 16-bit grey to 8 bits, and uses the first
    picture of animations and multi-page files.

    Args:
        source: a path, a `file:` URL or a `data:` URI; the bytes of a file; a binary file object, read from its current
            position; a PIL image; or an array [H, W], [H, W, 1], [H, W, 3] or [H, W, 4] of bool, uint8, uint16 or
            floats in [0, 1].

    Raises:
        UserError: another type or URL; or the image is empty, broken, or larger than 20 MB or 40 million pixels.
    """
    if isinstance(source, Image.Image):
        return _to_rgb(source, "the PIL image")
    if isinstance(source, np.ndarray):
        return _from_array(source)
    if isinstance(source, str | os.PathLike):
        text = os.fsdecode(source)
        name = "the image given as a data URI" if text[:5].lower() == "data:" else f"'{shortened(text)}'"
        with open_media(source, name, "image") as file:
            data = file.read(MAX_BYTES + 1)
    elif isinstance(source, bytes | bytearray | memoryview):
        name, data = "the image given as bytes", bytes(source[: MAX_BYTES + 1])
    elif hasattr(source, "read"):
        name = "the image given as a file object"
        try:
            data = source.read(MAX_BYTES + 1)
        except (OSError, ValueError) as error:  # ValueError: the file object is closed
            raise UserError(f"{name} cannot be read ({error}); open it in binary mode ('rb')") from error
        if not isinstance(data, bytes):
            raise UserError(f"{name} gives {type(data).__name__}, not bytes; open it in binary mode ('rb')")
    else:
        raise UserError(
            f"cannot load an image from a {type(source).__name__}; give a path, bytes, a binary file object, "
            "a PIL image or a numpy array"
        )
    return _to_rgb(_open(data, name), name)


def _open(data: bytes, name: str) -> Image.Image:
    """Reads the header of an image file; decodes no pixels."""
    if not data:
        raise UserError(f"{name} is empty (0 bytes); give an image file")
    if len(data) > MAX_BYTES:
        raise UserError(f"{name} is larger than {MAX_BYTES // 10**6} MB; compress or resize it")
    Image.init()
    try:
        with warnings.catch_warnings(action="ignore"):  # about large and unusual files; this module checks them itself
            return Image.open(io.BytesIO(data), formats=[name for name in FORMATS if name in Image.OPEN])
    except Image.DecompressionBombError as error:  # beyond PIL's own limit, the size is unknown
        raise UserError(f"{name} has too many pixels; at most {LIMIT}: resize it") from error
    except Exception as error:  # parsers of hostile files raise anything: OSError, SyntaxError, struct.error, KeyError…
        known = "JPEG, PNG, GIF, WebP, BMP, TIFF, PPM, JPEG 2000 or AVIF"
        raise UserError(f"{name} is not a readable image; give a {known} file") from error


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    """Checks the size, decodes, makes upright, and converts to 8-bit RGB on white."""
    _check_size(image.width, image.height, name)
    tiles = getattr(image, "tile", None)  # only files that are not decoded yet have tiles
    layout = str(tiles[0][3]) if tiles else ""
    try:
        with warnings.catch_warnings(action="ignore"):
            image.load()
    except Exception as error:  # as in `_open`
        raise UserError(f"{name} is broken or truncated; save or download it again") from error
    key = _colour_key(image, layout)
    upright = UPRIGHT.get(_orientation(image))
    try:
        if image.mode.startswith(("I", "F")):
            values = np.asarray(image)
            rgb = Image.fromarray(_grey_to_8_bit(values, name)).convert("RGB")
            if isinstance(key, int):
                rgb.paste("white", mask=Image.fromarray(np.where(values == key, 255, 0).astype(np.uint8)))
        elif image.mode in ALPHA_MODES or key is not None:
            if key is not None:
                image = image.copy()
                image.info["transparency"] = key
            rgba = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
            rgb = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
        else:
            rgb = image.convert("RGB")
    except (ValueError, OSError) as error:  # PIL cannot convert LAB, for example
        raise UserError(f"{name} has colour mode {image.mode}, which cannot be converted; save it as RGB") from error
    return rgb.transpose(upright) if upright is not None else rgb


def _colour_key(image: Image.Image, layout: str) -> Any:
    """Returns the transparent colour of an image, as a value of its decoded pixels. layout: PIL's raw mode.

    PIL reports the value as stored in the PNG file, but decodes samples to 8 bits: it scales 2 and 4 bits to the full
    range, and keeps the upper 8 bits of 16-bit colours.
    """
    key = image.info.get("transparency")
    if isinstance(key, int) and (bits := re.fullmatch("L;([24])", layout)):
        return key * 255 // ((1 << int(bits[1])) - 1)
    return tuple(value >> 8 for value in key) if isinstance(key, tuple) and layout == "RGB;16B" else key


def _from_array(array: NDArray[np.generic]) -> Image.Image:
    """Converts an array [H, W] or [H, W, 1 | 3 | 4] to an RGB image."""
    shape = "x".join(map(str, array.shape))
    name = f"the array of shape {shape} and type {array.dtype}"
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (1, 3, 4)):
        raise UserError(f"{name} is not an image; give [height, width] or [height, width, 1, 3 or 4], channels last")
    _check_size(array.shape[1], array.shape[0], name)
    if array.dtype == np.bool_:
        array = array.astype(np.uint8) * 255
    elif array.dtype == np.uint16 or array.dtype == np.dtype(">u2") or np.issubdtype(array.dtype, np.floating):
        array = _grey_to_8_bit(array, name)
    elif array.dtype != np.uint8:
        raise UserError(f"{name} is not an image; give bool, uint8, uint16 or floats in [0, 1]")
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    return _to_rgb(Image.fromarray(np.ascontiguousarray(array)), name)


def _grey_to_8_bit(values: NDArray[np.generic], name: str) -> NDArray[np.uint8]:
    """Scales uint16, int32 in [0, 65535] or floats in [0, 1] of any shape to uint8."""
    top = 1.0 if np.issubdtype(values.dtype, np.floating) else 65535.0
    low, high = values.min(), values.max()
    if not (low >= 0 and high <= top):  # also catches NaN
        raise UserError(f"{name} has values from {low} to {high}; scale them to 0 to {top:g}")
    return np.rint(np.multiply(values, 255.0 / top, dtype=np.float32)).astype(np.uint8)


def _orientation(image: Image.Image) -> int:
    """Returns the EXIF orientation, or 1 (upright) if there is none or the EXIF block is damaged."""
    try:
        return int(image.getexif().get(ORIENTATION_TAG, 1))
    except Exception:  # the pixels were decoded, so an unreadable EXIF block is no error
        return 1


def _check_size(width: int, height: int, name: str) -> None:
    if width < 1 or height < 1:
        raise UserError(f"{name} is {width}x{height} pixels; give an image of at least 1x1")
    if width * height > MAX_PIXELS:
        raise UserError(f"{name} is {width}x{height} pixels; at most {LIMIT}: resize it")
