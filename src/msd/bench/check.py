"""Data lines looked at before anything is answered: a bad one is named by file and line, and costs no work."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from msd.bench.conversation import LONGEST, Conversation
from msd.bench.data import Sample
from msd.errors import UserError
from msd.events import open_chunks
from msd.inputs import prompts
from msd.inputs.videos import Video


def check_files(samples: Sequence[Sample]) -> None:
    """UserError that names the line whose prompt is none, or whose pictures, videos or events cannot be read.

    Needs no model.
    """
    good: set[Any] = set()
    for sample in samples:
        with _named(sample):
            for text in (*sample.before, sample.prompt):
                prompts.check_text(text)
            for source in sample.images:
                if source not in good:
                    prompts.load(source)
                    good.add(source)
            if sample.events is not None and sample.events not in good:
                open_chunks(sample.events)
                good.add(sample.events)


def check_prompts(ask: Conversation, samples: Sequence[Sample], new: int) -> None:
    """UserError that names the line that the processor refuses, or that leaves no room for `new` answer tokens."""
    context = ask.engine.target.context_length
    for sample in samples:
        with _named(sample):
            length = ask.unanswered(sample)["input_ids"].shape[1] + LONGEST * len(sample.before)
            if context is not None and length + new > context:
                raise UserError(
                    f"{length} prompt tokens and {new} new ones do not fit the model's context of {context}; "
                    "shorten the prompt or lower --max-new-tokens"
                )


def digest(samples: Sequence[Sample]) -> str:
    """A hash of everything that the samples ask and show, the bytes of their files included."""
    known: dict[Path, str] = {}
    found = hashlib.sha256()
    for sample in samples:
        frames = [source.frames if isinstance(source, Video) else 0 for source in sample.images]
        asked = (sample.before, sample.prompt, sample.task, frames, sample.events is not None)
        found.update(repr(asked).encode("utf-8", "surrogatepass"))
        for source in (*sample.images, *([] if sample.events is None else [sample.events])):
            path = Path(source.path if isinstance(source, Video) else source)
            if path not in known:
                with path.open("rb") as file:
                    known[path] = hashlib.file_digest(file, "sha256").hexdigest()
            found.update(known[path].encode())
    return found.hexdigest()[:16]


@contextmanager
def _named(sample: Sample) -> Iterator[None]:
    """Puts file and line before what is wrong with a sample."""
    try:
        yield
    except (UserError, ValueError) as error:  # ValueError: of a processor
        raise UserError(f"{sample.where}: {error}" if sample.where else str(error)) from error
