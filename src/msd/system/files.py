"""Reads and writes files: opens what users name, replaces files atomically, and checks every file it reads.

All errors are UserErrors that name the file and, where given, what to do (`remedy`).
"""

from __future__ import annotations

import base64
import errno
import io
import json
import math
import os
import re
import secrets
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO
from urllib.parse import unquote_to_bytes, urlsplit
from urllib.request import url2pathname

from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open

from msd.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # the disk, the user's quota, or the largest file size is exhausted
PARTIAL = "msd-half-written-"  # prefix of files that are being written
LFS = b"version https://git-lfs.github.com/spec/"
POINTER = "it is a git-lfs pointer, not the file itself; fetch it with 'git lfs pull'"
CHECKPOINT = (  # the files of a checkpoint folder that are read; other copies of its weights are not
    "config.json", "*_config.json", "*.index.json", "tokenizer.json", "*_map.json", "chat_template.json", "*.jinja",
    "*.model", "*.tiktoken", "vocab.*", "merges.txt", "model*.safetensors", "adapter_model.safetensors",
)  # fmt: skip


@contextmanager
def open_regular(source: str | os.PathLike[str], name: str, kind: str) -> Iterator[BinaryIO]:
    """Opens a regular file for reading bytes. name, kind: what messages call the file and its expected content.

    UserError: a URL, no such file, a folder, a device, or not readable.
    """
    text = os.fsdecode(source)
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*:[/\\]{2}|data:", text):
        raise UserError(f"{name} is a URL, and fetching is off; save the {kind} and give its path")
    if not text:
        raise UserError(f"the path of the {kind} is empty; give the path of one")
    try:
        path = Path(text)
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode):
            found = "a folder" if stat.S_ISDIR(mode) else "not a regular file"
            raise UserError(f"{name} is {found}; give the path of a file")
        file = path.open("rb")
    except FileNotFoundError as error:
        raise UserError(f"there is no file {name}; check the path") from error
    except (OSError, ValueError) as error:  # ValueError: a null character in the path
        raise UserError(f"cannot read {name}: {getattr(error, 'strerror', None) or error}; check the path") from error
    with file:
        yield file


@contextmanager
def open_media(source: str | os.PathLike[str], name: str, kind: str) -> Iterator[BinaryIO]:
    """Opens a file as `open_regular` does; also the bytes of a `data:` URI and the file of a `file:` URL."""
    text = os.fsdecode(source)
    if text[:5].lower() == "data:":
        yield io.BytesIO(_data(text, name))
        return
    url = urlsplit(text) if text[:7].lower() == "file://" else None
    local = url2pathname(url.path) if url is not None and url.netloc in ("", "localhost") else text
    with open_regular(local, name, kind) as file:
        yield file


def _data(uri: str, name: str) -> bytes:
    """Returns the bytes of `data:[type][;base64],…` (RFC 2397), with or without padding."""
    head, comma, body = uri.partition(",")
    try:
        if not comma:
            raise ValueError("it has no comma")
        data = unquote_to_bytes(body)
        if not head.lower().rstrip().endswith(";base64"):
            return data
        data = b"".join(data.split()).rstrip(b"=").translate(bytes.maketrans(b"-_", b"+/"))
        return base64.b64decode(data + b"=" * (-len(data) % 4), validate=True)
    except ValueError as error:  # binascii.Error is one
        raise UserError(f"{name} is no data URI ({error}); give data:TYPE;base64,… or a path") from error


def named_in(folder: Path, name: str) -> Path:
    """Returns the path of a file in `folder` whose name comes from UTF-8 text, in any locale."""
    try:
        return folder / os.fsdecode(name.encode())
    except UnicodeEncodeError:  # an unpaired surrogate: no file has such a name
        return folder / name


def as_text(path: str | os.PathLike[str]) -> str:
    """Returns a path, or an argument of the command line, as UTF-8 text; `named_in` is the inverse."""
    return os.fsencode(path).decode("utf-8", "surrogateescape")


def shortened(text: str) -> str:
    """Returns text for a message: at most 120 characters, control characters replaced."""
    text = "".join(c if c.isprintable() else "?" for c in text)
    return text if len(text) <= 120 else f"{text[:117]}…"


