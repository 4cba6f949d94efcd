"""A drafter on disk: a folder with `config.json`, `model.safetensors` (fp16) and `training.json`.

A configuration is a dataclass with a strict JSON form, whose sizes are the target's. Files are read with suspicion
(`msd.system.files`) and written whole.

Reading is strict: a missing, unknown or misshapen tensor is an error that names it, never a silent default. Where room
is scarce matrices may be kept in 8 bits, each row with a scale of its own: drafts need not be exact, and the output
does not depend on them.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

import torch
from pydantic import TypeAdapter, ValidationError
from safetensors.torch import save as packed
from torch import Tensor, nn

from msd.errors import UserError
from msd.system.files import make_folder, parse_json, read_bytes, read_json, read_tensors, read_text, write_whole

CONFIG, WEIGHTS, EXTRA = "config.json", "model.safetensors", "training.json"
SCALE = ".row_scale"
REMEDY = "take the folder from where it came, or train it again with 'msd train'"
NO_NOTES = "delete it: the drafter works without, only the thresholds calibrated for 'budget' are lost"
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
        """Strict: an unknown, missing or wrong field is a UserError that names it."""
        try:
            raw = parse_json(text)
        except ValueError as error:
            raise UserError(f"its {CONFIG} is not that of {cls.owner}: {error}") from error
        for field in sorted({f.name for f in fields(cls)}.symmetric_difference(raw)):  # type: ignore[arg-type]
            how = "unknown; was it trained by a newer msd?" if field in raw else "missing"
            raise UserError(f"its {CONFIG} is not that of {cls.owner}: field '{field}' is {how}")
        try:
            return TypeAdapter(cls).validate_json(text, strict=True)
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(map(str, first["loc"]))
            raise UserError(f"its {CONFIG} is not that of {cls.owner}: field '{field}': {first['msg']}") from error


def save(network: Any, folder: Path, training: dict[str, Any] | None = None, eight_bit: bool = False) -> None:
    """Writes a network that has a `config`; `training` says where it comes from (target, data, thresholds, scores).

    UserError when it cannot be written.
    """
    make_folder(folder)
    tensors = {
        name: (t.half() if t.is_floating_point() else t).detach().cpu().contiguous()
        for name, t in network.state_dict().items()
    }
    if eight_bit:
        tensors = _rounded(tensors)
    write_whole(folder / WEIGHTS, packed(tensors))
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
    except UserError as error:
        raise UserError(f"drafter '{folder}': {error}") from error
    except Exception as error:  # numbers of which no network can be made, in as many ways as it has parts
        raise UserError(
            f"drafter '{folder}': no network can be made of its {CONFIG} ({type(error).__name__}: {error}); {REMEDY}"
        ) from error
    tensors, wanted = _whole(read_tensors(folder / WEIGHTS, REMEDY)), network.state_dict()
    for name in sorted(wanted.keys() ^ tensors.keys()):
        raise UserError(f"drafter '{folder}': tensor '{name}' is {'missing' if name in wanted else 'unknown'}")
    for name, tensor in sorted(tensors.items()):
        if tensor.shape != wanted[name].shape:
            raise UserError(
                f"drafter '{folder}': tensor '{name}' has shape {list(tensor.shape)}, not {list(wanted[name].shape)}"
            )
    network.load_state_dict(tensors)
    return network.to(dtype).eval()


def digest(folder: Path) -> str:
    """A hash of a drafter's configuration and weights. UserError as in `load`."""
    parts = (configuration(folder).encode(), read_bytes(folder / WEIGHTS, REMEDY))
    return hashlib.sha256(b"".join(parts)).hexdigest()[:16]


def is_whole(folder: Path) -> bool:
    """Whether a folder holds a configuration and weights that can be read."""
    try:
        configuration(folder)
        read_tensors(folder / WEIGHTS, REMEDY)
    except UserError:
        return False
    return True


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
    """The text of its `config.json`, a JSON object; UserError when there is none."""
    path = folder / CONFIG
    if not path.is_file():
        raise UserError(f"drafter '{folder}' has no {CONFIG}; give the folder that `msd train` wrote")
    text = read_text(path, REMEDY)
    try:
        parse_json(text)
    except ValueError as error:
        raise UserError(f"drafter '{folder}': '{CONFIG}' is damaged: {error}; {REMEDY}") from error
    return text


def method(folder: Path) -> str | None:
    """The method that a folder's configuration names; None for an MSD drafter, which is known by its fields."""
    name = json.loads(configuration(folder)).get("method")
    if not isinstance(name, str | None):
        raise UserError(f"drafter '{folder}': its {CONFIG} names the method {name!r}; {REMEDY}")
    return name


def training(folder: Path | str) -> dict[str, Any]:
    """What `save` was given as `training`; empty when there is none. UserError for a damaged file."""
    path = Path(folder) / EXTRA
    return read_json(path, NO_NOTES, finite=False) if path.is_file() else {}


def provenance(folder: Path | str) -> dict[str, Any]:
    """As `training`, for use: its thresholds for `budget` are a table str(ε) -> modality -> θ, or UserError."""
    told = training(folder)
    found = told.get("thresholds")
    tables = found.values() if isinstance(found, dict) else [None] if found is not None else []
    for table in tables:
        values = table.values() if isinstance(table, dict) else [None]
        if not all(isinstance(theta, int | float) and math.isfinite(theta) for theta in values):
            raise UserError(f"'{Path(folder) / EXTRA}' is damaged: 'thresholds' is no table of numbers; {NO_NOTES}")
    return told
