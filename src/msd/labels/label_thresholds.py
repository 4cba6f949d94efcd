"""Label thresholds: turn the gains and costs of answer tokens (`msd.labels.gain`) into modality labels.

Thresholds are fitted once on train data, then frozen and stored as JSON. A token's image gain gives *language* up to
the 50th percentile of the train data, *vision* from the 80th percentile on, and *fusion* between. Where an event camera
recorded the same scene, the costs of masking event cells give the label instead.
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
REMEDY = "thresholds from 'msd capture' are fitted again when the file is deleted and the same capture runs again"

Costs = Sequence[Sequence[float]] | Tensor  # [T, 2 + F]: cost of masking the sparse cells, the dense cells, each frame


class EventThresholds(BaseModel):
    """Turns the costs of masking event cells and frames into labels. The first rule that applies decides.

    language: masking either kind of cell costs at most `least`, the 50th percentile of the train data.
    video_reasoning: masking a second frame costs at least `spread` times as much as masking the most expensive one.
    event_sparse, event_dense: the kind of cell whose masking costs more.

    tokens: number of train tokens that `least` was fitted on.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    least: float = Field(ge=0)
    spread: float = Field(default=0.5, ge=0, le=1)
    tokens: int = Field(ge=1)

    @classmethod
    def fit(cls, costs: Iterable[Costs]) -> EventThresholds:
        """Fits the thresholds to the costs of train answers; UserError if there are none."""
        highest = [torch.as_tensor(c, dtype=torch.float64)[:, : len(CELL_KINDS)].amax(1) for c in costs]
        if not highest:
            raise UserError("no answer about events to fit label thresholds on; capture lines with events")
        values = torch.cat(highest).numpy()
        return cls(least=float(np.quantile(values, LANGUAGE_SHARE)), tokens=len(values))

    def labels(self, costs: Costs) -> Tensor:
        """Returns modality ids [T] int64 for costs [T, 2 + F]."""
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
    """Turns image gains (nats) into labels: language ≤ `language_max`, vision ≥ `vision_min`, fusion between.

    tokens: number of train tokens they were fitted on. target: `fingerprint` of the model that computed the gains.
    events: thresholds for answers about scenes that an event camera recorded too.
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
        """Fits the thresholds to the gains of train answers about images; UserError if there are none."""
        arrays = [np.asarray(g, dtype=np.float64).reshape(-1) for g in gains]
        values = np.concatenate(arrays) if arrays else np.empty(0)
        if not len(values):
            raise UserError("no answer token about an image to fit label thresholds on; capture prompts with images")
        language_max, vision_min = np.quantile(values, (LANGUAGE_SHARE, VISION_SHARE)).tolist()
        return cls(language_max=language_max, vision_min=vision_min, tokens=len(values), target=target)

    @property
    def modalities(self) -> tuple[str, ...]:
        """Names of the labels that these thresholds produce."""
        return tuple(m.name for m in (IMAGE_MODALITIES if self.events is None else EVENT_MODALITIES))

    def labels(self, gain: Sequence[float] | Tensor, costs: Costs | None = None) -> Tensor:
        """Returns modality ids, int64, for gains of any shape, or for costs [T, 2 + F] if there are event thresholds.

        A gain that equals both thresholds is language.
        """
        if self.events is not None and costs is not None:
            return self.events.labels(costs)
        gain = torch.as_tensor(gain, dtype=torch.float64)
        labels = torch.full(gain.shape, FUSION.id, device=gain.device)
        labels[gain >= self.vision_min] = VISION.id
        labels[gain <= self.language_max] = LANGUAGE.id
        return labels

    def check_target(self, target: str) -> None:
        """Raises UserError unless the thresholds were fitted on the target with this fingerprint."""
        if target != self.target:
            raise UserError(
                f"the label thresholds were fitted on target {self.target}, this is {target}; "
                "fit them on this one with 'msd capture'"
            )

    def save(self, path: Path) -> None:
        """Writes one JSON object. UserError if the file cannot be written."""
        write_whole(path, json.dumps(self.model_dump(), indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> ModalityThresholds:
        """Reads what `save` wrote; UserError names a missing, unknown or wrong field."""
        try:
            return cls.model_validate_json(read_bytes(path, REMEDY))
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(map(str, first["loc"])) or "the file"
            raise UserError(f"'{path}' does not hold label thresholds: {field}: {first['msg']}; {REMEDY}") from error
