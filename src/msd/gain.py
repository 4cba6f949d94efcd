"""Image gain: how much the picture says about each answer token, and the modality that follows from it.

The gain at an answer position is KL(p(·|image, prefix) ‖ p(·|prefix)) in nats under the target; the law without the
image comes from a pass of `teach` with all image columns hidden, positions unchanged. A token is *language* up to the
50th percentile of the train data's gains, *vision* from the 80th on, *fusion* between.
This module knows nothing of drafters or of how answers are decoded.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from torch import Tensor

from msd.errors import UserError
from msd.modality import FUSION, LANGUAGE, VISION
from msd.targets.base import Target
from msd.targets.teacher import teach

LANGUAGE_SHARE, VISION_SHARE = 0.5, 0.8  # quantiles of the train gains


@torch.no_grad()
def image_gain(
    target: Target,
    inputs: dict[str, Any],
    answers: Sequence[Sequence[int]],
    seeing: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    """Gains in nats of every answer token, one [T_i] float64 tensor per row, ≥ 0; exactly 0 in rows without an image.

    inputs: processor output of B prompts, images encoded or not. answers: B lists of token ids. Laws are softmaxes of
    the raw logits, without processors. seeing: the logits [T_i, V] of each answer's tokens with the image, where they
    are known already, as they are to whoever wrote the answers. UserError when an answer is empty or holds an image
    placeholder, whose place the model would fill with features.
    """
    if any(token in target.placeholders for answer in answers for token in answer):
        raise UserError("an answer holds an image placeholder token; cut it there, it cannot be taught")
    inputs = target.encode_images(dict(inputs))
    return cost_of_hiding(target, inputs, answers, image_columns(target, inputs["input_ids"]), seeing)


@torch.no_grad()
def cost_of_hiding(
    target: Target,
    inputs: dict[str, Any],
    answers: Sequence[Sequence[int]],
    hidden: Tensor,
    seeing: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    """KL(p(·|all, prefix) ‖ p(·|all but the hidden columns, prefix)) of every answer token, as `image_gain` gives it.

    inputs: with encoded images. hidden: [B, L] bool prompt columns; a row without any costs exactly 0.
    """
    some = hidden.any(1).tolist()
    if not any(some):
        return [torch.zeros(len(answer), dtype=torch.float64) for answer in answers]
    if seeing is None:
        seeing = whole_laws(target, inputs, answers)
    less = teach(target, inputs, answers, hidden)
    return [
        _divergence(p, less.logits[row, : len(p)]) if some[row] else torch.zeros(len(p)).double()
        for row, p in enumerate(seeing)
    ]


def whole_laws(target: Target, inputs: dict[str, Any], answers: Sequence[Sequence[int]]) -> list[Tensor]:
    """The logits [T_i, V] of each answer's tokens with nothing hidden."""
    lesson = teach(target, inputs, answers)
    return [lesson.logits[row, :n] for row, n in enumerate(lesson.lengths)]


def image_columns(target: Target, input_ids: Tensor) -> Tensor:
    """[B, L] bool: the columns that stand for image features."""
    return torch.isin(input_ids, torch.tensor(list(target.placeholders), device=input_ids.device))


def assert_images_matter(target: Target, inputs: dict[str, Any], answers: Sequence[Sequence[int]]) -> None:
    """Refuses a target that its pictures or sounds do not reach: others must change the logits of every prompt.

    inputs: processor output with pixels, not encoded yet; answers as in `image_gain`. UserError otherwise.
    """
    other = {name: _negative(inputs[name]) for name in target.raw if inputs.get(name) is not None}
    if not other:
        raise UserError("there are no pixels to change; give prompts with images, as the processor prepares them")
    one, two = teach(target, inputs, answers), teach(target, {**inputs, **other}, answers)
    change = ((one.logits - two.logits).abs().amax(-1) * one.spoken()).amax(-1)  # [B]
    for row, shown in enumerate(_shows_images(target, inputs["input_ids"])):
        if shown and change[row] <= 1e-5:
            raise UserError(
                f"the target's answer does not change with its images (prompt {row}: other pixels, the same logits); "
                "check that pixel values reach the model before training on it"
            )


class ModalityCuts(BaseModel):
    """Where gains become labels: language ≤ `language_max`, vision ≥ `vision_min` (nats), fusion between.

    Fitted once on train data and kept with what was trained. tokens: how many gains it was fitted on. target: the
    `fingerprint` of the model that gave them.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    language_max: float = Field(ge=0)
    vision_min: float = Field(ge=0)
    tokens: int = Field(ge=1)
    target: str = Field(min_length=1)

    @model_validator(mode="after")
    def _in_order(self) -> ModalityCuts:
        if self.language_max > self.vision_min:
            raise ValueError(f"language_max {self.language_max} is above vision_min {self.vision_min}")
        return self

    @classmethod
    def fit(cls, gains: Iterable[Sequence[float] | Tensor], target: str) -> ModalityCuts:
        """The 50th and 80th percentile of the gains of answers about images; UserError when there are none."""
        each = [np.asarray(g, dtype=np.float64).reshape(-1) for g in gains]
        values = np.concatenate(each) if each else np.empty(0)
        if not len(values):
            raise UserError("no answer token about an image to fit modality cuts on; capture prompts with images")
        language_max, vision_min = np.quantile(values, (LANGUAGE_SHARE, VISION_SHARE)).tolist()
        return cls(language_max=language_max, vision_min=vision_min, tokens=len(values), target=target)

    def labels(self, gain: Sequence[float] | Tensor) -> Tensor:
        """Modality ids, int64, of gains of any shape. Where the cuts coincide, a gain equal to both is language."""
        gain = torch.as_tensor(gain, dtype=torch.float64)
        labels = torch.full(gain.shape, FUSION.id, device=gain.device)
        labels[gain >= self.vision_min] = VISION.id
        labels[gain <= self.language_max] = LANGUAGE.id
        return labels

    def check_target(self, target: str) -> None:
        """UserError unless `target` is the fingerprint the cuts were fitted on."""
        if target != self.target:
            raise UserError(
                f"the modality cuts were fitted on target {self.target}, this is {target}; "
                "fit them on this one with 'msd capture'"
            )

    def save(self, path: Path) -> None:
        """One JSON object."""
        try:
            path.write_text(json.dumps(self.model_dump(), indent=1) + "\n")
        except OSError as error:
            raise UserError(f"cannot write modality cuts to '{path}': {error.strerror}") from error

    @classmethod
    def load(cls, path: Path) -> ModalityCuts:
        """What `save` wrote; UserError names a missing, unknown or wrong field."""
        try:
            return cls.model_validate_json(path.read_bytes())
        except OSError as error:
            raise UserError(f"cannot read modality cuts '{path}': {error.strerror}") from error
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(map(str, first["loc"])) or "the file"
            raise UserError(f"'{path}' does not hold modality cuts: {field}: {first['msg']}") from error


def _shows_images(target: Target, input_ids: Tensor) -> list[bool]:
    """For every row of [B, L], whether it has image placeholders."""
    return image_columns(target, input_ids).any(1).tolist()


def _negative(pixels: Tensor) -> Tensor:
    """Negative and mirrored; tiles of zeros, which fill up a batch, stay so."""
    other = 1.0 - pixels.flip(-1)
    if pixels.dim() == 5:
        other[~pixels.flatten(2).any(-1)] = 0.0
    return other


def _divergence(p: Tensor, q: Tensor) -> Tensor:
    """KL(p ‖ q) of logits [T, V] in nats, [T] float64 on the host."""
    p, q = p.double().log_softmax(-1), q.double().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1).clamp_min(0.0).cpu()
