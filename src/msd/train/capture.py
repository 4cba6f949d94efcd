"""Answers written by a model, for training another on: batched, resumable, each question once.

Knows nothing of a model's prompt format: `encode` turns prompts (with or without images) into what `generate` takes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class Prompt:
    """A question about zero or more images (paths, as the data names them)."""

    text: str
    images: tuple[str, ...] = ()
    task: str = ""


@dataclass(frozen=True)
class Answer:
    """What the model wrote: generated ids without the end token, and whether it ended by itself."""

    text: str
    ids: tuple[int, ...]
    finished: bool


class Writer(Protocol):
    """Writes one answer per prompt."""

    def __call__(self, prompts: Sequence[Prompt]) -> list[Answer]:
        """Answers in the order of the prompts."""
        ...


Encode = Callable[[Sequence[Prompt]], Mapping[str, Tensor]]


class GreedyWriter:
    """Greedy answers of any model with `generate`.

    `encode(prompts)` returns left-padded `input_ids` [B, T] and `attention_mask` [B, T], plus what the model needs to
    see its images (`pixel_values`, ...).
    """

    def __init__(self, model: Any, tokenizer: Any, encode: Encode, max_new_tokens: int, end: int):
        self.model, self.tokenizer, self.encode = model, tokenizer, encode
        self.max_new_tokens, self.end = max_new_tokens, end

    @torch.inference_mode()
    def __call__(self, prompts: Sequence[Prompt]) -> list[Answer]:
        """Greedy answers, each until the end token or `max_new_tokens`."""
        inputs = {k: v.to(self.model.device) for k, v in self.encode(prompts).items()}
        out = self.model.generate(
            **inputs, max_new_tokens=self.max_new_tokens, do_sample=False, eos_token_id=self.end, pad_token_id=self.end
        )
        answers = []
        for row in out[:, inputs["input_ids"].shape[1] :].tolist():
            finished = self.end in row
            ids = row[: row.index(self.end)] if finished else row
            answers.append(Answer(self.tokenizer.decode(ids, skip_special_tokens=True), tuple(ids), finished))
        return answers


def left_padded(rows: Sequence[Sequence[int]], pad: int) -> dict[str, Tensor]:
    """Token ids of several prompts -> `input_ids` and `attention_mask`, both [B, T] int64, padded on the left."""
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), pad, dtype=torch.long)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for b, row in enumerate(rows):
        ids[b, width - len(row) :] = torch.tensor(row)
        mask[b, width - len(row) :] = 1
    return {"input_ids": ids, "attention_mask": mask}


def capture(
    prompts: Iterable[Prompt],
    write: Writer,
    path: Path,
    batch: int = 16,
    report: Callable[[int, int], None] | None = None,
) -> list[dict[str, Any]]:
    """Write one jsonl record per distinct (images, text); those already in `path` are kept and not asked again.

    A record is `{"image": [...], "prompt", "answer", "ids", "finished", "task"}`. An interrupted run continues where
    it stopped; a half-written last line is dropped. `report(done, total)` is called after each batch. Returns all
    records that answer `prompts`, in the order of `prompts`.
    """
    wanted = list(dict.fromkeys(Prompt(p.text, p.images, p.task) for p in prompts))
    wanted = list({(p.images, p.text): p for p in reversed(wanted)}.values())[::-1]
    done = _read_back(path)
    todo = [p for p in wanted if (p.images, p.text) not in done]
    todo.sort(key=lambda p: (len(p.images), len(p.text)))  # alike in length: little padding
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as f:
        for start in range(0, len(todo), batch):
            group = todo[start : start + batch]
            for p, a in zip(group, write(group), strict=True):
                record = {
                    "image": list(p.images),
                    "prompt": p.text,
                    "answer": a.text,
                    "ids": list(a.ids),
                    "finished": a.finished,
                    "task": p.task,
                }
                done[p.images, p.text] = record
                f.write(json.dumps(record, ensure_ascii=False) + "\n")
            f.flush()
            if report:
                report(len(wanted) - len(todo) + start + len(group), len(wanted))
    return [done[p.images, p.text] for p in wanted]


def _read_back(path: Path) -> dict[tuple[tuple[str, ...], str], dict[str, Any]]:
    """Records of an earlier run; cuts a half-written last line off the file."""
    if not path.exists():
        return {}
    raw = path.read_bytes()
    whole = raw[: raw.rfind(b"\n") + 1]
    if len(whole) < len(raw):
        path.write_bytes(whole)
    records = [json.loads(line) for line in whole.decode("utf-8").splitlines()]
    return {(tuple(r["image"]), r["prompt"]): r for r in records}
