"""The proposer for vLLM: without vLLM its drafts, and with it the same text, and drafts that are accepted."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from recipes.scale import vllm_checkpoints, vllm_process
from vllm_answers import needs_vllm, patient, served

from msd.serve.vllm_proposer import LONGEST, Chances, RepeatProposer, match

IMAGE, DEPTH = 99, 6


def proposer() -> RepeatProposer:
    config = SimpleNamespace(image_token_index=IMAGE)
    return RepeatProposer(
        SimpleNamespace(
            speculative_config=SimpleNamespace(num_speculative_tokens=DEPTH),
            model_config=SimpleNamespace(max_model_len=64, hf_config=config),
        )
    )


def draft(engine: RepeatProposer, tokens: list[int], emitted: int = 1) -> list[int]:
    """The draft of a batch of one row that has just emitted its last tokens."""
    return engine.propose([tokens[len(tokens) - emitted :]], np.array([len(tokens)]), np.array([[*tokens, 0, 0, 0]]))[0]


def slow_match(tokens: list[int], marks: list[int]) -> tuple[int, int]:
    """The same by comparing lists."""
    for length in range(min(LONGEST, len(tokens) - 1), 1, -1):
        last = tokens[-length:]
        for end in range(len(tokens) - 1, length - 1, -1):
            if tokens[end - length : end] == last and not set(last) & set(marks):
                return length, end
    return 0, 0


def test_the_longest_newest_match_is_found() -> None:
    random = np.random.default_rng(0)
    matched = 0
    for _ in range(400):
        tokens = random.choice([1, 2, 3, IMAGE], random.integers(1, 40), p=[0.5, 0.3, 0.15, 0.05])
        found = match(tokens, [IMAGE])
        assert found == slow_match(tokens.tolist(), [IMAGE])
        matched += found[0] > 2
    assert matched > 100


def test_a_long_match_drafts_more_than_a_short_one_and_never_a_placeholder() -> None:
    text = list(range(1, 21))
    assert draft(proposer(), [*text, *text[:13]]) == text[13 : 13 + DEPTH]
    short = draft(proposer(), [*text, 50, *text[4:6]])
    assert 0 < len(short) < DEPTH and short == text[6 : 6 + len(short)]
    assert draft(proposer(), text) == []
    assert draft(proposer(), [*text[:14], IMAGE, *text[:13]]) == text[13:14]


def test_what_is_refused_is_drafted_less_in_requests_of_the_same_kind_alone() -> None:
    engine, text = proposer(), list(range(1, 21))
    prompt = [*text, *text[:13]]
    for _ in range(40):
        assert draft(engine, prompt) == text[13 : 13 + engine.chances.length((False, 0))]
        draft(engine, [*prompt, 70])  # another token than drafted
    assert len(draft(engine, prompt)) < DEPTH
    assert len(draft(engine, [IMAGE, *prompt])) == DEPTH
    again = Chances(DEPTH)
    assert again.length((False, 0)) == DEPTH
    for _ in range(40):
        again.observe((False, 3), 2, 2)
    assert again.length((False, 3)) >= 2


def test_another_request_in_the_row_is_not_counted() -> None:
    engine, text = proposer(), list(range(1, 21))
    before = engine.chances.tried.sum()
    assert draft(engine, [*text, *text[:13]])
    draft(engine, [5, 6, 7, 8])
    assert engine.chances.tried.sum() == before


@pytest.mark.slow
@pytest.mark.full
@patient
@needs_vllm
def test_vllm_serves_with_it(reference_model: tuple[Any, Any], tmp_path: Path) -> None:
    """The same text; the long answer repeats itself, and these repeats are drafted."""
    processor = reference_model[1]
    model = vllm_checkpoints.language_model(tmp_path)
    prompts = [vllm_checkpoints.text_prompt(processor, p) for p in ("Count from one to thirty in words, twice.", "Hi")]
    speculative = {
        "method": "custom_class",
        "model": "msd.serve.vllm_proposer.RepeatProposer",
        "num_speculative_tokens": 8,
    }
    path = str(vllm_process.ROOT / "src")
    plain, repeats = served(model, prompts, None, speculative, tokens=120, batches=[2], path=path)
    assert repeats.answers == plain.answers
    assert repeats.figures is not None and repeats.figures["num_accepted_draft_tokens"] > 0
