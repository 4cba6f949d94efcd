"""Labels answers that a server wrote: the target computes the image gain of every token, and generates nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from msd.errors import UserError
from msd.labels.gain import answer_logits
from msd.train.capture import Answer, Key, Prompt
from msd.train.target_writer import TargetWriter


class AnswerLabeller(TargetWriter):
    """Returns given answers to `capture`, with gains. given: records of `capture`, by prompt.

    Answers without token ids are tokenised. An answer is cut after `max_new_tokens` tokens."""

    def __init__(
        self, given: Mapping[Key, dict[str, Any]], model: PreTrainedModel, processor: Any, folder: Path,
        max_new_tokens: int, backend: str = "measure",
    ) -> None:  # fmt: skip
        super().__init__(model, processor, folder, max_new_tokens, backend)
        self.given, self._greedy = given, [0, 0]
        ends = model.generation_config.eos_token_id
        self.ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)

    def check(self, prompt: Prompt) -> None:
        """See `TargetWriter.check`; raises UserError too if there is no answer."""
        if prompt.key not in self.given:
            raise UserError("no answer is given; let the server write all of them first")
        super().check(prompt)

    def generate(self, prompts: Sequence[Prompt], inputs: dict[str, Any]) -> tuple[list[Answer], list[Tensor]]:
        """See `TargetWriter.generate`: the given answers and the target's logits at their tokens."""
        answers = [self._given(self.given[p.key]) for p in prompts]
        logits = answer_logits(self.engine.target, inputs, [a.tokens for a in answers])
        for answer, rows in zip(answers, logits, strict=True):
            tokens = rows.new_tensor(answer.tokens).long()
            self._greedy[0] += int((rows.argmax(-1) == tokens).sum())
            self._greedy[1] += len(tokens)
        return answers, list(logits)

    def greedy_share(self) -> float | None:
        """Returns the share of the tokens labelled so far that the target's greedy decoding gives; None without any."""
        return self._greedy[0] / self._greedy[1] if self._greedy[1] else None

    def _given(self, record: dict[str, Any]) -> Answer:
        ids = list(record["ids"])
        if not ids:
            ids = list(self.processor.tokenizer(record["answer"], add_special_tokens=False)["input_ids"])
        end, finished = None, record["finished"]
        if ids and ids[-1] in self.ends:
            end = ids.pop()
        elif finished and self.ends:
            end = self.ends[0]
        if len(ids) > self.max_new_tokens - (end is not None):
            ids, end, finished = ids[: self.max_new_tokens], None, False
        return Answer(record["answer"], tuple(ids), finished, end)
