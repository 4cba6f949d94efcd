"""Files: the user's opened with care, ours written whole or not at all, and read with suspicion."""

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

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # of a disk, of a user's share, of what a file may be
BESIDE = "msd-half-written-"  # begins the names of files that are not whole yet


@contextmanager
def open_regular(source: str | os.PathLike[str], name: str, kind: str) -> Iterator[BinaryIO]:
    """A regular file, open for reading bytes. name: what to call it, kind: what it should be, in messages.

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


def named_in(folder: Path, name: str) -> Path:
    """The file in a folder that is called `name` in a text, whatever encoding the locale has paths in."""
    try:
        return folder / os.fsdecode(name.encode())
    except UnicodeEncodeError:  # half of a surrogate pair: no file has such a name
        return folder / name


def as_text(path: str | os.PathLike[str]) -> str:
    """The name of a path, or a word of the command line, as UTF-8 has it: `named_in` reads it back."""
    return os.fsencode(path).decode("utf-8", "surrogateescape")


@contextmanager
def open_media(source: str | os.PathLike[str], name: str, kind: str) -> Iterator[BinaryIO]:
    """As `open_regular`; also the bytes that a `data:` URI holds, and the file that a `file:` URL names."""
    text = os.fsdecode(source)
    if text[:5].lower() == "data:":
        yield io.BytesIO(_data(text, name))
        return
    url = urlsplit(text) if text[:7].lower() == "file://" else None
    local = url2pathname(url.path) if url is not None and url.netloc in ("", "localhost") else text
    with open_regular(local, name, kind) as file:
        yield file


def _data(uri: str, name: str) -> bytes:
    """The bytes of `data:[type][;base64],…` (RFC 2397), with or without padding."""
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


def shortened(text: str) -> str:
    """Text of bounded length, without control characters, for a message."""
    text = "".join(c if c.isprintable() else "?" for c in text)
    return text if len(text) <= 120 else f"{text[:117]}…"


def write_whole(path: Path | str, content: str | bytes | Callable[[Path], object], before: Path | None = None) -> None:
    """Replaces a file: written beside it, then put in its place in one step. What was there stays if that fails.

    content: text (as UTF-8), bytes, or a function that writes the file whose path it is given. before: where what was
    there is kept, in the same folder. A device or a pipe is written to as it is. UserError says what is in the way;
    nothing is left behind.
    """
    path = Path(path)
    with _told(path):
        place = Path(os.path.realpath(path))  # the file that a link stands for
        if place.exists() and not place.is_file():
            if place.is_dir():
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
            _put(content, place)
            return
        if place.exists() and not os.access(place, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        beside = place.with_name(f"{BESIDE}{secrets.token_hex(8)}")
        try:
            _put(content, beside)
            with beside.open("rb+") as file:
                os.fsync(file.fileno())
            if place.exists():
                shutil.copymode(place, beside)
                if before is not None:
                    place.replace(before)
            beside.replace(place)
        finally:
            beside.unlink(missing_ok=True)


def _put(content: str | bytes | Callable[[Path], object], place: Path) -> None:
    if callable(content):
        content(place)
    else:
        place.write_bytes(content.encode() if isinstance(content, str) else content)


def make_folder(folder: Path) -> None:
    """Makes a folder, and those it is in, where they are missing. UserError when that cannot be done."""
    with _told(folder):
        folder.mkdir(parents=True, exist_ok=True)


def append(path: Path, text: str) -> None:
    """Adds text, such as a line, to the end of a file. UserError when it cannot be written."""
    with _told(path), path.open("a", encoding="utf-8") as file:
        file.write(text)


def remove_leftovers(folder: Path) -> None:
    """Removes what killed processes left half written in a folder; for the one that holds its lock (`exclusive`)."""
    for leftover in folder.glob(f"{BESIDE}*"):
        leftover.unlink(missing_ok=True)


def check_place(path: Path, folder: bool = False) -> None:
    """UserError unless a file can be written at `path`, or files into the folder `path`, so far as can be told now.

    Folders that are missing are made later, by whoever writes; nothing is written or made here.
    """
    with _told(path):
        if not folder and path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if not folder and path.exists() and not os.access(path, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        if not folder and path.exists() and not path.is_file():
            return
        there = Path(os.path.realpath(path if folder else path.parent))
        while not there.exists() and there != there.parent:
            there = there.parent
        with tempfile.TemporaryFile(dir=there) as file:  # permissions alone tell nothing of full or read-only disks
            file.write(bytes(4096))
            file.flush()


@contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """For who writes to `path`, a file or a folder, in the block: UserError when another process does so now.

    The folder that holds `path` must exist.
    """
    lock = FileLock(path / ".lock" if path.is_dir() else path.with_name(f"{path.name}.lock"), timeout=0)
    with _told(path):
        try:
            lock.acquire()
        except Timeout as error:
            raise UserError(
                f"another process is writing to '{path}'; wait for its end, or choose another place"
            ) from error
        except NotImplementedError:  # a file system without locks
            pass
    try:
        yield
    finally:
        Path(lock.lock_file).unlink(missing_ok=True)  # while it is held: who waits for it notices
        lock.release()


def cannot_write(path: Path | str, error: OSError) -> UserError:
    """What to tell the user about an error in writing to `path`."""
    full = error.errno in FULL
    remedy = "free some space, or choose another place" if full else "choose another place"
    return UserError(f"cannot write '{path}': {error.strerror or error}; {remedy}")


@contextmanager
def _told(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise cannot_write(path, error) from error
    except ValueError as error:  # a null character in the path
        raise UserError(f"cannot write '{shortened(str(path))}': {error}; choose another place") from error


LFS = b"version https://git-lfs.github.com/spec/"
CHECKPOINT = (  # what is read of a checkpoint folder; further copies of its weights are not
    "config.json", "*_config.json", "*.index.json", "tokenizer.json", "*_map.json", "chat_template.json", "*.jinja",
    "*.model", "*.tiktoken", "vocab.*", "merges.txt", "model*.safetensors", "adapter_model.safetensors",
)  # fmt: skip
FETCH = "it is a git-lfs pointer, not the file itself; fetch it with 'git lfs pull'"


def read_bytes(path: Path, remedy: str) -> bytes:
    """All of a file that must hold something. UserError: no such file, not readable, empty, or a git-lfs pointer."""
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise UserError(f"cannot read it: there is no file '{path}'; {remedy}") from error
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read '{path}': {getattr(error, 'strerror', None) or error}; {remedy}") from error
    if not data.strip(b"\0 \r\n\t"):
        raise UserError(f"'{path}' is damaged: it is empty; {remedy}")
    if data.startswith(LFS):
        raise UserError(f"'{path}' is damaged: {FETCH}")
    return data


def read_text(path: Path, remedy: str) -> str:
    """The text of a file. UserError as in `read_bytes`, or when it is not UTF-8."""
    try:
        return read_bytes(path, remedy).decode()
    except UnicodeDecodeError as error:
        raise UserError(f"'{path}' is damaged: it is not UTF-8 text; {remedy}") from error


def read_json(path: Path, remedy: str, finite: bool = True) -> dict[str, Any]:
    """The JSON object in a file. UserError as in `read_text`, or when it holds anything else."""
    try:
        return parse_json(read_text(path, remedy), finite)
    except ValueError as error:
        raise UserError(f"'{path}' is damaged: {error}; {remedy}") from error


def parse_json(text: str, finite: bool = True) -> dict[str, Any]:
    """The JSON object that a text is. ValueError says what is wrong; if `finite`, also NaN and infinity."""
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
    """(JSON objects of the whole lines of a file, how many other lines it has): a killed process leaves half a line.

    UserError when the file cannot be read at all.
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
            except ValueError:  # UnicodeDecodeError among them
                damaged += 1
    return rows, damaged


def read_tensors(path: Path, remedy: str) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU. UserError as in `read_bytes`, or when it holds anything else."""
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


def damage(folder: Path) -> str | None:
    """What is wrong with the first damaged file of a checkpoint folder, by its name and what it must hold.

    Weights are looked at by their headers alone.
    """
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
