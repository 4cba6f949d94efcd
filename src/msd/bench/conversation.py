"""Turns samples into model inputs, and checks all of them before anything is computed.

The target itself answers the earlier turns of a conversation, so that every method gets the same history.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from msd.bench.data import Sample
from msd.errors import UserError
from msd.events import open_chunks
from msd.inputs import prompts
from msd.inputs.media import Video
from msd.model import SpeculativeVLM

LONGEST = 64  # tokens of the answer to an earlier turn, at most


class Conversation:
    """Prepares the inputs of samples. The answers to earlier turns are decoded greedily, each once."""

    def __init__(self, engine: SpeculativeVLM) -> None:
        """engine: answers the earlier turns."""
        self.engine = engine
        self._answers: dict[tuple[Any, ...], str] = {}

    def __call__(self, *samples: Sample, answered: bool = True) -> dict[str, Any]:
        """Returns the processor output for a batch of B samples: input_ids [B, L], pixel values and the like.

        answered: if False, "-" replaces each earlier answer, so that nothing is decoded.
        """
        return self.request(*samples, answered=answered).inputs()

    def request(self, *samples: Sample, answered: bool = True) -> prompts.Request:
        """Returns what the processor output is made of; our engines get both, as `transformers` gets the tensors."""
        chats = [self._chat(sample, answered) for sample in samples]
        return prompts.Request.of(self.engine.processor, [list(sample.images) for sample in samples], chats=chats)

    def _chat(self, sample: Sample, answered: bool) -> prompts.Messages:
        chat: prompts.Messages = []
        for i, question in enumerate((*sample.before, sample.prompt)):
            prompts.check_text(question)
            pictures = [{"type": prompts.kind(source)} for source in sample.images] if i == 0 else []
            chat.append({"role": "user", "content": [*pictures, {"type": "text", "text": question}]})
            if i < len(sample.before):
                answer = self._answer(sample, i) if answered else "-"
                chat.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
        return chat

    def _answer(self, sample: Sample, turn: int) -> str:
        """Returns the target's answer to turn `turn` of the conversation."""
        turns = sample.before[: turn + 1]
        key = (sample.images, turns)
        if key not in self._answers:
            earlier = Sample(sample.images, turns[-1], None, sample.task, before=turns[:-1])
            answer = self.engine.generate(**self(earlier), max_new_tokens=LONGEST, do_sample=False)
            self._answers[key] = answer.text.strip()
        return self._answers[key]


def check_files(samples: Sequence[Sample]) -> None:
    """Raises UserError, with file and line, for an invalid prompt or an unreadable file. Needs no model."""
    readable: set[Any] = set()
    for sample in samples:
        with _located(sample):
            for text in (*sample.before, sample.prompt):
                prompts.check_text(text)
            for source in sample.images:
                if source not in readable:
                    prompts.load(source)
                    readable.add(source)
            if sample.events is not None and sample.events not in readable:
                open_chunks(sample.events)
                readable.add(sample.events)


def check_prompts(conversation: Conversation, samples: Sequence[Sample], max_new_tokens: int) -> None:
    """Raises UserError, with file and line, for a prompt that the processor refuses or that exceeds the context."""
    context = conversation.engine.target.context_length
    for sample in samples:
        with _located(sample):
            length = conversation(sample, answered=False)["input_ids"].shape[1] + LONGEST * len(sample.before)
            if context is not None and length + max_new_tokens > context:
                raise UserError(
                    f"{length} prompt tokens and {max_new_tokens} new ones do not fit the model's context of "
                    f"{context}; shorten the prompt or lower --max-new-tokens"
                )


def digest(samples: Sequence[Sample]) -> str:
    """Returns a hash of the prompts and of the contents of all their files."""
    file_hashes: dict[Path, str] = {}
    total = hashlib.sha256()
    for sample in samples:
        frames = [source.frames if isinstance(source, Video) else 0 for source in sample.images]
        text = (sample.before, sample.prompt, sample.task, frames, sample.events is not None)
        total.update(repr(text).encode("utf-8", "surrogatepass"))
        for source in (*sample.images, *([] if sample.events is None else [sample.events])):
            path = Path(source.path if isinstance(source, Video) else source)
            if path not in file_hashes:
                with path.open("rb") as file:
                    file_hashes[path] = hashlib.file_digest(file, "sha256").hexdigest()
            total.update(file_hashes[path].encode())
    return total.hexdigest()[:16]


@contextmanager
def _located(sample: Sample) -> Iterator[None]:
    """Adds file and line of the sample to the message of an error."""
    try:
        yield
    except (UserError, ValueError) as error:  # ValueError: from the processor
        raise UserError(f"{sample.where}: {error}" if sample.where else str(error)) from error
