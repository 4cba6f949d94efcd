"""Capture: each prompt is answered once, an interrupted run resumes, and batched answers equal single ones."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from recipes.reference_vlm.writer import GreedyWriter, left_padded
from transformers import LlamaConfig, LlamaForCausalLM

from msd.train.capture import Answer, Prompt, capture


class Echo:
    def __init__(self, fail_after: int = 10**9):
        self.prompts: list[Prompt] = []
        self.fail_after = fail_after

    def __call__(self, prompts: Sequence[Prompt]) -> list[Answer]:
        if len(self.prompts) >= self.fail_after:
            raise KeyboardInterrupt
        self.prompts += prompts
        return [Answer(p.text.upper(), (len(p.text),), True) for p in prompts]


PROMPTS = [Prompt("a"), Prompt("bb", ("x.jpg",)), Prompt("bb"), Prompt("a"), Prompt("ccc", ("x.jpg", "y.jpg"), "video")]


def test_each_prompt_once_and_in_order(tmp_path: Path) -> None:
    write = Echo()
    records = capture(PROMPTS, write, tmp_path / "out.jsonl", batch=2)
    assert [(r["prompt"], r["image"]) for r in records] == [
        ("a", []),
        ("bb", ["x.jpg"]),
        ("bb", []),
        ("ccc", ["x.jpg", "y.jpg"]),
    ]
    assert len(write.prompts) == 4
    assert records[3]["task"] == "video"
    assert records[3]["answer"] == "CCC"


def test_an_interrupted_capture_resumes(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    with pytest.raises(KeyboardInterrupt):
        capture(PROMPTS, Echo(fail_after=2), path, batch=2)
    with path.open("a") as f:
        f.write('{"prompt": "half')
    again = Echo()
    records = capture(PROMPTS, again, path, batch=2)
    assert len(again.prompts) == 2
    assert records == capture(PROMPTS, Echo(fail_after=0), path)


def test_batched_greedy_answers_equal_single_ones() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=2,
    )
    model = LlamaForCausalLM(config).eval()

    class Tokenizer:
        def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
            return " ".join(map(str, ids))

    write = GreedyWriter(
        model, Tokenizer(), lambda ps: left_padded([[int(t) for t in p.text.split()] for p in ps], 2), 6, end=2
    )
    prompts = [Prompt("3 4 5"), Prompt("7"), Prompt("9 8 7 6 5")]
    together = write(prompts)
    assert together == [write([p])[0] for p in prompts]
    assert all(2 not in a.ids and len(a.ids) <= 6 for a in together)
