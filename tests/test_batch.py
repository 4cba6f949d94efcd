"""Rows of a batch of unequal prompts answer as if each were alone."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

import tiny
from msd.config import SpeculativeConfig
from msd.errors import UserError
from msd.model import SpeculativeVLM
from msd.result import Result
from random_drafter import RandomDrafter

NEW = 16
Inputs = dict[str, Tensor]

ROWS = {
    "llava": [tiny.llava_inputs(1, images=1), tiny.llava_inputs(2, images=2, words=8), tiny.llava_inputs(3, images=0)],
    "llava_next": [tiny.llava_next_inputs(1), tiny.llava_next_inputs(2, words=7)],
}
SETTINGS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "T=0.9": {"do_sample": True, "temperature": 0.9, "top_k": 0},
    "repetition": {"do_sample": True, "repetition_penalty": 1.3, "top_k": 20},
    "prompt-repetition": {"do_sample": True, "encoder_repetition_penalty": 1.3},
    "prompt-ngram": {"encoder_no_repeat_ngram_size": 2},
    "min-new-tokens": {"do_sample": True, "min_new_tokens": 10},
}


@cache
def model(family: str) -> Any:
    return (tiny.llava if family == "llava" else tiny.llava_next)(sharpness=10.0)


def alone(family: str, row: Inputs, seed: int, **kwargs: Any) -> list[int]:
    """What `transformers` answers to one prompt."""
    target = model(family)
    torch.manual_seed(seed)
    return target.generate(**row, **kwargs)[0, row["input_ids"].shape[1] :].tolist()


def together(vlm: SpeculativeVLM, rows: list[Inputs], **kwargs: Any) -> list[Result]:
    results = vlm.generate(**tiny.batch(*rows), **kwargs)
    assert isinstance(results, list)
    return results


@pytest.mark.parametrize("method", ["ar", "prompt-lookup", "random"])
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("family", ROWS)
def test_rows_answer_as_if_alone(family: str, setting: str, method: str) -> None:
    rows, kwargs = ROWS[family], {**SETTINGS[setting], "max_new_tokens": NEW}
    wanted = [alone(family, row, 40 + i, **kwargs) for i, row in enumerate(rows)]
    drafter = RandomDrafter(1, 64, wanted) if method == "random" else method
    always = SpeculativeConfig(adaptive=False)  # how much is drafted must not depend on the clock
    results = together(SpeculativeVLM(model(family), None, always, drafter), rows, seed=40, **kwargs)
    assert [r.tokens for r in results] == wanted
    if method == "random":
        assert results[0].statistics.num_accepted_draft_tokens > 3


def test_sampled_drafts_of_a_batch_are_lossless_when_greedy() -> None:
    rows = ROWS["llava"]
    wanted = [alone("llava", row, 0, max_new_tokens=NEW) for row in rows]
    results = together(SpeculativeVLM(model("llava"), None, drafter="prompt-lookup:sampled"), rows, max_new_tokens=NEW)
    assert [r.tokens for r in results] == wanted


@pytest.mark.parametrize("method", ["ar", "prompt-lookup:sampled"])
def test_seeds_of_rows_may_be_given_one_by_one(method: str) -> None:
    """Also where candidates are sampled: a row's randomness is its own."""
    rows, kwargs = ROWS["llava"][:2], {"do_sample": True, "temperature": 0.9, "max_new_tokens": NEW}
    vlm = SpeculativeVLM(model("llava"), None, drafter=method)
    single = [vlm.generate(**row, seed=seed, **kwargs) for row, seed in zip(rows, (8, 3), strict=True)]
    assert [r.tokens for r in together(vlm, rows, seed=[8, 3], **kwargs)] == [r.tokens for r in single]  # type: ignore


def test_a_row_that_ends_early_waits_for_the_others() -> None:
    rows, kwargs = ROWS["llava"], {"do_sample": True, "temperature": 0.9, "max_new_tokens": NEW}
    free = [alone("llava", row, i, **kwargs, eos_token_id=None) for i, row in enumerate(rows)]
    eos = [free[0][2], free[1][9]]
    wanted = [alone("llava", row, i, **kwargs, eos_token_id=eos) for i, row in enumerate(rows)]
    assert len({len(w) for w in wanted}) > 1
    vlm = SpeculativeVLM(model("llava"), None, drafter=RandomDrafter(3, 64, free))
    results = together(vlm, rows, seed=0, **kwargs, eos_token_id=eos)
    assert [r.tokens for r in results] == wanted
    assert [r.finish for r in results] == ["eos" if w[-1] in eos else "length" for w in wanted]


@pytest.mark.parametrize("row", [0, 2])
@pytest.mark.parametrize("settings", [{}, {"encoder_repetition_penalty": 1.3}, {"encoder_no_repeat_ngram_size": 2}])
def test_num_return_sequences(row: int, settings: dict[str, Any]) -> None:
    """With an image and without one."""
    inputs, kwargs = ROWS["llava"][row], {"do_sample": True, "temperature": 0.9, "max_new_tokens": NEW, **settings}
    wanted = [alone("llava", inputs, 5 + i, **kwargs) for i in range(3)]
    assert len(set(map(tuple, wanted))) == 3
    vlm = SpeculativeVLM(model("llava"), None, drafter="prompt-lookup")
    results = vlm.generate(**inputs, **kwargs, seed=5, num_return_sequences=3)
    assert isinstance(results, list)
    assert [r.tokens for r in results] == wanted


def test_plain_sampling_of_a_batch_draws_as_generate_draws() -> None:
    """With one generator for all rows, while none has ended."""
    row = ROWS["llava"][0]
    rows, kwargs = [row, row], {"do_sample": True, "max_new_tokens": NEW, "eos_token_id": None}
    inputs = tiny.batch(*rows)
    target = model("llava")
    torch.manual_seed(1)
    wanted = target.generate(**inputs, **kwargs)[:, inputs["input_ids"].shape[1] :].tolist()
    vlm = SpeculativeVLM(target, None, drafter="ar")
    results = together(vlm, rows, seed=torch.Generator().manual_seed(1), **kwargs)
    assert [r.tokens for r in results] == wanted


@pytest.mark.parametrize(
    "kwargs, said",
    [({"streamer": object()}, "streamer"), ({"seed": [1]}, "1 seeds for 2"), ({"guidance_scale": 2.0}, "guidance")],
)
def test_what_a_batch_cannot_do_is_refused(kwargs: dict[str, Any], said: str) -> None:
    vlm = SpeculativeVLM(model("llava"), None)
    with pytest.raises(UserError, match=said):
        vlm.generate(**tiny.batch(*ROWS["llava"][:2]), max_new_tokens=NEW, **kwargs)
