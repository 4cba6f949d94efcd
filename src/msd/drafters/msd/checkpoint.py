"""A drafter on disk: a folder with `config.json`, `model.safetensors` (fp16) and what was learnt beside the weights.

Reading is strict: a missing, unknown or misshapen tensor is an error that names it, never a silent default.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from msd.drafters.msd.config import MSDConfig
from msd.drafters.msd.network import MSDNetwork
from msd.errors import UserError
from msd.files import write_whole

CONFIG, WEIGHTS, EXTRA = "config.json", "model.safetensors", "training.json"


def save(network: MSDNetwork, folder: Path, training: dict[str, Any] | None = None) -> None:
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
    write_whole(folder / CONFIG, network.config.as_json() + "\n")
    note(folder, training or {})


def note(folder: Path, training: dict[str, Any]) -> None:
    """Replaces what is kept beside the weights."""
    write_whole(folder / EXTRA, json.dumps(training, indent=1, ensure_ascii=False) + "\n")


def load(folder: Path | str, dtype: torch.dtype = torch.float32) -> MSDNetwork:
    """The network of a folder, on the CPU, without an embedding (`MSDNetwork.attach`). UserError says what is wrong."""
    folder = Path(folder)
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise UserError(f"drafter '{folder}' has no {name}; give the folder that `msd train` wrote")
    try:
        config = MSDConfig.from_json((folder / CONFIG).read_text(encoding="utf-8"))
        tensors = load_file(folder / WEIGHTS)
    except UserError as error:
        raise UserError(f"drafter '{folder}': {error}") from error
    except (json.JSONDecodeError, SafetensorError, UnicodeDecodeError) as error:
        raise UserError(f"drafter '{folder}' is damaged: {error}") from error
    network = MSDNetwork(config)
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


def training(folder: Path | str) -> dict[str, Any]:
    """What `save` was told beside the weights; empty when there is none."""
    path = Path(folder) / EXTRA
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return found
