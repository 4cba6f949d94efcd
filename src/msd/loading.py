"""Loads targets by name: "reference" or "reference-video", a checkpoint folder, or a hub id."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
import transformers
from huggingface_hub import constants
from safetensors import SafetensorError
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
    PreTrainedConfig,
    PreTrainedModel,
)

from msd import reference
from msd.drafters import Drafter
from msd.drafters.algorithms.assistant import ARCHITECTURES, AssistantDrafter
from msd.drafters.algorithms.draft_model import DraftModel
from msd.errors import UserError, named
from msd.inputs.text import TextProcessor
from msd.system.files import damage
from msd.targets import family
from msd.targets.registry import families

FAULTS = (  # raised by the library for damaged checkpoints and missing packages
    OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, ImportError, EOFError,
    SafetensorError, UnpicklingError,
)  # fmt: skip
PACKAGES = ("torchvision", "mistral-common", "librosa", "soundfile", "sentencepiece", "num2words")


def load_target(
    target: str | Path = "reference", device: str | None = None, **kwargs: Any
) -> tuple[PreTrainedModel, Any]:
    """Loads (model, processor) of a target to a torch device (default: CPU); float32 on a CPU unless `dtype` is given.

    kwargs go to `from_pretrained`. UserError names what is missing or damaged.
    """
    place = _device(device)
    path = reference.resolve(target)
    if "dtype" not in kwargs and place.type == "cpu" and "device_map" not in kwargs:
        kwargs["dtype"] = torch.float32
    config = load_config(target)
    with named(f"target '{target}'"):
        family(config)
    with_images = type(config) in AutoModelForImageTextToText._model_mapping
    auto = AutoModelForImageTextToText if with_images else AutoModelForMultimodalLM
    processor = _processor(target, path)  # before the model: it fails more often, and quickly
    model = _model(auto, target, path, kwargs)
    return (model if device is None else model.to(place)), processor


def _model(auto: Any, target: str | Path, path: str | Path, kwargs: dict[str, Any]) -> PreTrainedModel:
    """Loads a model with the library's class `auto`, and checks that its weights are complete."""
    try:
        model, report = auto.from_pretrained(path, **kwargs, output_loading_info=True, ignore_mismatched_sizes=True)
    except FAULTS as error:
        raise UserError(f"target '{target}' cannot be loaded: {_reason(path, error)}") from error
    with named(f"target '{target}'"):
        check_tensors(model, report)
    return model


def load_draft_model(name: str | Path, sees: str | None = None, device: str | None = None, **kwargs: Any) -> Drafter:
    """Loads a drafter by the name of its model: a supported vision-language model, a language model or an assistant.

    sees: see `DraftModel`. The other arguments are those of `load_target`. UserError as there, and for a model that is
    neither.
    """
    with named(f"draft model '{name}'"):
        config = load_config(name)
    if config.model_type in families():
        model, processor = load_target(name, device, **kwargs)
        return DraftModel(model, processor, sees, str(name))
    assistant = config.model_type in ARCHITECTURES
    if assistant and sees is not None:
        raise UserError(f"assistant '{name}' reads the target's keys and values; leave out draft_sees ('{sees}')")
    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise UserError(
            f"draft model '{name}' has architecture '{config.model_type}', which is neither a supported target nor a "
            "language model or an assistant; choose another"
        )
    place, path = _device(device), reference.resolve(name)
    if "dtype" not in kwargs and place.type == "cpu":
        kwargs["dtype"] = torch.float32
    if assistant:  # it has no tokenizer
        return AssistantDrafter(_model(AutoModelForCausalLM, name, path, kwargs).to(place), str(name))
    tokenizer = _processor(name, path)
    model = _model(AutoModelForCausalLM, name, path, kwargs).to(place)
    return DraftModel(model, TextProcessor(getattr(tokenizer, "tokenizer", tokenizer)), sees, str(name))


def _device(name: str | None) -> torch.device:
    """Returns the device `name`; UserError if it is not available. "cuda" is the local rank's GPU under a launcher."""
    rank = os.environ.get("LOCAL_RANK")
    try:
        device = torch.device("cpu" if name is None else f"cuda:{rank}" if name == "cuda" and rank else name)
        torch.empty(0, device=device)
        if device.type == "meta":
            raise RuntimeError("it stores no values")
    except (RuntimeError, AssertionError) as error:  # torch built without CUDA asserts
        raise UserError(
            f"device '{name}' cannot be used here ({_first_line(error)}); --device cpu always can"
        ) from error
    return device


