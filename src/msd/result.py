"""`Result`: one answer with its statistics."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from msd.core.statistics import Statistics
from msd.core.tree import Step


@dataclass(frozen=True)
class Result:
    """One answer. tokens: emitted ids without the prompt. finish: why it ended, "eos", "length" or "criteria".

    predicted_modality: the modality that the router predicts for each token, None for the first; None without a router.
    sequences, scores, logits: with `return_dict_in_generate`, the tensors of the whole batch; see `Outputs`.
    """

    text: str
    tokens: list[int]
    finish: str
    method: str
    statistics: Statistics
    predicted_modality: list[str | None] | None = None
    sequences: Tensor | None = field(default=None, repr=False, compare=False)
    scores: tuple[Tensor, ...] | None = field(default=None, repr=False, compare=False)
    logits: tuple[Tensor, ...] | None = field(default=None, repr=False, compare=False)

    @property
    def seconds(self) -> float:
        """Wall time of the whole call, including image encoding and prefill."""
        return self.statistics.seconds["total"]

    @property
    def tokens_per_second(self) -> float:
        """Emitted tokens divided by the wall time of the whole call."""
        return len(self.tokens) / self.seconds if self.seconds else 0.0

    def as_dict(self) -> dict[str, Any]:
        """Returns the result as an object for JSON."""
        own = {"text": self.text, "tokens": self.tokens, "finish": self.finish, "method": self.method}
        if self.predicted_modality is not None:
            own["predicted_modality"] = self.predicted_modality
        statistics = self.statistics.as_dict()
        split = statistics.pop("seconds")
        return {
            **own,
            "seconds": self.seconds,
            "tokens_per_second": self.tokens_per_second,
            **statistics,
            "time": split,
        }


class Outputs:
    """Collects what `generate(return_dict_in_generate=True)` returns, from the steps of a batch.

    Every `Result` of the batch gets the same tensors, with the values of `transformers`' `GenerateDecoderOnlyOutput`:
    sequences: [B, L + T] int64, prompts and answers. scores (with `output_scores`) and logits (with `output_logits`):
    T tensors [B, V] float32, the processed and the raw logits before each new token. After the end of a row, sequences
    hold the padding token. There scores and logits are 0, not the logits of padding tokens as from `generate()`, unless
    rows advance in lockstep. Stopping criteria get no scores, and the key/value cache is not returned.
    """

    def __init__(self, input_ids: Tensor, config: GenerationConfig) -> None:
        self.input_ids, self.config = input_ids, config
        self.tokens: list[list[int]] = [[] for _ in input_ids]
        self.rows: list[list[tuple[Tensor, Tensor]]] = [[] for _ in input_ids]  # (raw, processed) logits per token

    @staticmethod
    def need_logits(config: GenerationConfig) -> bool:
        """Whether `Accepted.logits` are needed."""
        return bool(config.return_dict_in_generate and (config.output_scores or config.output_logits))

    def read(self, step: Step) -> None:
        """Adds the tokens and logits of one step."""
        for row, tokens in enumerate(step.accepted.tokens):
            self.tokens[row] += tokens
            if step.accepted.logits is not None:
                self.rows[row] += step.accepted.logits[row]

    @torch.inference_mode(False)  # ordinary tensors, as those of `generate()`
    def fields(self) -> dict[str, Any]:
        """The fields of `Result`; none without `return_dict_in_generate`."""
        if not self.config.return_dict_in_generate:
            return {}
        padding = self.config._pad_token_tensor
        new = max(map(len, self.tokens))
        answers = self.input_ids.new_full((len(self.tokens), new), 0 if padding is None else int(padding))
        for row, tokens in enumerate(self.tokens):
            answers[row, : len(tokens)] = torch.tensor(tokens)
        return {
            "sequences": torch.cat([self.input_ids, answers], 1),
            "scores": self._by_token(1, new) if self.config.output_scores else None,
            "logits": self._by_token(0, new) if self.config.output_logits else None,
        }

    def _by_token(self, kind: int, new: int) -> tuple[Tensor, ...]:
        """For each of `new` tokens, the raw (kind 0) or processed (kind 1) logits of all rows, [B, V] float32."""
        zeros = torch.zeros_like(self.rows[0][0][kind], dtype=torch.float32)
        rows = [[pair[kind].float() for pair in row] + [zeros] * (new - len(row)) for row in self.rows]
        return tuple(torch.stack(token) for token in zip(*rows, strict=True))
