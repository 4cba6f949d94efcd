"""What the files of a checkpoint must hold: checked by name before a model is loaded, by tensor afterwards.

`transformers` fills what is missing with random numbers and passes over what has no place in the model, with a warning
at most. Either is a model that answers nonsense, so both are refused here, unless the tensors matter to no answer.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from msd.errors import UserError

POINTER = b"version https://git-lfs.github.com/spec/"
JSON = (
    "config.json", "generation_config.json", "processor_config.json", "preprocessor_config.json",
    "video_preprocessor_config.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.json",
)  # fmt: skip
TOKENIZERS = (
    "tokenizer.json", "*.model", "vocab.json", "vocab.txt", "tekken.json", "*.tiktoken",
)  # fmt: skip
UNUSED = re.compile(r"vision_(tower|model)\.(.+\.)?head\.")  # SigLIP's pooling, which no supported family asks for
LOADED = (".json", ".safetensors", ".bin", ".model", ".txt", ".jinja", ".tiktoken")
SHOWN = 3  # names of tensors in a message


def check_json(folder: Path) -> None:
    """UserError for settings in a checkpoint that are no JSON objects; the library passes over some of them."""
    for path in sorted(folder.glob("*.json")):
        if path.name in JSON or path.name.endswith(".index.json"):
            _check_json(path)


def fault(folder: Path) -> str | None:
    """Why the files in a folder cannot be loaded, if it can be seen: git-lfs pointers, empty files, no tokenizer."""
    for path in sorted(p for p in folder.iterdir() if p.suffix in LOADED and p.is_file()):
        with path.open("rb") as file:
            start = file.read(len(POINTER))
        if start == POINTER:
            return f"{path.name} is a git-lfs pointer, not the file itself; fetch it with: git lfs pull"
        if not start:
            return f"{path.name} is empty (0 bytes); copy or download it again"
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


def _check_json(path: Path) -> None:
    data = path.read_bytes()
    if data.startswith(POINTER):
        raise UserError(f"{path.name} is a git-lfs pointer, not the file itself; fetch it with: git lfs pull")
    try:
        value = json.loads(data.decode("utf-8"))
    except ValueError as error:  # JSONDecodeError, UnicodeDecodeError
        raise UserError(f"{path.name} is not JSON ({error}); copy or download it again") from error
    if not isinstance(value, dict):
        raise UserError(f"{path.name} holds a JSON {type(value).__name__}, not an object; copy or download it again")


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
