"""Connects events to the rest of the library: auxiliary tokens for drafters, and label costs for answers.

This module registers the source "events", so `SpeculativeVLM.generate(events=…)` accepts recordings of event cameras.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor

from msd.drafters import auxiliary
from msd.drafters.auxiliary import AuxiliarySource
from msd.events.cells import cell_kinds
from msd.events.frames import frames
from msd.events.motion import motion
from msd.events.readers import open_chunks
from msd.events.recording import Events, Recording
from msd.events.stream import EventStream
from msd.labels.gain import event_costs, image_columns
from msd.targets.base import Target


def opened(recording: Events | str | os.PathLike[str]) -> Events:
    """Opens an event file; returns a stream or a recording as it is. UserError if its format is unknown."""
    return open_chunks(recording) if isinstance(recording, str | os.PathLike) else recording


SOURCE = AuxiliarySource(
    name="events",
    plural="event recordings",
    types=(EventStream, Recording, str, os.PathLike),
    open=opened,
    frames=partial(frames, by="count"),
    unsupported=("sees no events; 'eventgpt' does, and 'msd' where it was trained with them (docs/events.md)"),
    figures=motion,
)
auxiliary.register(SOURCE)


def event_tokens(target: Target, processor: Any, recording: Events | str | os.PathLike[str]) -> Tensor:
    """Encodes a recording: `picture_tokens` of its frames, `figure_tokens` of its motion, [F + P + SPANS, H]."""
    return auxiliary.tokens(SOURCE, opened(recording), partial(auxiliary.picture_tokens, target, processor))


def costs_of_recordings(
    target: Target,
    inputs: dict[str, Any],
    answers: Sequence[Sequence[int]],
    recordings: Sequence[Events],
    counts: Sequence[int],
    logits: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    """Returns `event_costs` of rows that show `counts[row]` frames of the scene in `recordings[row]`."""
    columns = image_columns(target, inputs["input_ids"]).sum(1).tolist()
    kinds = [cell_kinds(r, count, n // count) for r, count, n in zip(recordings, counts, columns, strict=True)]
    return event_costs(target, inputs, answers, kinds, logits)