def write_whole(path: Path | str, content: str | bytes | Callable[[Path], object], before: Path | None = None) -> None:
    """Writes a file atomically: to a temporary file in the same folder, which then replaces the file.

    content: text (as UTF-8), bytes, or a function that writes the file whose path it gets. before: path in the same
    folder that the old file is moved to. A link is followed; a device or pipe is written to directly. If writing fails,
    UserError; the old file is unchanged and nothing else remains.
    """
    path = Path(path)
    with _write_errors(path):
        place = Path(os.path.realpath(path))
        if place.exists() and not place.is_file():
            if place.is_dir():
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
            _put(content, place)
            return
        if place.exists() and not os.access(place, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        partial = place.with_name(f"{PARTIAL}{secrets.token_hex(8)}")
        try:
            _put(content, partial)
            with partial.open("rb+") as file:
                os.fsync(file.fileno())
            if place.exists():
                shutil.copymode(place, partial)
                if before is not None:
                    place.replace(before)
            partial.replace(place)
        finally:
            partial.unlink(missing_ok=True)


def _put(content: str | bytes | Callable[[Path], object], place: Path) -> None:
    if callable(content):
        content(place)
    else:
        place.write_bytes(content.encode() if isinstance(content, str) else content)


def make_folder(folder: Path) -> None:
    """Creates a folder and its missing parents. UserError if that fails."""
    with _write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)


def append(path: Path, text: str) -> None:
    """Appends text to a file. UserError if that fails."""
    with _write_errors(path), path.open("a", encoding="utf-8") as file:
        file.write(text)


def remove_leftovers(folder: Path) -> None:
    """Removes the temporary files of killed processes from a folder. The caller must hold its lock (`exclusive`)."""
    for leftover in folder.glob(f"{PARTIAL}*"):
        leftover.unlink(missing_ok=True)