def load_config(target: str | Path) -> PreTrainedConfig:
    """Loads the config of a target, and nothing else. UserError as in `load_target`."""
    path = reference.resolve(target)
    if Path(path).is_file():
        raise UserError(f"target '{target}' is a file; give the folder of a checkpoint")
    problem = damage(Path(path)) if Path(path).is_dir() else None  # the library misses or misreports some damage
    if problem is not None:
        remedy = "run 'msd reference install --force'" if str(target) == "reference" else "copy or download it again"
        raise UserError(f"target '{target}' cannot be loaded: {problem}; {remedy}")
    try:
        return AutoConfig.from_pretrained(path)
    except FAULTS as error:
        model_type = _model_type(path)
        if model_type in CONFIG_MAPPING:
            raise UserError(f"target '{target}': its config.json is wrong ({_first_line(error)})") from error
        if model_type:  # such as "qwen", the first Qwen-VL
            remedy = (
                "; a newer one has it: pip install --upgrade transformers"
                if model_type in families()
                else ", so no adapter can be written; docs/targets.md lists what it can be"
            )
            raise UserError(
                f"target '{target}' has architecture '{model_type}', which transformers {transformers.__version__} "
                f"does not have{remedy}"
            ) from error
        if str(target).startswith((".", "/", "~")) and not Path(target).exists():
            raise UserError(f"target '{target}': there is no such folder; check the path") from error
        if str(path) and Path(path).is_dir() and not (Path(path) / "config.json").is_file():
            raise UserError(f"target '{target}' is a folder without config.json; give that of a checkpoint") from error
        raise UserError(
            f"unknown target '{target}': neither 'reference' nor 'reference-video', nor a checkpoint folder, nor a "
            f"model that could be fetched ({_first_line(error)}){_without_network(error)}"
        ) from error


def _without_network(error: Exception) -> str:
    """What to do where the hub cannot be reached: its client tries for a minute each time."""
    if "connect to" not in str(error):
        return ""
    if constants.HF_HUB_OFFLINE:
        return "; HF_HUB_OFFLINE is set, so nothing is downloaded: unset it, or give a folder"
    return "; without a network give a folder, or set HF_HUB_OFFLINE=1, which reads downloaded models at once"


def _model_type(path: str | Path) -> str | None:
    """Returns the architecture in a checkpoint folder's config; None without such a folder or config."""
    try:
        return json.loads((Path(path) / "config.json").read_text(encoding="utf-8")).get("model_type")
    except (OSError, ValueError, AttributeError):
        return None


def _processor(target: str | Path, path: str | Path) -> Any:
    try:
        return AutoProcessor.from_pretrained(path)
    except FAULTS as error:
        message = str(error).lower().replace("_", "-")
        missing = " and ".join(name for name in PACKAGES if name in message)
        if missing and not _no_tokenizer(path):
            raise UserError(
                f"the processor of target '{target}' needs {missing}, which is not installed; install it"
            ) from error
        raise UserError(f"the processor of target '{target}' cannot be loaded: {_reason(path, error)}") from error


def _reason(path: str | Path, error: Exception) -> str:
    """Explains why a part of a checkpoint cannot be loaded: by the state of its files, else by the library's error."""
    if missing := _no_tokenizer(path):
        return missing
    if isinstance(error, OSError | ValueError | ImportError):
        return _first_line(error)
    return f"{type(error).__name__}: {_first_line(error)}; one of its files may be damaged: copy or download it again"


def _first_line(error: Exception) -> str:
    """Returns the first line of an error message."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:200]


TOKENIZERS = ("tokenizer.json", "*.model", "vocab.json", "vocab.txt", "tekken.json", "*.tiktoken")
UNUSED = re.compile(r"vision_(tower|model)\.(.+\.)?head\.")  # SigLIP's pooling head, which no supported family uses
SHOWN = 3  # tensors that a message names


def _no_tokenizer(path: str | Path) -> str | None:
    """Returns a message if `path` is a folder without a tokenizer, which `damage` does not check."""
    if not Path(path).is_dir() or any(next(Path(path).glob(pattern), None) for pattern in TOKENIZERS):
        return None
    return f"it has no tokenizer ({', '.join(TOKENIZERS)}); copy the tokenizer's files into the folder"


def check_tensors(model: nn.Module, report: Mapping[str, Iterable[Any]]) -> None:
    """Raises UserError if a checkpoint's weights do not match its config; the library only warns, and draws weights.

    Missing tensors, tensors of another shape, and additional tensors of modules that the model has are errors; buffers
    that the model computes are not. report: from `from_pretrained(output_loading_info=True)`; an entry of its
    `mismatched_keys` is (name, shape in the file, shape in the model).
    """
    missing = [name for name in report["missing_keys"] if not UNUSED.search(name)]
    shapes = [f"{name} {list(stored)} for {list(wanted)}" for name, stored, wanted in report["mismatched_keys"]]
    extra = [name for name in report["unexpected_keys"] if _has_its_module(model, name)]
    for names, what in (
        (missing, "its weights lack {} that its config requires"),
        (shapes, "its weights have {} of another shape than in its config"),
        (extra, "its weights have {} that its config leaves out"),
    ):
        if names:
            listed = ", ".join(sorted(names)[:SHOWN]) + (", …" if len(names) > SHOWN else "")
            problem = what.format(f"{len(names)} tensor(s)")
            raise UserError(f"{problem} ({listed}); give weights and config of one model")


def _has_its_module(model: nn.Module, name: str) -> bool:
    """Whether an unexpected tensor is the bias of a module, or a further layer in a list of layers.

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
