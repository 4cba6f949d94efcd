"""Reads the files of a published head: `config.json` and its tensors, from a folder or a model of the hub.

A pickle is read by `torch.load(weights_only=True)` alone, which runs no code.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as unpacked
from torch import Tensor

from msd.errors import UserError
from msd.system.files import read_bytes, read_json

REMEDY = "download it again"
WEIGHTS = ("model.safetensors", "model-*.safetensors", "pytorch_model.bin", "pytorch_model-*.bin")
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class Head:
    """The content of a published head. place: what the user named. tensors: all, on the CPU, as stored."""

    place: str
    config: dict[str, Any]
    tensors: dict[str, Tensor]


def local(place: Path | str) -> Path:
    """Returns the folder of a head, there or not; a hub id (`owner/name`) is downloaded or taken from the cache.

    UserError if the hub has none.
    """
    if Path(place).exists() or not HUB_ID.fullmatch(str(place)):
        return Path(place)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        patterns = ["config.json", "training.json", "*.safetensors", "pytorch_model*.bin"]
        return Path(snapshot_download(str(place), allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)[:200]
        raise UserError(f"'{place}' is no folder, and no head could be fetched from the hub ({reason})") from error


def read(place: Path | str) -> Head:
    """Reads a head. UserError names the missing or damaged file, or the pickle that holds more than tensors."""
    folder = local(place)
    if not (folder / "config.json").is_file():
        raise UserError(f"'{place}' has no config.json; give the folder of a draft head")
    config = read_json(folder / "config.json", REMEDY, finite=False)
    found = next((files for pattern in WEIGHTS if (files := sorted(folder.glob(pattern)))), [])
    if not found:
        raise UserError(f"'{place}' has no weights ({', '.join(WEIGHTS)}); {REMEDY}")
    tensors: dict[str, Tensor] = {}
    for file in found:
        part = _safetensors(file) if file.suffix == ".safetensors" else _pickled(file)
        if twice := sorted(part.keys() & tensors.keys()):
            raise UserError(f"'{place}' holds tensor '{twice[0]}' in two files; {REMEDY}")
        tensors |= part
    return Head(str(place), config, tensors)


def _safetensors(file: Path) -> dict[str, Tensor]:
    try:
        return unpacked(read_bytes(file, REMEDY))
    except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise UserError(f"'{file}' is damaged: it is cut short, or no safetensors file ({error}); {REMEDY}") from error


def _pickled(file: Path) -> dict[str, Tensor]:
    """Reads a pickle that holds a dictionary of plain tensors."""
    read_bytes(file, REMEDY)
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        raise UserError(
            f"'{file}' is a pickle that holds more than tensors, and is not read; ask its author for safetensors"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"'{file}' is damaged: it is no pickle of torch ({error}); {REMEDY}") from error
    if not isinstance(content, dict) or not all(
        isinstance(name, str) and type(tensor) is Tensor for name, tensor in content.items()
    ):
        raise UserError(f"'{file}' holds more than a table of tensors, and is not read; ask its author for safetensors")
    return {name: tensor.contiguous() for name, tensor in content.items()}
