"""Generates greedy answers with any model that has `generate`, for `msd.train.capture`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from msd.backends import choose
from msd.train.capture import Answer, Prompt

Encode = Callable[[Sequence[Prompt]], Mapping[str, Tensor]]


class GreedyWriter:
    """Generates greedy answers with any model that has `generate`.

    `encode(prompts)` returns left-padded `input_ids` [B, T] and `attention_mask` [B, T], plus the model's image inputs
    (`pixel_values`, ...).
    """

    def __init__(self, model: Any, tokenizer: Any, encode: Encode, max_new_tokens: int, end: int):
        self.model, self.tokenizer, self.encode = model, tokenizer, encode
        self.max_new_tokens, self.end = max_new_tokens, end
        self.backend = choose(model)

    @torch.inference_mode()
    def __call__(self, prompts: Sequence[Prompt]) -> list[Answer]:
        """Returns the answers, each up to the end token or `max_new_tokens`."""
        inputs = {k: v.to(self.model.device) for k, v in self.encode(prompts).items()}
        ends = {"eos_token_id": self.end, "pad_token_id": self.end}
        with self.backend.running():
            out = self.model.generate(**inputs, max_new_tokens=self.max_new_tokens, do_sample=False, **ends)
        answers = []
        for row in out[:, inputs["input_ids"].shape[1] :].tolist():
            finished = self.end in row
            ids = row[: row.index(self.end)] if finished else row
            answers.append(Answer(self.tokenizer.decode(ids, skip_special_tokens=True), tuple(ids), finished))
        return answers


def left_padded(rows: Sequence[Sequence[int]], pad: int) -> dict[str, Tensor]:
    """Pads token ids on the left. Returns `input_ids` and `attention_mask`, both [B, T] int64."""
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), pad, dtype=torch.long)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for b, row in enumerate(rows):
        ids[b, width - len(row) :] = torch.tensor(row)
        mask[b, width - len(row) :] = 1
    return {"input_ids": ids, "attention_mask": mask}
