"""Processor output of data lines, earlier turns of a conversation included, which the target answers itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from msd.bench.data import Sample
from msd.inputs import prompts
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
