"""Stored answers of the recipe: unpacking restores them, each for its prompt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from recipes.msd import answers as recipe
from safetensors.torch import save_file

from msd.errors import UserError
from msd.train.capture import Prompt, capture


class Letters:
    """A tokenizer of letters."""

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        return "".join(chr(i) for i in ids)


def record(images: list[str], prompt: str, answer: str, end: int | None) -> dict[str, Any]:
    ids = [ord(c) for c in answer]
    gain = [round(0.1 * i + 0.0123, 4) for i in range(len(ids) + (end is not None))]
    return {
        "image": images, "prompt": prompt, "answer": answer, "ids": ids, "finished": end is not None, "task": "caption",
        "split": "train", "end": end, "gain": gain, "target": "tiny",
    }  # fmt: skip


RECORDS = [record(["a.jpg"], "what?", "a dog", 2), record(["b.jpg"], "what?", "a c", None), record([], "hé?", "ok", 2)]


@pytest.fixture()
def kept(tmp_path: Path) -> Path:
    save_file(recipe.packed(RECORDS), tmp_path / "answers.safetensors", {"target": "tiny"})
    return tmp_path / "answers.safetensors"


def test_unpacked_answers_equal_the_originals(kept: Path, tmp_path: Path) -> None:
    prompts = [Prompt(r["prompt"], tuple(r["image"]), r["task"]) for r in reversed(RECORDS)]
    records = capture(
        prompts, recipe.StoredAnswers(kept, Letters()), tmp_path / "captured.jsonl", metadata={"target": "tiny"}
    )
    assert records == RECORDS[::-1]


def test_a_prompt_without_a_stored_answer_is_named(kept: Path) -> None:
    with pytest.raises(UserError, match="no stored answer to 'why"):
        recipe.StoredAnswers(kept, Letters())([Prompt("why?", ("a.jpg",))])
