"""Converts captured answers to a small file, `answers.safetensors`, and back, which saves an hour of capturing.

python -m recipes.msd.answers pack      # captured answers of `PARTS` in runs/msd -> recipes/msd/answers.safetensors
python -m recipes.msd.answers unpack    # back to jsonl, with the prompts of `PARTS` in runs/msd

The file holds token ids and gains. It holds no prompts and photos, which belong to the data sets; a hash of both
identifies an answer's prompt. The label thresholds are the shipped ones.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from msd.bench.data import data_lines
from msd.bench.modality import SHIPPED
from msd.errors import UserError
from msd.labels.label_thresholds import ModalityThresholds
from msd.loading import load_target
from msd.system.files import write_whole
from msd.targets.registry import fingerprint
from msd.train.capture import Answer, Decoding, Prompt, capture, label_thresholds_path

PARTS = (  # prompts, their answers, and how these were decoded
    ("prompts.jsonl", "captured.jsonl", Decoding()),
    ("val.jsonl", "val_captured.jsonl", Decoding()),
    ("more.jsonl", "more_captured.jsonl", Decoding()),
    ("sampled.jsonl", "sampled_captured.jsonl", Decoding(temperature=1.0)),
)
Record = dict[str, Any]


def key(images: Sequence[str], prompt: str) -> int:
    """Returns a 63-bit hash of a prompt and the names of its images."""
    text = json.dumps([list(images), prompt], ensure_ascii=False).encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "big") >> 1


def packed(records: list[Record]) -> dict[str, Tensor]:
    """Concatenates N answers: key [N] int64, length [N] int32, ended [N] bool; ids and gain of all tokens [T]."""
    ids = [r["ids"] + ([] if r["end"] is None else [r["end"]]) for r in records]
    return {
        "key": torch.tensor([key(r["image"], r["prompt"]) for r in records]),
        "length": torch.tensor([len(row) for row in ids], dtype=torch.int32),
        "ended": torch.tensor([r["end"] is not None for r in records]),
        "ids": torch.tensor([token for row in ids for token in row], dtype=torch.int32),
        "gain": torch.tensor([gain for r in records for gain in r["gain"]], dtype=torch.float32),
    }


def answers(tensors: dict[str, Tensor]) -> dict[int, tuple[list[int], list[float], bool]]:
    """Returns key -> (ids with the end token, gains, whether the last id is the end token)."""
    parts = tensors["length"].tolist()
    rows = zip(tensors["ids"].split(parts), tensors["gain"].split(parts), tensors["ended"].tolist(), strict=True)
    return {
        k: (ids.tolist(), [round(g, 4) for g in gain.tolist()], ended)
        for k, (ids, gain, ended) in zip(tensors["key"].tolist(), rows, strict=True)
    }


def pack(work: Path, kept: Path) -> None:
    """Writes all captured answers to the file `kept`."""
    records = [line for _, name, _ in PARTS for _, line in data_lines(work / name)]
    write_whole(kept, save(packed(records), {"target": records[0]["target"]}))
    print(f"{kept}: {len(records)} answers, {kept.stat().st_size / 1e6:.1f} MB")


class StoredAnswers:
    """A writer for `capture` that returns stored answers. Raises UserError for a prompt without one."""

    def __init__(self, kept: Path, tokenizer: Any) -> None:
        with safe_open(kept, "pt") as file:
            self.target = file.metadata()["target"]
            self.known = answers({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
        self.tokenizer = tokenizer

    def __call__(self, prompts: Sequence[Prompt]) -> list[Answer]:
        """Returns the answers in the order of the prompts."""
        return [self._answer(prompt) for prompt in prompts]

    def _answer(self, prompt: Prompt) -> Answer:
        found = self.known.get(key(prompt.images, prompt.text))
        if found is None:
            raise UserError(f"no stored answer to '{prompt.text[:60]}'; capture the answers again")
        ids, gain, ended = found
        ids, end = (ids[:-1], ids[-1]) if ended else (ids, None)
        text = self.tokenizer.decode(ids, skip_special_tokens=True)
        return Answer(text, tuple(ids), ended, end, tuple(gain))


def unpack(work: Path, kept: Path) -> None:
    """Writes files as `msd capture` does. Raises UserError if the answers are from another model."""
    model, processor = load_target("reference")
    write, name = StoredAnswers(kept, processor.tokenizer), fingerprint(model)
    if name != write.target:
        raise UserError(
            f"'{kept}' was written by {write.target}, the reference model is {name}; capture the answers again"
        )
    thresholds = ModalityThresholds.load(SHIPPED)
    for source, captured, decoding in PARTS:
        lines = [line for _, line in data_lines(work / source)]
        prompts = [
            Prompt(line["prompt"], (line["image"],) if "image" in line else (), line["task"], line["split"])
            for line in lines
        ]
        records = capture(prompts, write, work / captured, metadata={"target": name} | decoding.metadata)
        thresholds.save(label_thresholds_path(work / captured))
        print(f"{work / captured}: {len(records)} answers")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("pack", "unpack"))
    parser.add_argument("--work", type=Path, default=Path("runs/msd"))
    parser.add_argument("--kept", type=Path, default=Path(__file__).with_name("answers.safetensors"))
    args = parser.parse_args()
    (pack if args.what == "pack" else unpack)(args.work, args.kept)


if __name__ == "__main__":
    main()
