"""Reads and writes a drafter's folder: `config.json`, `model.safetensors` (fp16) and `training.json`.

Files are validated when read (`msd.system.files`) and written atomically. Where space is scarce, matrices can be stored
as int8 with one scale per row: the output does not depend on the drafts.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

import torch
from pydantic import FiniteFloat, TypeAdapter, ValidationError
from safetensors.torch import save as packed
from torch import Tensor, nn

from msd.drafters.toolkit.chance import FEATURES
from msd.drafters.toolkit.variant import PLAIN, Variant
from msd.errors import UserError
from msd.system.files import make_folder, parse_json, read_bytes, read_json, read_tensors, read_text, write_whole

CONFIG, WEIGHTS, EXTRA = "config.json", "model.safetensors", "training.json"
SCALE = ".row_scale"
ENDING = "ending."  # names of the tensors of a network's ending probe
REMEDY = "take the folder from where it came, or train it again with 'msd train'"
EXTRA_REMEDY = "delete it: the drafter works without it; only its calibration and the thresholds of 'budget' are lost"
N = TypeVar("N", bound=nn.Module)
# what decoding reads of the training record: str(ε) -> modality -> θ, and feature -> weight
TABLES: dict[str, TypeAdapter[Any]] = {
    "thresholds": TypeAdapter(dict[str, dict[str, FiniteFloat]] | None),
    "calibration": TypeAdapter(dict[str, FiniteFloat] | None),
}


def sizes(text_config: Any) -> dict[str, Any]:
    """Returns the configuration fields that a `transformers` text config determines, whatever the method."""
    c = text_config
    if getattr(c, "is_heterogeneous", False):  # sizes differ by layer
        c = c.per_layer_config[-1]
    rope = getattr(c, "rope_parameters", None) or {}
    rope = rope.get("full_attention", rope)  # where layer types differ, that of full attention
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
    """Base of a drafter's configuration dataclass. Its JSON form has exactly the fields, each of the declared type.

    Class variables: owner, the drafter's name in error messages; json_keys, field name -> key in the file for fields
    whose key differs; omitted, fields that the file leaves out at their default.
    """

    owner: ClassVar[str] = "a drafter here"
    json_keys: ClassVar[dict[str, str]] = {}
    omitted: ClassVar[tuple[str, ...]] = ("variant",)

    def as_json(self) -> str:
        """Returns JSON text that `from_json` reads back."""
        values: dict[str, Any] = asdict(self)  # type: ignore[call-overload]
        defaults = {f.name: f.default for f in fields(self) if f.name in self.omitted}  # type: ignore[arg-type]
        for name in [name for name, default in defaults.items() if getattr(self, name) == default]:
            del values[name]
        return json.dumps({self.json_keys.get(name, name): value for name, value in values.items()}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Parses a JSON object (see `configuration`); UserError names an unknown, missing or invalid field."""
        wrong, raw = f"its {CONFIG} is not that of {cls.owner}", json.loads(text)
        names = {cls.json_keys.get(f.name, f.name): f.name for f in fields(cls)}  # type: ignore[arg-type]
        for key in sorted((names.keys() ^ raw.keys()) - (set(cls.omitted) - raw.keys())):
            problem = "unknown; was it trained by a newer msd?" if key in raw else "missing"
            raise UserError(f"{wrong}: field '{key}' is {problem}")
        renamed = json.dumps({names[key]: value for key, value in raw.items()})
        try:
            return TypeAdapter(cls).validate_json(renamed, strict=True)
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(map(str, first["loc"]))
            raise UserError(f"{wrong}: field '{cls.json_keys.get(field, field)}': {first['msg']}") from error


@dataclass(frozen=True, kw_only=True)
class DrafterConfig(Configuration):
    """The sizes of a drafter that is trained for one target; most are the target's own.

    hidden: hidden size H. vocabulary: token ids of the target, V. draft_vocabulary: token ids that the drafter can
    propose. taps: indices of the target's hidden states that it reads, the final one last; -1 is the final one of a
    target that is not known yet, and empty means the method's own (`DraftNetwork.fit`). variant: see `Variant`.
    """

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    draft_vocabulary: int
    taps: tuple[int, ...]
    rope_theta: float = 10000.0
    eps: float = 1e-5
    variant: Variant = PLAIN


def save(network: Any, folder: Path, training: dict[str, Any] | None = None, eight_bit: bool = False) -> None:
    """Writes a network that has a `config`, and its `training` record (target, data, thresholds, scores).

    eight_bit: stores matrices as int8. UserError when the folder cannot be written.
    """
    make_folder(folder)
    tensors = {
        name: (t.half() if t.is_floating_point() else t).detach().cpu().contiguous()
        for name, t in network.state_dict().items()
    }
    if eight_bit:
        tensors = _quantized(tensors)
    write_whole(folder / WEIGHTS, packed(tensors))
    write_whole(folder / CONFIG, network.config.as_json() + "\n")
    save_training(folder, training or {})


def save_training(folder: Path, training: dict[str, Any]) -> None:
    """Replaces the training record."""
    write_whole(folder / EXTRA, json.dumps(training, indent=1, ensure_ascii=False) + "\n")


