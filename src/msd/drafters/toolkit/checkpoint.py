"""A drafter on disk: a folder with `config.json`, `model.safetensors` (fp16) and `training.json`.

A configuration is a dataclass with a strict JSON form, whose sizes are the target's.

Reading is strict: a missing, unknown or misshapen tensor is an error that names it, never a silent default. Where room
is scarce matrices may be kept in 8 bits, each row with a scale of its own: drafts need not be exact, and the output
does not depend on them.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from msd.errors import UserError
from msd.files import write_whole

CONFIG, WEIGHTS, EXTRA = "config.json", "model.safetensors", "training.json"
SCALE = ".row_scale"
N = TypeVar("N", bound=nn.Module)


def sizes(text_config: Any) -> dict[str, Any]:
    """The fields that a `transformers` text config decides, whatever the method."""
    c = text_config
    rope = getattr(c, "rope_parameters", None) or {}
    rope = rope.get("full_attention", rope)  # where layers differ, that of the far-sighted ones
    return {
        "hidden": c.hidden_size,
        "heads": c.num_attention_heads,
        "kv_heads": c.num_key_value_heads,
        "head_dim": getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads,
        "intermediate": c.intermediate_size,
        "vocabulary": c.vocab_size,
        "rope_theta": float(rope.get("rope_theta", getattr(c, "rope_theta", 10000.0))),
        "eps": float(getattr(c, "rms_norm_eps", 1e-5)),
    }


class Configuration:
    """Of a drafter: a dataclass with a strict JSON form. owner: what messages call the drafter."""

    owner: ClassVar[str] = "a drafter here"

    def as_json(self) -> str:
        """JSON text that `from_json` reads back."""
        return json.dumps(asdict(self), indent=1)  # type: ignore[call-overload]

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Strict: an unknown or missing field is a UserError that names it."""
        raw: dict[str, Any] = json.loads(text)
        if not isinstance(raw, dict):
            raise UserError(f"its config.json is not that of {cls.owner}: it is no JSON object")
        for field in sorted({f.name for f in fields(cls)}.symmetric_difference(raw)):  # type: ignore[arg-type]
            how = "unknown" if field in raw else "missing"
            raise UserError(f"its config.json is not that of {cls.owner}: field '{field}' is {how}")
        return cls(**(raw | cls.rebuilt(raw)))

    @classmethod
    def rebuilt(cls, raw: dict[str, Any]) -> dict[str, Any]:
        """The fields that JSON has in another form (lists for tuples)."""
        return {"taps": tuple(raw["taps"])} if "taps" in raw else {}


def save(network: Any, folder: Path, training: dict[str, Any] | None = None, eight_bit: bool = False) -> None:
    """Writes a network that has a `config`; `training` says where it comes from (target, data, thresholds, scores)."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        name: (t.half() if t.is_floating_point() else t).detach().cpu().contiguous()
        for name, t in network.state_dict().items()
    }
    if eight_bit:
        tensors = _rounded(tensors)
    unfinished = folder / f"{WEIGHTS}.tmp"
    save_file(tensors, unfinished)
    unfinished.chmod(0o644)  # the library makes it private
    unfinished.replace(folder / WEIGHTS)
    write_whole(folder / CONFIG, network.config.as_json() + "\n")
    save_training(folder, training or {})


def save_training(folder: Path, training: dict[str, Any]) -> None:
    """Replaces what is kept of the training."""
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
        tensors = _whole(load_file(folder / WEIGHTS))
    except UserError as error:
        raise UserError(f"drafter '{folder}': {error}") from error
    except (SafetensorError, ValueError, TypeError, RuntimeError) as error:  # a field of another kind, or size
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


def _rounded(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Matrices as int8 rows and, under another name, their fp16 scales; the rest as it is."""
    out = {}
    for name, t in tensors.items():
        if t.dim() < 2 or not t.is_floating_point():
            out[name] = t
            continue
        scale = (t.float().abs().amax(-1, keepdim=True) / 127).half().clamp_min(6e-8)  # the least that fp16 holds
        out[name] = (t / scale.float()).round().clamp(-127, 127).to(torch.int8)
        out[name + SCALE] = scale
    return out


def _whole(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The reverse."""
    names = [name for name in tensors if name + SCALE in tensors]
    whole = {name: tensors[name].float() * tensors[name + SCALE].float() for name in names}
    return {name: t for name, t in (tensors | whole).items() if not name.endswith(SCALE)}


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
    name = raw.get("method") if isinstance(raw, dict) else None
    return name if isinstance(name, str) else None


def training(folder: Path | str) -> dict[str, Any]:
    """What `save` was given as `training`; empty when there is none."""
    path = Path(folder) / EXTRA
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return found
