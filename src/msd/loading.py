"""Targets by name: an embedded model ("reference", "reference-video"), a checkpoint folder, or a hub id."""

from __future__ import annotations

import json
import os
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
    PreTrainedConfig,
    PreTrainedModel,
)

from msd import reference
from msd.errors import UserError
from msd.records import damage
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
    try:
        family(config)
    except UserError as error:
        raise UserError(f"target '{target}': {error}") from error
    seeing = type(config) in AutoModelForImageTextToText._model_mapping
    auto = AutoModelForImageTextToText if seeing else AutoModelForMultimodalLM  # such as those that hear
    processor = _processor(target, path)  # first: it is what may be missing, and takes no time
    try:
        model = auto.from_pretrained(path, **kwargs)
    except FAULTS as error:
        raise UserError(f"target '{target}' cannot be loaded: {_first_line(error)}") from error
    return (model if device is None else model.to(place)), processor


def _refuse_damaged(target: str | Path, path: str | Path) -> None:
    """UserError that names the damaged file of a checkpoint folder; the library overlooks some, others it obscures."""
    wrong = damage(Path(path)) if Path(path).is_dir() else None
    if wrong is not None:
        again = "run 'msd reference install --force'" if str(target) == "reference" else "copy or download it again"
        raise UserError(f"target '{target}' cannot be loaded: {wrong}; {again}")


def _device(name: str | None) -> torch.device:
    """The device called `name`, which must be there; "cuda" is a process's own card where several were launched."""
    rank = os.environ.get("LOCAL_RANK")
    try:
        device = torch.device("cpu" if name is None else f"cuda:{rank}" if name == "cuda" and rank else name)
        torch.empty(0, device=device)
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
        if kind := _model_type(path):  # such as "qwen", the first Qwen-VL
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
        if missing:
            raise UserError(
                f"the processor of target '{target}' needs {missing}, which is not installed; install it"
            ) from error
        raise UserError(f"the processor of target '{target}' cannot be loaded: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    """What a library's long message begins with; the kind of error where it is hardly a message."""
    said = (str(error).strip().splitlines() or [""])[0][:200]
    return said if isinstance(error, OSError | ValueError | ImportError) and said else f"{type(error).__name__}: {said}"
