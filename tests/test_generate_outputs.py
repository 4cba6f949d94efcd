"""`generate(return_dict_in_generate=True)`: sequences, scores and logits are those of `transformers` `generate()`."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

import tiny
from msd.config import SpeculativeConfig
from msd.errors import UserError
from msd.model import SpeculativeVLM
from msd.result import Result
from random_drafter import RandomDrafter

NEW = 24
OUTPUTS = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
ONE = tiny.llava_inputs(0)
THREE = tiny.batch(*(tiny.llava_inputs(seed, images=1, words=8 + 3 * seed) for seed in range(3)))
SETTINGS: dict[str, dict[str, Any]] = {
    "greedy, with a penalty": {"do_sample": False, "repetition_penalty": 1.3},
    "sampled": {"do_sample": True, "temperature": 0.9, "top_k": 20},
}


@cache
def model() -> Any:
    return tiny.llava(sharpness=10.0)


def expected(inputs: dict[str, Any], **kwargs: Any) -> Any:
    torch.manual_seed(0)
    return model().generate(**inputs, max_new_tokens=NEW, **OUTPUTS, **kwargs)


def ours(inputs: dict[str, Any], drafter: Any, verifier: str = "lossless", **kwargs: Any) -> list[Result]:
    engine = SpeculativeVLM(model(), None, SpeculativeConfig(nodes=12, adaptive=False, verifier=verifier), drafter)
    torch.manual_seed(0)
    results = engine.generate(**inputs, max_new_tokens=NEW, **OUTPUTS, **kwargs)
    return results if isinstance(results, list) else [results]


@pytest.mark.parametrize("inputs", [ONE, THREE], ids=["one row", "three padded rows"])
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("method", ["ar", "prompt-lookup", None])
def test_outputs_are_those_of_generate(inputs: dict[str, Any], setting: str, method: str | None) -> None:
    wanted, L = expected(inputs, **SETTINGS[setting]), inputs["input_ids"].shape[1]
    answers = wanted.sequences[:, L:].tolist()
    results = ours(inputs, method or RandomDrafter(0, 64, answers), **SETTINGS[setting])
    assert len(results) == len(inputs["input_ids"])
    assert method or sum(r.statistics.num_accepted_draft_tokens for r in results) > 0
    for row, result in enumerate(results):
        assert torch.equal(result.sequences, wanted.sequences)
        assert result.scores is not None and result.logits is not None
        assert len(result.scores) == len(result.logits) == len(wanted.scores)
        for t in range(len(result.tokens)):
            assert torch.allclose(result.scores[t][row], wanted.scores[t][row], atol=1e-4)
            assert torch.allclose(result.logits[t][row], wanted.logits[t][row], atol=1e-4)
            assert (result.scores[t].shape, result.scores[t].dtype) == (wanted.scores[t].shape, torch.float32)
        for t in range(len(result.tokens), len(result.scores)):
            assert not result.scores[t][row].any() and not result.logits[t][row].any(), "0 after the end of a row"
    assert inputs is ONE or len({len(r.tokens) for r in results}) > 1 or setting == "sampled", "unequal lengths"


class Custom(LogitsProcessor):
    """A processor that is not the library's, so that rows decode in lockstep."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores - 0.5 * scores.mean(-1, keepdim=True)


def test_in_lockstep_finished_rows_have_the_scores_of_generate_too() -> None:
    kwargs = {"do_sample": False, "repetition_penalty": 1.3}
    wanted = expected(THREE, logits_processor=LogitsProcessorList([Custom()]), **kwargs)
    (first, *_) = ours(THREE, "prompt-lookup", logits_processor=LogitsProcessorList([Custom()]), **kwargs)
    assert torch.equal(first.sequences, wanted.sequences) and first.scores is not None
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(first.scores, wanted.scores, strict=True))


def test_only_what_is_asked_for_is_returned() -> None:
    engine = SpeculativeVLM(model(), None, drafter="ar")
    plain = engine.generate(**ONE, max_new_tokens=3, output_scores=True)
    assert (plain.sequences, plain.scores, plain.logits) == (None, None, None), "as the library has it"
    config = GenerationConfig(max_new_tokens=3, return_dict_in_generate=True, output_logits=True, pad_token_id=tiny.PAD)
    result = engine.generate(**ONE, generation_config=config)
    assert result.sequences is not None and result.scores is None and len(result.logits) == len(result.tokens)
    assert "sequences" not in result.as_dict()


def test_scores_are_the_targets_under_a_lossy_policy() -> None:
    (result,) = ours(ONE, "prompt-lookup", "threshold", do_sample=True, top_k=0)
    assert result.sequences is not None and result.scores is not None
    logits = model()(
        **{**ONE, "input_ids": result.sequences, "attention_mask": torch.ones_like(result.sequences)}
    ).logits
    for t, scores in enumerate(result.scores):
        assert torch.allclose(scores[0], logits[0, ONE["input_ids"].shape[1] - 1 + t], atol=1e-3)


@pytest.mark.parametrize("name", ["output_attentions", "output_hidden_states"])
def test_attentions_and_hidden_states_are_refused_in_one_line(name: str) -> None:
    with pytest.raises(UserError, match=name) as error:
        ours(ONE, "ar", **{name: True})
    assert "\n" not in str(error.value)
