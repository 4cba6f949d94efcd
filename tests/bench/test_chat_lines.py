"""Data lines of other projects: MMSpec, Spec-Bench, SPEED-Bench, and chats in `messages` or `conversations`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from msd.bench.data import BUNDLED, Sample, load_data
from msd.errors import UserError

DOG = str(BUNDLED / "dog.jpg")
IMAGE = {"type": "image", "image": DOG}
ASK = {"type": "text", "text": "What is it?"}


def samples(folder: Path, *lines: dict[str, Any]) -> list[Sample]:
    path = folder / "d.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return load_data(path)


@pytest.mark.parametrize(
    "line",
    [
        {"image": DOG, "prompt": "What is it?", "answer": "A dog."},
        {"messages": [{"role": "user", "content": [IMAGE, ASK]}, {"role": "assistant", "content": "A dog."}]},
        {"id": "1", "conversations": [
            {"role": "user", "content": [IMAGE, ASK]}, {"role": "assistant", "content": "A dog."},
        ]},
        {"messages": [
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": DOG}}, ASK]},
            {"role": "assistant", "content": [{"type": "text", "text": "A dog."}]},
        ]},
        {"image": DOG, "conversations": [
            {"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A dog."},
        ]},
    ],
)  # fmt: skip
def test_a_chat_of_one_question_is_the_same_sample(tmp_path: Path, line: dict[str, Any]) -> None:
    assert samples(tmp_path, line) == [Sample((BUNDLED / "dog.jpg",), "What is it?", "A dog.", "default")]


def test_turns_of_benchmarks_and_chats_are_conversations(tmp_path: Path) -> None:
    mmspec = {"id": "7", "image": DOG, "turns": ["What is it?", "Where?"], "category": "vqa", "topic": "pets"}
    chat = [{"role": "user", "content": [IMAGE, ASK]}, {"role": "assistant", "content": "A dog."}]
    same = {"category": "vqa", "messages": [*chat, {"role": "user", "content": "Where?"}]}
    expected = [("What is it?", (), "vqa"), ("Where?", ("What is it?",), "vqa")]
    for line in (mmspec, same):
        found = samples(tmp_path, line)
        assert [(s.prompt, s.before, s.task) for s in found] == expected
        assert all(s.images == (BUNDLED / "dog.jpg",) for s in found)
    spec_bench = {"question_id": 81, "category": "writing", "turns": ["Write.", "Again."], "reference": []}
    assert [s.task for s in samples(tmp_path, spec_bench)] == ["writing"] * 2


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi."}]}, "'system'"),
        ({"messages": [{"role": "assistant", "content": "Hi."}]}, "no message of role 'user'"),
        ({"messages": [{"role": "user", "content": [ASK, IMAGE]}]}, "before the text of the first question"),
        ({"messages": [{"role": "user", "content": "Hi."}, {"role": "user", "content": [IMAGE, ASK]}]}, "the first"),
        ({"messages": [{"role": "user", "content": [IMAGE]}]}, "a question without text"),
        ({"conversations": [{"from": "human", "value": "<image>\nHi."}]}, "1 <image> for 0 'image'"),
        ({"messages": [{"role": "user", "content": "Hi."}], "prompt": "Hi."}, "replaces 'prompt' and 'turns'"),
        ({"conversations": [{"from": "human", "value": 3}]}, "message 1 has the content"),
        ({"messages": "Hi."}, "must be a list"),
        ({"messages": [{"role": "user", "content": [{**IMAGE, "image": "https://a.b/c.png"}, ASK]}]}, "file name"),
        ({"prompt": "Hi.", "category": 3}, "'category' must be text"),
    ],
)  # fmt: skip
def test_what_a_line_cannot_express_is_named(tmp_path: Path, line: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=r"d\.jsonl:1: ") as error:
        samples(tmp_path, line)
    assert message in str(error.value)
