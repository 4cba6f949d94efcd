"""Conversations in data lines: the target answers the earlier turns, and every method gets the same history."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from msd.bench.conversation import Conversation
from msd.bench.data import BUNDLED, in_suites, load_data
from msd.errors import UserError
from msd.inputs.images import load_image
from msd.model import SpeculativeVLM


def lines(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_every_turn_is_a_sample_with_the_targets_answers_as_history(
    reference_model: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, processor = reference_model
    image, turns = str(BUNDLED / "dog.jpg"), ["What is it?", "What is it doing?", "Where is it?"]
    file = lines(tmp_path / "d.jsonl", {"image": image, "turns": turns, "task": "chat"}, {"prompt": "Hello."})
    samples = load_data(file)
    assert [(s.prompt, s.before, s.task) for s in samples] == [
        (turns[0], (), "chat"), (turns[1], (turns[0],), "chat"), (turns[2], tuple(turns[:2]), "chat"),
        ("Hello.", (), "default"),
    ]  # fmt: skip
    monkeypatch.setattr("msd.bench.conversation.LONGEST", 8)
    engine, calls = SpeculativeVLM(model, processor, drafter="ar"), []
    generate = engine.generate
    monkeypatch.setattr(engine, "generate", lambda *a, **k: (calls.append(1), generate(*a, **k))[1])
    conversation = Conversation(engine)
    prepared = [conversation(s) for s in samples]
    assert len(calls) == 2, "each earlier answer is decoded once"
    alone = processor(images=load_image(image), text=processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": turns[0]}]}],
        add_generation_prompt=True, tokenize=False,
    ), return_tensors="pt", add_special_tokens=False)  # fmt: skip
    out = model.generate(**alone, max_new_tokens=8, do_sample=False)
    first = processor.tokenizer.decode(out[0, alone["input_ids"].shape[1] :], skip_special_tokens=True).strip()
    chat = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": turns[0]}]},
        {"role": "assistant", "content": [{"type": "text", "text": first}]},
        {"role": "user", "content": [{"type": "text", "text": turns[1]}]},
    ]
    text = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    whole = processor(images=load_image(image), text=text, return_tensors="pt", add_special_tokens=False)
    assert torch.equal(prepared[1]["input_ids"], whole["input_ids"])
    assert "pixel_values" in prepared[2] and "pixel_values" not in prepared[3]


def test_suites_are_tasks(tmp_path: Path) -> None:
    samples = load_data(None)
    assert {"caption", "detail", "vqa", "chat", "text", "ocr"} == {s.task for s in samples}
    assert {s.task for s in in_suites(samples, ["chat", "ocr"])} == {"chat", "ocr"}
    assert in_suites(samples, []) == samples
    with pytest.raises(UserError, match="'videos' is no task of the data; it has caption"):
        in_suites(samples, ["videos"])


@pytest.mark.parametrize(
    "row", [{"turns": []}, {"turns": "Hello."}, {"turns": ["a", 3]}, {"turns": ["a"], "prompt": "b"}]
)
def test_bad_turns_are_refused(tmp_path: Path, row: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"d\.jsonl:1"):
        load_data(lines(tmp_path / "d.jsonl", row))
