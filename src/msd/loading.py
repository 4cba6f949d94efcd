"""Targets by name: an embedded model ("reference", "reference-video"), a checkpoint folder, or a hub id."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
    PreTrainedConfig,
    PreTrainedModel,
)

from msd import reference
from msd.errors import UserError
from msd.system.files import damage
from msd.targets import family

FAULTS = (  # of checkpoints and of installations, as the library shows them
    OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, ImportError, EOFError,
    SafetensorError, UnpicklingError,
)  # fmt: skip
PACKAGES = ("torchvision", "mistral-common", "librosa", "soundfile", "sentencepiece", "num2words")  # processors' own


def load_target(
    target: str | Path = "reference", device: str | None = None, **kwargs: Any
) -> tuple[PreTrainedModel, Any]:
    """(model, processor) of `target`, on torch's `device` (a CPU by default); float32 on a CPU unless `dtype` is given.

    UserError says what is missing. kwargs go to `from_pretrained`.
    """
    place = _device(device)
    path = reference.resolve(target)
    if "dtype" not in kwargs and place.type == "cpu" and "device_map" not in kwargs:
        kwargs["dtype"] = torch.float32
    _refuse_damaged(target, path)
    config = _config(target, path)
    with _of(target):
        family(config)
    seeing = type(config) in AutoModelForImageTextToText._model_mapping
    auto = AutoModelForImageTextToText if seeing else AutoModelForMultimodalLM  # such as those that hear
    processor = _processor(target, path)  # first: it is what may be missing, and takes no time
    try:
        model, found = auto.from_pretrained(path, **kwargs, output_loading_info=True, ignore_mismatched_sizes=True)
    except FAULTS as error:
        raise UserError(f"target '{target}' cannot be loaded: {_reason(path, error)}") from error
    with _of(target):
        check_tensors(model, found)
    return (model if device is None else model.to(place)), processor


def _refuse_damaged(target: str | Path, path: str | Path) -> None:
    """UserError that names the damaged file of a checkpoint folder; the library overlooks some, others it obscures."""
    wrong = damage(Path(path)) if Path(path).is_dir() else None
    if wrong is not None:
        again = "run 'msd reference install --force'" if str(target) == "reference" else "copy or download it again"
        raise UserError(f"target '{target}' cannot be loaded: {wrong}; {again}")


@contextmanager
def _of(target: str | Path) -> Iterator[None]:
    """What is wrong with a target is said with its name."""
    try:
        yield
    except UserError as error:
        raise UserError(f"target '{target}': {error}") from error


def _device(name: str | None) -> torch.device:
    """The device called `name`, which must be there; "cuda" is a process's own card where several were launched."""
    rank = os.environ.get("LOCAL_RANK")
    try:
        device = torch.device("cpu" if name is None else f"cuda:{rank}" if name == "cuda" and rank else name)
        torch.empty(0, device=device)
        if device.type == "meta":
            raise RuntimeError("it holds no numbers")
    except (RuntimeError, AssertionError) as error:  # torch built without CUDA asserts
        raise UserError(
            f"device '{name}' cannot be used here ({_first_line(error)}); --device cpu always can"
        ) from error
    return device


def load_config(target: str | Path) -> PreTrainedConfig:
    """The config of `target`, of which nothing else is read. UserError as in `load_target`."""
    path = reference.resolve(target)
    _refuse_damaged(target, path)
    return _config(target, path)


def _config(target: str | Path, path: str | Path) -> PreTrainedConfig:
    try:
        return AutoConfig.from_pretrained(path)
    except FAULTS as error:
        kind = _model_type(path)
        if kind in CONFIG_MAPPING:
            raise UserError(f"target '{target}': its config.json is wrong ({_first_line(error)})") from error
        if kind:  # such as "qwen", the first Qwen-VL
            raise UserError(
                f"target '{target}' has architecture '{kind}', which transformers {transformers.__version__} does not "
                "have, so no adapter can be written; docs/targets.md lists what it can be"
            ) from error
        raise UserError(
            f"unknown target '{target}': neither 'reference' nor 'reference-video', nor a checkpoint folder, nor a "
            f"model that could be fetched ({_first_line(error)})"
        ) from error


