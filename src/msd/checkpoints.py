"""What a checkpoint must hold: its files, and the tensors that its config asks for.

`transformers` fills what is missing with random numbers and passes over what has no place in the model, with a warning
at most. Either is a model that answers nonsense, so both are refused here, unless the tensors matter to no answer.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from msd.errors import UserError
from msd.records import damage

TOKENIZERS = (
    "tokenizer.json", "*.model", "vocab.json", "vocab.txt", "tekken.json", "*.tiktoken",
)  # fmt: skip
UNUSED = re.compile(r"vision_(tower|model)\.(.+\.)?head\.")  # SigLIP's pooling, which no supported family asks for
SHOWN = 3  # names of tensors in a message


def fault(folder: Path) -> str | None:
    """Why the files in a folder cannot be loaded, if it can be seen: a damaged one, or no tokenizer."""
    if wrong := damage(folder):
        return f"{wrong}; copy or download it again"
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
