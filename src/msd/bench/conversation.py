"""Data lines as prompts: earlier turns, which the target answers itself; and a check of all lines before any answer."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from msd.bench.data import Sample
from msd.errors import UserError
from msd.events import open_chunks
from msd.inputs import prompts
from msd.inputs.media import Video
from msd.model import SpeculativeVLM

LONGEST = 64  # tokens of an earlier answer


class Conversation:
    """What every method is asked: the same for all of them, prepared outside any timing."""

    def __init__(self, engine: SpeculativeVLM) -> None:
        """engine: decodes the earlier answers, greedily; each once."""
        self.engine = engine
        self._answers: dict[tuple[Any, ...], str] = {}

    def __call__(self, *samples: Sample) -> dict[str, Any]:
        """input_ids [B, L] and what else the target takes, of B samples asked together."""
        return self._prepared(samples, self._answer)

    def unanswered(self, sample: Sample) -> dict[str, Any]:
        """The same of one sample, with a dash for every earlier answer: what can be told before anything is asked."""
        return self._prepared([sample], lambda *_: "-")

    def _prepared(self, samples: Sequence[Sample], answer: Callable[[Sample, int], str]) -> dict[str, Any]:
        pictures = [list(sample.images) for sample in samples]
        return prompts.prepare(self.engine.processor, pictures, chats=[self._chat(s, answer) for s in samples])

    def _chat(self, sample: Sample, answer: Callable[[Sample, int], str]) -> prompts.Messages:
        chat: prompts.Messages = []
        for i, question in enumerate((*sample.before, sample.prompt)):
            prompts.check_text(question)
            pictures = [{"type": prompts.kind(source)} for source in sample.images] if i == 0 else []
            chat.append({"role": "user", "content": [*pictures, _text(question)]})
            if i < len(sample.before):
                chat.append({"role": "assistant", "content": [_text(answer(sample, i))]})
        return chat

    def _answer(self, sample: Sample, turn: int) -> str:
        """The target's answer to turn `turn`."""
        asked = sample.before[: turn + 1]
        key = (sample.images, asked)
        if key not in self._answers:
            earlier = Sample(sample.images, asked[-1], None, sample.task, before=asked[:-1])
            answer = self.engine.generate(**self(earlier), max_new_tokens=LONGEST, do_sample=False)
            self._answers[key] = answer.text.strip()
        return self._answers[key]


def _text(words: str) -> dict[str, str]:
    return {"type": "text", "text": words}


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
