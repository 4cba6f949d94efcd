"""Targets by name: the embedded reference model, a checkpoint folder, or a hub id."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, PreTrainedModel

from msd import reference
from msd.errors import UserError
from msd.targets import supported


def load_target(target: str | Path = "reference", **kwargs: Any) -> tuple[PreTrainedModel, Any]:
    """(model, processor) of `target`; float32 on a CPU unless `dtype` is given. UserError says what is missing."""
    path = reference.path() if str(target) == "reference" else target
    if "dtype" not in kwargs and not torch.cuda.is_available():
        kwargs["dtype"] = torch.float32
    try:
        config = AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise UserError(
            f"unknown target '{target}': neither 'reference', nor a checkpoint folder, nor a model that could be "
            f"fetched ({_first_line(error)})"
        ) from error
    if config.model_type not in supported():
        raise UserError(
            f"target '{target}' has architecture '{config.model_type}', which has no adapter "
            f"(supported: {', '.join(supported())}); add one to msd/targets and register it in msd/targets/registry.py"
        )
    try:
        return AutoModelForImageTextToText.from_pretrained(path, **kwargs), AutoProcessor.from_pretrained(path)
    except OSError as error:
        raise UserError(f"target '{target}' cannot be loaded: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    """What a library's long message begins with."""
    return str(error).strip().splitlines()[0][:200]