def check_place(path: Path, folder: bool = False) -> None:
    """Raises UserError if a later write to the file `path` (`folder`: to files in the folder `path`) would fail.

    It creates nothing; missing folders are no error.
    """
    with _write_errors(path):
        if not folder and path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if not folder and path.exists() and not os.access(path, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        if not folder and path.exists() and not path.is_file():
            return
        there = Path(os.path.realpath(path if folder else path.parent))
        while not there.exists() and there != there.parent:
            there = there.parent
        with tempfile.TemporaryFile(dir=there) as file:  # permissions do not show that a disk is full or read-only
            file.write(bytes(4096))
            file.flush()


@contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Holds the lock of `path`, a file or folder, while the block writes to it. Its parent folder must exist.

    UserError if another process holds the lock.
    """
    lock = FileLock(path / ".lock" if path.is_dir() else path.with_name(f"{path.name}.lock"), timeout=0)
    with _write_errors(path):
        try:
            lock.acquire()
        except Timeout as error:
            raise UserError(
                f"another process is writing to '{path}'; wait until it ends, or choose another place"
            ) from error
        except NotImplementedError:  # a file system without locks
            pass
    try:
        yield
    finally:
        Path(lock.lock_file).unlink(missing_ok=True)  # before the release: a waiting process notices the removal
        lock.release()


@contextmanager
def _write_errors(path: Path) -> Iterator[None]:
    """Turns errors of writing to `path` into UserErrors."""
    try:
        yield
    except OSError as error:
        remedy = "free some space, or choose another place" if error.errno in FULL else "choose another place"
        raise UserError(f"cannot write '{path}': {error.strerror or error}; {remedy}") from error
    except ValueError as error:  # a null character in the path
        raise UserError(f"cannot write '{shortened(str(path))}': {error}; choose another place") from error


def read_bytes(path: Path, remedy: str) -> bytes:
    """Reads a file. UserError: no such file, not readable, empty, or a git-lfs pointer."""
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise UserError(f"cannot read it: there is no file '{path}'; {remedy}") from error
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read '{path}': {getattr(error, 'strerror', None) or error}; {remedy}") from error
    if not data.strip(b"\0 \r\n\t"):
        raise UserError(f"'{path}' is damaged: it is empty; {remedy}")
    if data.startswith(LFS):
        raise UserError(f"'{path}' is damaged: {POINTER}")
    return data


def read_text(path: Path, remedy: str) -> str:
    """Reads UTF-8 text. UserError as in `read_bytes`, or for other encodings."""
    try:
        return read_bytes(path, remedy).decode()
    except UnicodeDecodeError as error:
        raise UserError(f"'{path}' is damaged: it is not UTF-8 text; {remedy}") from error


def read_json(path: Path, remedy: str, finite: bool = True) -> dict[str, Any]:
    """Reads a JSON object. UserError as in `read_text` and `parse_json`."""
    try:
        return parse_json(read_text(path, remedy), finite)
    except ValueError as error:
        raise UserError(f"'{path}' is damaged: {error}; {remedy}") from error


def parse_json(text: str, finite: bool = True) -> dict[str, Any]:
    """Parses a JSON object. ValueError for anything else; with `finite`, also for NaN and infinity."""
    try:
        number = _finite if finite else None
        found = json.loads(text, parse_constant=number, parse_float=number)
    except json.JSONDecodeError as error:
        whole = error.pos < len(text.rstrip()) and not error.msg.startswith("Unterminated string")
        raise ValueError(f"{'it is not JSON' if whole else 'it is cut short'} ({error})") from error
    except RecursionError as error:
        raise ValueError("it is not JSON (nested too deep)") from error
    if not isinstance(found, dict):
        raise ValueError(f"it holds no JSON object but {type(found).__name__}")
    return found


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"it holds the number {text}")
    return number


def read_rows(path: Path, remedy: str) -> tuple[list[dict[str, Any]], int]:
    """Reads a file of ours with one JSON object per line: (the objects, the number of invalid lines).

    Invalid lines are skipped, since a killed process may leave an incomplete one; blank lines do not count. Raises
    UserError only if the file cannot be opened.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read '{path}': {error.strerror}; {remedy}") from error
    rows, damaged = [], 0
    for line in data.split(b"\n"):
        if line.strip():
            try:
                rows.append(parse_json(line.decode(), finite=False))
            except ValueError:  # includes UnicodeDecodeError
                damaged += 1
    return rows, damaged


def read_tensors(path: Path, remedy: str) -> dict[str, Tensor]:
    """Reads a safetensors file to the CPU. UserError as in `read_bytes`, for other formats, and for NaN or infinity."""
    from safetensors.torch import load  # imports torch, which other users of this module do not need

    data = read_bytes(path, remedy)
    try:
        tensors = load(data)
    except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise UserError(f"'{path}' is damaged: it is cut short, or no safetensors file ({error}); {remedy}") from error
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.float().isfinite().all():
            raise UserError(f"'{path}' is damaged: tensor '{name}' holds numbers that are not finite; {remedy}")
    return tensors


def tensor_names(checkpoint: Path | str) -> list[str]:
    """Names of the tensors in a checkpoint folder's safetensors files, or in a hub id's that were downloaded."""
    from huggingface_hub import try_to_load_from_cache

    found: list[str] = []
    for name in ("model.safetensors.index.json", "model.safetensors"):
        path = Path(checkpoint) / name
        if not Path(checkpoint).is_dir():
            cached = try_to_load_from_cache(str(checkpoint), name)
            path = Path(cached) if isinstance(cached, str) else path
        if path.is_file() and path.suffix == ".json":
            return list(parse_json(path.read_text(encoding="utf-8"))["weight_map"])
        if path.is_file():
            with safe_open(path, "pt") as file:
                found = list(file.keys())
    return found


def damage(folder: Path) -> str | None:
    """Describes the first damaged file of a checkpoint folder, or returns None. Of weights it reads only headers."""
    weights = () if any(folder.glob("model*.safetensors")) else ("pytorch_model*.bin",)
    read = {path for pattern in (*CHECKPOINT, *weights) for path in folder.glob(pattern) if path.is_file()}
    for path in sorted(read):
        try:
            if path.suffix == ".json":
                read_json(path, "", finite=False)
                continue
            with path.open("rb") as file:
                start = file.read(len(LFS))
            if start in (b"", LFS):
                read_bytes(path, "")
            if path.suffix == ".safetensors":
                with safe_open(path, "pt"):
                    pass
        except UserError as error:
            return str(error).removesuffix(";")
        except (SafetensorError, OSError) as error:
            return f"'{path}' is damaged: it is cut short, or no safetensors file ({error})"
    return None
