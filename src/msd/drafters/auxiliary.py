"""Auxiliary inputs: data that only the drafter reads, such as a second sensor's recording of the scene.

A source is registered under a name, which becomes a keyword argument of `SpeculativeVLM.generate`. The module
`auxiliary` of any package in `msd` is imported when sources are first needed, and registers its own there; a program
calls `register`. A drafter that reads a source (`ReadsAuxiliary`) encodes each input as auxiliary tokens [E, H].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from msd.drafters.base import Drafter, ReadsAuxiliary
from msd.errors import UserError
from msd.inputs import prompts
from msd.targets.base import Target
from msd.targets.vision import VisionCache

FRAMES = 5  # pictures that an input is rendered as, for a drafter that shares the target's vision tower
SPANS = 8  # equally long parts of an input whose figures a drafter reads


@dataclass(frozen=True)
class AuxiliarySource:
    """One kind of auxiliary input.

    name: the keyword argument of `generate`. plural: the noun for several inputs, in messages. types: the Python types
    of one input, to distinguish it from a list of inputs. open: checks and opens an input, and returns an opened one
    unchanged; UserError if it cannot be read. frames: renders an opened input as this number of pictures. unsupported:
    completes the message "method 'x' …" for a drafter that does not read this source. figures: measures what pictures
    do not show, float32 [SPANS, n], of an opened input and the number of spans.
    """

    name: str
    plural: str
    types: tuple[type, ...]
    open: Callable[[Any], Any]
    frames: Callable[[Any, int], list[Image.Image]]
    unsupported: str
    figures: Callable[[Any, int], NDArray[np.float32]] | None = None


_SOURCES: dict[str, AuxiliarySource] = {}


def register(source: AuxiliarySource) -> None:
    """Makes `source.name` a keyword argument of `generate`."""
    _SOURCES[source.name] = source


def get(name: str) -> AuxiliarySource:
    """Returns the source `name`; UserError lists the registered ones."""
    _discover()
    if name not in _SOURCES:
        raise UserError(f"unknown auxiliary source '{name}'; known: {', '.join(_SOURCES)}")
    return _SOURCES[name]


@cache
def _discover() -> None:
    """Imports the module `auxiliary` of each package in `msd` that has one."""
    for path in sorted(Path(__file__).parents[1].glob("*/auxiliary.py")):
        import_module(f"msd.{path.parent.name}.auxiliary")


def encoder(drafter: Drafter, name: str) -> Callable[[Any], Tensor] | None:
    """Returns the function that encodes one input of source `name`; None if the drafter does not read it."""
    return drafter.encode if isinstance(drafter, ReadsAuxiliary) and drafter.auxiliary_source == name else None


def argument(drafter: Drafter, name: str, inputs: Sequence[Any | None]) -> dict[str, Any]:
    """Returns the keyword argument `name` of `generate` for a batch; empty if the drafter does not read the source."""
    used = encoder(drafter, name) is not None and any(item is not None for item in inputs)
    return {name: list(inputs)} if used else {}


def take(drafter: Drafter, kwargs: dict[str, Any]) -> Tensor | Callable[[], Tensor] | None:
    """Removes the auxiliary inputs of a generation from its arguments; returns tokens [B, E, H] or their function.

    `kwargs["auxiliary"]` is returned as it is. For inputs of a source, files are opened now and the returned function
    encodes them. None if no row has an input. UserError: the drafter does not read the source, the number of inputs
    is not the number of prompts, an input cannot be read, or inputs are given in two ways.
    """
    _discover()
    tokens = kwargs.pop("auxiliary", None)
    given = {name: kwargs.pop(name) for name in _SOURCES if name in kwargs}
    given = {name: inputs for name, inputs in given.items() if inputs is not None}
    if not given:
        return tokens
    name, *others = given
    if tokens is not None or others:
        raise UserError(f"give {name} or {others[0] if others else 'auxiliary tokens'}, not both")
    return _batch(drafter, _SOURCES[name], given[name], len(kwargs["input_ids"]))


def _batch(drafter: Drafter, source: AuxiliarySource, inputs: Any, rows: int) -> Callable[[], Tensor] | None:
    """Opens the inputs of a batch; returns the function that encodes them. See `take`."""
    listed = [inputs] if isinstance(inputs, source.types) else list(inputs)
    if len(listed) != rows:
        raise UserError(f"{rows} prompts but {len(listed)} {source.plural}; give one for each, or None")
    if all(item is None for item in listed):
        return None
    encode = encoder(drafter, source.name)
    if encode is None:
        raise UserError(f"method '{drafter.name}' {source.unsupported}")
    opened = [None if item is None else source.open(item) for item in listed]
    return lambda: stacked([None if item is None else encode(item) for item in opened])


def stacked(tokens: Sequence[Tensor | None]) -> Tensor:
    """Stacks tokens [E, H] of some rows to [B, E, H], zero in the rows without any; at least one row has some."""
    zeros = torch.zeros_like(next(row for row in tokens if row is not None))
    return torch.stack([zeros if row is None else row for row in tokens])


def tokens(
    source: AuxiliarySource, item: Any, encode: Callable[[list[Image.Image]], Tensor], figures: bool = True
) -> Tensor:
    """Encodes an opened input: tokens of its `FRAMES` pictures by `encode`, then those of its figures; [E, H]."""
    pictures = encode(source.frames(item, FRAMES))
    return torch.cat([pictures, figure_tokens(source, item, pictures)]) if figures else pictures


def figure_tokens(source: AuxiliarySource, item: Any, like: Tensor) -> Tensor:
    """Returns the figures of an opened input as tokens [SPANS, H]: followed by a one, then zeros; like: [..., H].

    The one keeps their scale, which a norm takes away. Without figures there are no tokens, [0, H].
    """
    if source.figures is None:
        return like.new_zeros(0, like.shape[-1])
    values = F.pad(torch.from_numpy(source.figures(item, SPANS)), (0, 1), value=1.0)
    return F.pad(values, (0, like.shape[-1] - values.shape[1])).to(like)


@torch.no_grad()
def picture_tokens(target: Target, processor: Any, pictures: list[Image.Image]) -> Tensor:
    """Encodes F pictures with the target's vision tower and pools their features: tokens [F + P, H] (see `pooled`).

    It does not use the target's vision cache, so another thread may prefill meanwhile. UserError for a target without
    images, or one that splits them into tiles.
    """
    if not any(kind.modality == "image" for kind in target.pictures):
        raise UserError("the target takes no images, so it cannot encode the frames of an auxiliary input")
    count = len(pictures)
    inputs = prompts.prepare(processor, [pictures], ["."])
    encoded = VisionCache(limit=count).encode(target.model, inputs, target.pictures)
    states = encoded["mm_encoder_outputs"]["image"].pooler_output
    states = states if isinstance(states, Tensor) else torch.cat(list(states))
    total = states.shape[:-1].numel()
    if total % count:
        raise UserError(f"the target encodes {count} frames as {total} tokens, which is not the same number for each")
    return pooled(states.reshape(count, -1, states.shape[-1]))


def pooled(features: Tensor) -> Tensor:
    """Pools features [F, P, H] of F pictures with P patches to [F + P, H] (Liu et al., 2024).

    First the mean over the patches of each picture (temporal), then the mean over pictures at each patch (spatial).
    """
    return torch.cat([features.mean(1), features.mean(0)])