def load(folder: Path | str, make: Callable[[str], N], dtype: torch.dtype = torch.float32) -> N:
    """Loads the weights into the network that `make` builds from the configuration text; on the CPU.

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
    except Exception as error:  # impossible sizes fail in many ways
        raise UserError(
            f"drafter '{folder}': no network can be made of its {CONFIG} ({type(error).__name__}: {error}); {REMEDY}"
        ) from error
    tensors = weights(folder)
    if any(name.startswith(ENDING) for name in tensors):  # a part that training adds to networks of any method
        getattr(network, "add_ending", lambda: None)()
    fill(network, tensors, folder)
    return network.to(dtype).eval()


def weights(folder: Path) -> dict[str, Tensor]:
    """Reads the tensors of a folder, those in int8 as numbers. UserError for a damaged file."""
    tensors = read_tensors(folder / WEIGHTS, REMEDY)
    for name in [name for name in tensors if name + SCALE in tensors]:  # reverses `_quantized`
        tensors[name] = tensors[name].float() * tensors.pop(name + SCALE).float()
    return tensors


def fill(network: nn.Module, tensors: dict[str, Tensor], folder: Path | str) -> None:
    """Loads the tensors of a folder into a network. UserError for a missing, unknown or misshaped one."""
    wanted = network.state_dict()
    for name in sorted(wanted.keys() ^ tensors.keys()):
        raise UserError(f"drafter '{folder}': tensor '{name}' is {'missing' if name in wanted else 'unknown'}")
    for name, tensor in sorted(tensors.items()):
        if tensor.shape != wanted[name].shape:
            raise UserError(
                f"drafter '{folder}': tensor '{name}' has shape {list(tensor.shape)}, not {list(wanted[name].shape)}"
            )
    network.load_state_dict(tensors)


def digest(folder: Path) -> str:
    """Hashes a drafter's configuration, weights and calibration. UserError as in `load`."""
    parts = [configuration(folder).encode(), read_bytes(folder / WEIGHTS, REMEDY)]
    fit = provenance(folder).get("calibration")
    parts += [] if fit is None else [json.dumps(fit, sort_keys=True).encode()]
    return hashlib.sha256(b"".join(parts)).hexdigest()[:16]


def is_whole(folder: Path) -> bool:
    """Whether the configuration and the weights in a folder can be read."""
    try:
        configuration(folder)
        read_tensors(folder / WEIGHTS, REMEDY)
    except UserError:
        return False
    return True


def _quantized(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Stores each matrix as int8 with one fp16 scale per row, under NAME + `SCALE`; other tensors stay unchanged."""
    out = {}
    for name, t in tensors.items():
        if t.dim() < 2 or not t.is_floating_point():
            out[name] = t
            continue
        scale = (t.float().abs().amax(-1, keepdim=True) / 127).half().clamp_min(6e-8)  # the smallest fp16 number
        out[name] = (t / scale.float()).round().clamp(-127, 127).to(torch.int8)
        out[name + SCALE] = scale
    return out


def configuration(folder: Path) -> str:
    """Returns the text of `config.json`, a JSON object; UserError if it is missing or damaged."""
    path = folder / CONFIG
    if not path.is_file():
        if not folder.is_dir():
            raise UserError(f"there is no folder '{folder}' of a drafter; check the path")
        inside = folder / "drafter"  # of the folder of a run
        place = f"'{inside}'" if (inside / CONFIG).is_file() else "the folder that `msd train` wrote"
        raise UserError(f"drafter '{folder}' has no {CONFIG}; give {place}")
    text = read_text(path, REMEDY)
    try:
        parse_json(text)
    except ValueError as error:
        raise UserError(f"drafter '{folder}': '{CONFIG}' is damaged: {error}; {REMEDY}") from error
    return text


def method(folder: Path) -> str | None:
    """Returns the method that the configuration names; None for an MSD drafter, which names none."""
    name = json.loads(configuration(folder)).get("method")
    if not isinstance(name, str | None):
        raise UserError(f"drafter '{folder}': its {CONFIG} names the method {name!r}; {REMEDY}")
    return name


def training(folder: Path | str) -> dict[str, Any]:
    """Reads the training record; empty if there is none. UserError for a damaged file."""
    path = Path(folder) / EXTRA
    return read_json(path, EXTRA_REMEDY, finite=False) if path.is_file() else {}


def provenance(folder: Path | str) -> dict[str, Any]:
    """Reads the training record and checks what decoding uses of it; UserError if damaged.

    thresholds: str(ε) -> modality -> θ. calibration: feature -> weight (`msd.drafters.toolkit.chance`).
    """
    record = training(folder)
    for name, kind in TABLES.items():
        try:
            kind.validate_python(record.get(name), strict=True)
        except ValidationError as error:
            problem = f"'{name}' is no table of numbers"
            raise UserError(f"'{Path(folder) / EXTRA}' is damaged: {problem}; {EXTRA_REMEDY}") from error
    unknown = sorted((record.get("calibration") or {}).keys() - FEATURES.keys())
    if unknown:
        raise UserError(
            f"drafter '{folder}': its calibration has the unknown feature '{unknown[0]}'; update msd, or "
            "fit it again with 'msd calibrate'"
        )
    return record
