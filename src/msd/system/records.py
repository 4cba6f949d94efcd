"""Files of ours, read with suspicion: a UserError says which file is wrong, in what way, and how to go on.

A file may be empty, cut short, overwritten with anything, or the pointer that git-lfs leaves in the place of weights.
`remedy` is always what the user can do, such as "delete it and run the command again".
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from msd.errors import UserError

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
    data = read_bytes(path, remedy)
    try:
        tensors = safetensors.torch.load(data)
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
                with safetensors.safe_open(path, "pt"):
                    pass
        except UserError as error:
            return str(error).removesuffix(";")
        except (SafetensorError, OSError) as error:
            return f"'{path}' is damaged: it is cut short, or no safetensors file ({error})"
    return None
