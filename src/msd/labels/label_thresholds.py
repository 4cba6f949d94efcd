"""Cuts: where gains and costs of answer tokens become modality labels. Fitted on train data, frozen, kept as JSON.

A gain is what the image says about a token (`msd.labels.gain`): *language* up to the 50th percentile of the train
data, *vision* from the 80th on, *fusion* between. Costs are what a token owes to sparse and dense cells of events
(`msd.labels.gain`).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from torch import Tensor

from msd.core.modality import FUSION, LANGUAGE, VISION
from msd.errors import UserError
from msd.labels import CELL_KINDS, EVENT_MODALITIES, IMAGE_MODALITIES, VIDEO_REASONING
from msd.system.files import read_bytes, write_whole

LANGUAGE_SHARE, VISION_SHARE = 0.5, 0.8  # quantiles of the train gains
AGAIN = "cuts that 'msd capture' fitted are fitted anew when the file is deleted and the same capture runs again"

Costs = Sequence[Sequence[float]] | Tensor  # [T, 2 + F]: sparse cells, dense cells, each frame


class EventThresholds(BaseModel):
    """Where costs of hiding (`msd.labels.gain`) become labels. tokens: how many `least` was fitted on.

    language          where hiding neither kind of cells costs more than `least`, the 50th percentile of the train data
    video_reasoning   else, where hiding a second frame costs at least `spread` of what hiding the dearest costs
    event_sparse, event_dense    else, by the kind whose hiding costs more
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    least: float = Field(ge=0)
    spread: float = Field(default=0.5, ge=0, le=1)
    tokens: int = Field(ge=1)

    @classmethod
    def fit(cls, costs: Iterable[Costs]) -> EventThresholds:
        """From the costs of train answers; UserError when there are none."""
        dearest = [torch.as_tensor(c, dtype=torch.float64)[:, : len(CELL_KINDS)].amax(1) for c in costs]
        if not dearest:
            raise UserError("no answer about events to fit event cuts on; capture lines with events")
        values = torch.cat(dearest).numpy()
        return cls(least=float(np.quantile(values, LANGUAGE_SHARE)), tokens=len(values))

    def labels(self, costs: Costs) -> Tensor:
        """Modality ids [T] int64 of costs [T, 2 + F]."""
        costs = torch.as_tensor(costs, dtype=torch.float64)
        by_kind, by_frame = costs[:, : len(CELL_KINDS)], costs[:, len(CELL_KINDS) :]
        ids = torch.tensor([kind.id for kind in CELL_KINDS])
        labels = ids[by_kind.argmax(1)]
        if by_frame.shape[1] > 1:
            first, second = by_frame.topk(2, 1).values.unbind(1)
            labels[(second >= self.spread * first) & (first > 0)] = VIDEO_REASONING.id
        labels[by_kind.amax(1) <= self.least] = LANGUAGE.id
        return labels


class ModalityThresholds(BaseModel):
    """Where gains become labels: language ≤ `language_max`, vision ≥ `vision_min` (nats), fusion between.

    Fitted once on train data and kept with what was trained. tokens: how many gains it was fitted on. target: the
    `fingerprint` of the model that gave them. events: cuts of answers about scenes that an event camera saw too.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    language_max: float = Field(ge=0)
    vision_min: float = Field(ge=0)
    tokens: int = Field(ge=1)
    target: str = Field(min_length=1)
    events: EventThresholds | None = None

    @model_validator(mode="after")
    def _in_order(self) -> ModalityThresholds:
        if self.language_max > self.vision_min:
            raise ValueError(f"language_max {self.language_max} is above vision_min {self.vision_min}")
        return self

    @classmethod
    def fit(cls, gains: Iterable[Sequence[float] | Tensor], target: str) -> ModalityThresholds:
        """The 50th and 80th percentile of the gains of answers about images; UserError when there are none."""
        each = [np.asarray(g, dtype=np.float64).reshape(-1) for g in gains]
        values = np.concatenate(each) if each else np.empty(0)
        if not len(values):
            raise UserError("no answer token about an image to fit modality cuts on; capture prompts with images")
        language_max, vision_min = np.quantile(values, (LANGUAGE_SHARE, VISION_SHARE)).tolist()
        return cls(language_max=language_max, vision_min=vision_min, tokens=len(values), target=target)

    @property
    def modalities(self) -> tuple[str, ...]:
        """Names of the labels that it gives."""
        return tuple(m.name for m in (IMAGE_MODALITIES if self.events is None else EVENT_MODALITIES))

    def labels(self, gain: Sequence[float] | Tensor, costs: Costs | None = None) -> Tensor:
        """Modality ids, int64, of gains of any shape; of the costs [T, 2 + F] of events instead, where there are cuts.

        Where the cuts coincide, a gain equal to both is language.
        """
        if self.events is not None and costs is not None:
            return self.events.labels(costs)
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
        """One JSON object. UserError when it cannot be written."""
        write_whole(path, json.dumps(self.model_dump(), indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> ModalityThresholds:
        """What `save` wrote; UserError names a missing, unknown or wrong field."""
        try:
            return cls.model_validate_json(read_bytes(path, AGAIN))
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(map(str, first["loc"])) or "the file"
            raise UserError(f"'{path}' does not hold modality cuts: {field}: {first['msg']}; {AGAIN}") from error