def _model_type(path: str | Path) -> str | None:
    """The architecture that a checkpoint folder's config names; None where there is no such folder or config."""
    try:
        return json.loads((Path(path) / "config.json").read_text(encoding="utf-8")).get("model_type")
    except (OSError, ValueError, AttributeError):
        return None


def _processor(target: str | Path, path: str | Path) -> Any:
    try:
        return AutoProcessor.from_pretrained(path)
    except FAULTS as error:
        said = str(error).lower().replace("_", "-")
        missing = " and ".join(name for name in PACKAGES if name in said)
        if missing and not (Path(path).is_dir() and fault(Path(path))):
            raise UserError(
                f"the processor of target '{target}' needs {missing}, which is not installed; install it"
            ) from error
        raise UserError(f"the processor of target '{target}' cannot be loaded: {_reason(path, error)}") from error


def _reason(path: str | Path, error: Exception) -> str:
    """Why something of a checkpoint cannot be loaded: what its files show, or else what the library says."""
    if Path(path).is_dir() and (found := fault(Path(path))):
        return found
    if isinstance(error, OSError | ValueError | ImportError):
        return _first_line(error)
    return f"{type(error).__name__}: {_first_line(error)}; one of its files may be damaged: copy or download it again"


def _first_line(error: Exception) -> str:
    """What a library's long message begins with."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:200]


TOKENIZERS = (
    "tokenizer.json", "*.model", "vocab.json", "vocab.txt", "tekken.json", "*.tiktoken",
)  # fmt: skip
UNUSED = re.compile(r"vision_(tower|model)\.(.+\.)?head\.")  # SigLIP's pooling, which no supported family asks for
SHOWN = 3  # names of tensors in a message


def fault(folder: Path) -> str | None:
    """What the files in a folder lack, beyond what `_refuse_damaged` sees: a tokenizer."""
    if not any(next(folder.glob(pattern), None) for pattern in TOKENIZERS):
        return f"it has no tokenizer ({', '.join(TOKENIZERS)}); copy the tokenizer's files into the folder"
    return None


def check_tensors(model: nn.Module, found: Mapping[str, Iterable[Any]]) -> None:
    """UserError for weights that are not those that the config describes.

    found: `missing_keys`, `unexpected_keys` and `mismatched_keys` (name, shape in the file, shape in the model), as
    `from_pretrained(output_loading_info=True)` tells them.
    """
    missing = [name for name in found["missing_keys"] if not UNUSED.search(name)]
    shapes = [f"{name} {list(stored)} for {list(wanted)}" for name, stored, wanted in found["mismatched_keys"]]
    left = [name for name in found["unexpected_keys"] if _has_its_module(model, name)]
    for names, what in (
        (missing, "its weights lack {} that its config asks for"),
        (shapes, "its weights have {} of another shape than its config says"),
        (left, "its weights have {} that its config leaves out"),
    ):
        if names:
            told = what.format(f"{len(names)} tensor(s)")
            more = ", …" if len(names) > SHOWN else ""
            raise UserError(f"{told} ({', '.join(sorted(names)[:SHOWN])}{more}); give weights and config of one model")


def _has_its_module(model: nn.Module, name: str) -> bool:
    """Whether a tensor belongs to a module of the model, or goes on a list of modules: one layer more, or a bias.

    Others are buffers of older versions, or parts (heads, towers) that this architecture does not have.
    """
    *path, leaf = name.split(".")
    module = model
    for part in path:
        child = module._modules.get(part)
        if child is None:
            return isinstance(module, nn.ModuleList) and part.isdigit()
        module = child
    return leaf in module._parameters and module._parameters[leaf] is None
