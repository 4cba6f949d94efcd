"""A drafter on disk: a folder with `config.json`, `model.safetensors` (fp16) and what was learnt beside the weights.

Reading is strict: a missing, unknown or misshapen tensor is an error that names it, never a silent default.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from msd.errors import UserError
from msd.files import write_whole

CONFIG, WEIGHTS, EXTRA = "config.json", "model.safetensors", "training.json"
N = TypeVar("N", bound=nn.Module)


class Configured(Protocol):
    """A configuration with a JSON form."""

    def as_json(self) -> str:
        """JSON text."""
        ...


def save(network: nn.Module, config: Configured, folder: Path, training: dict[str, Any] | None = None) -> None:
    """Writes the drafter; `training` says where it comes from (target, data, thresholds, scores)."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        name: (t.half() if t.is_floating_point() else t).detach().cpu().contiguous()
        for name, t in network.state_dict().items()
    }
    beside = folder / f"{WEIGHTS}.tmp"
    save_file(tensors, beside)
    beside.chmod(0o644)  # the library makes it private
    beside.replace(folder / WEIGHTS)
    write_whole(folder / CONFIG, config.as_json() + "\n")
    note(folder, training or {})


def note(folder: Path, training: dict[str, Any]) -> None:
    """Replaces what is kept beside the weights."""
    write_whole(folder / EXTRA, json.dumps(training, indent=1, ensure_ascii=False) + "\n")


def load(folder: Path | str, make: Callable[[str], N], dtype: torch.dtype = torch.float32) -> N:
    """The network that `make` builds from the folder's configuration, with its weights, on the CPU.

    UserError says what is wrong with the folder.
    """
    folder = Path(folder)
    text = configuration(folder)
    if not (folder / WEIGHTS).is_file():
        raise UserError(f"drafter '{folder}' has no {WEIGHTS}; give the folder that `msd train` wrote")
    try:
        network = make(text)
        tensors = load_file(folder / WEIGHTS)
    except UserError as error:
        raise UserError(f"drafter '{folder}': {error}") from error
    except (json.JSONDecodeError, SafetensorError, UnicodeDecodeError) as error:
        raise UserError(f"drafter '{folder}' is damaged: {error}") from error
    wanted = network.state_dict()
    for name in sorted(wanted.keys() ^ tensors.keys()):
        raise UserError(f"drafter '{folder}': tensor '{name}' is {'missing' if name in wanted else 'unknown'}")
    for name, tensor in tensors.items():
        if tensor.shape != wanted[name].shape:
            raise UserError(
                f"drafter '{folder}': tensor '{name}' has shape {list(tensor.shape)}, not {list(wanted[name].shape)}"
            )
    network.load_state_dict(tensors)
    return network.to(dtype).eval()


def configuration(folder: Path) -> str:
    """The text of its `config.json`; UserError when there is none."""
    path = folder / CONFIG
    if not path.is_file():
        raise UserError(f"drafter '{folder}' has no {CONFIG}; give the folder that `msd train` wrote")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"drafter '{folder}' is damaged: {error}") from error


def method(folder: Path) -> str | None:
    """The method that a folder's configuration names; None for an MSD drafter, which is known by its fields."""
    try:
        raw = json.loads(configuration(folder))
    except json.JSONDecodeError as error:
        raise UserError(f"drafter '{folder}' is damaged: {error}") from error
    return raw.get("method") if isinstance(raw, dict) else None


def training(folder: Path | str) -> dict[str, Any]:
    """What `save` was told beside the weights; empty when there is none."""
    path = Path(folder) / EXTRA
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return found
