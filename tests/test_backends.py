"""Fused passes compute what the model's own code computes, and do not change the model."""

from __future__ import annotations

import copy
import pickle
import threading
from functools import partial
from typing import Any

import pytest
import torch
from transformers import (
    DynamicCache,
    LlamaConfig,
    LlamaModel,
    MistralConfig,
    MistralModel,
    Qwen2Config,
    Qwen2Model,
    Qwen3Config,
    Qwen3Model,
)

import tiny
from msd import backends
from msd.backends.comparison import faster
from msd.backends.fused import FusedDecoder, UnsupportedDecoderError
from msd.backends.kernels import ROWS
from msd.backends.packed import multiplies_in_bf16
from msd.config import SpeculativeConfig
from msd.errors import UserError
from msd.model import SpeculativeVLM
from msd.targets import adapt
from msd.targets.teacher import run_teacher

SIZES: dict[str, Any] = {
    "vocab_size": 40, "hidden_size": 48, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 6,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 2048,
}  # fmt: skip
FAMILIES = {
    "llama": lambda: LlamaModel(LlamaConfig(**SIZES)),
    "llama, scaled rotary": lambda: LlamaModel(
        LlamaConfig(**SIZES, rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 5e3})
    ),
    "mistral": lambda: MistralModel(MistralConfig(**SIZES, sliding_window=None)),
    "qwen2, biases": lambda: Qwen2Model(Qwen2Config(**{k: v for k, v in SIZES.items() if k != "head_dim"})),
}


def build(family: str) -> Any:
    torch.manual_seed(0)
    model = FAMILIES[family]().eval()
    with torch.no_grad():
        for name, p in model.named_parameters():  # biases and norms that change the output
            if name.endswith("bias") or "norm" in name:
                p.add_(torch.randn_like(p) * 0.5)
    return model


@pytest.fixture(params=FAMILIES)
def decoder(request: pytest.FixtureRequest) -> Any:
    return build(request.param)


@torch.no_grad()
@pytest.mark.parametrize("rows", [3, 600])
def test_prompts_and_trees_equal_the_models_own(decoder: Any, rows: int) -> None:
    fused = FusedDecoder(decoder)
    ids = torch.randint(40, (2, rows))
    padded = torch.ones(2, rows, dtype=torch.long)
    padded[1, :1] = 0
    tree = torch.zeros(2, 1, 4, rows + 4)
    tree[:, :, 1, rows + 2] = tree[0, :, 3, 0] = tree[1, :, :, 0] = torch.finfo(torch.float32).min
    for mask in (None, padded):
        own_cache, cache = DynamicCache(config=decoder.config), DynamicCache(config=decoder.config)
        own = decoder(input_ids=ids, attention_mask=mask, past_key_values=own_cache, use_cache=True)
        output = fused.forward(input_ids=ids, attention_mask=mask, past_key_values=cache)
        seen = padded.bool() if mask is not None else torch.ones_like(padded).bool()
        torch.testing.assert_close(output.last_hidden_state[seen], own.last_hidden_state[seen], atol=1e-5, rtol=1e-4)
        new = {
            "input_ids": torch.randint(40, (2, 4)),
            "position_ids": torch.tensor([[rows, rows + 1, rows + 1, rows + 2]]),
        }
        own = decoder(**new, attention_mask=tree, past_key_values=own_cache, use_cache=True)
        output = fused.forward(**new, attention_mask=tree, past_key_values=cache)
        torch.testing.assert_close(output.last_hidden_state, own.last_hidden_state, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_taps_are_the_hidden_states_of_transformers(decoder: Any) -> None:
    kept: dict[int, torch.Tensor] = {}
    ids = torch.randint(40, (1, 5))
    FusedDecoder(decoder).forward(input_ids=ids, record=kept.__setitem__)
    own = decoder(input_ids=ids, output_hidden_states=True).hidden_states
    for index, states in enumerate(own):
        torch.testing.assert_close(kept[index], states, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (lambda: Qwen3Model(Qwen3Config(**SIZES)), "class Qwen3Model"),
        (lambda: LlamaModel(LlamaConfig(**SIZES, hidden_act="gelu")), "activation 'gelu'"),
        (lambda: MistralModel(MistralConfig(**SIZES, sliding_window=8)), "sliding windows"),
        (lambda: LlamaModel(LlamaConfig(**SIZES, mlp_bias=True)), "mlp.down_proj.bias"),
        (lambda: LlamaModel(LlamaConfig(**SIZES)).bfloat16(), "no float32 layer"),
    ],
)
def test_an_unsupported_decoder_gives_the_reason(model: Any, reason: str) -> None:
    with pytest.raises(UnsupportedDecoderError, match=reason):
        FusedDecoder(model())


def test_the_faster_pass_is_measured() -> None:
    """Own passes take 3 units and 1 per row, others 2 and 1.3; a first pass is slow."""
    now, calls = [0.0], []

    def run(name: str, fixed: float, each: float, rows: int) -> None:
        calls.append((name, rows))
        now[0] += (fixed + each * rows) * (1 if (name, rows) in calls[:-1] else 10)

    own, other = partial(run, "own", 3.0, 1.0), partial(run, "other", 2.0, 1.3)
    assert faster(own, other, lambda: now[0]) == (1, 2)
    assert faster(other, own, lambda: now[0]) == (4, 9, 17, 64, 256)
    counts = [calls.count(("own", rows)) for rows in ROWS]
    assert counts == [6, 12, 12, 12, 6, 6, 6], "small differences are measured twice as often"


def test_names_and_errors() -> None:
    model = tiny.llava()
    assert backends.choose(model, "plain").name == "plain"
    assert backends.choose(model, "fused").name == "fused"
    assert backends.choose(model, "fused") is backends.choose(model, "fused")
    assert backends.choose(tiny.llava()).name == "fused"
    with pytest.raises(UserError, match="backend 'fast' is unknown; choose one of measure, plain, fused, bf16"):
        backends.choose(model, "fast")
    half = tiny.llava().bfloat16()
    assert backends.choose(half).name == "plain"
    with pytest.raises(UserError, match=r"no fused backend: .*; use backend 'plain'"):
        backends.choose(half, "fused")


def test_bf16_is_refused_by_a_cpu_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "multiplies_in_bf16", lambda: False)
    with pytest.raises(UserError, match="no products in bfloat16"):
        backends.choose(tiny.llava(), "bf16")


@pytest.mark.skipif(not multiplies_in_bf16(), reason="the CPU has no products in bfloat16")
def test_bf16_is_lossy_and_used_only_on_request() -> None:
    model, inputs = tiny.llava(), tiny.llava_inputs()
    rough = backends.choose(model, "bf16")
    assert rough.lossy and rough is backends.choose(model, "bf16")
    exact = backends.choose(model)
    assert not exact.lossy
    with torch.no_grad():
        own = model(**inputs).logits
        with rough.running():
            rounded = model(**inputs).logits
    difference = (rounded - own).abs().max() / own.abs().max()
    assert 1e-4 < difference < 0.1, "rounded to bfloat16"
    vlm = SpeculativeVLM(model, None, SpeculativeConfig(backend="bf16"), "prompt-lookup")
    assert vlm.plan.costs is None, "rounding depends on the number of drafts, so measured costs must not set it"
    assert vlm.generate(**inputs, max_new_tokens=6).tokens
    assert SpeculativeVLM(model, None, drafter="prompt-lookup").plan.costs is not None


def test_a_fused_pass_that_differs_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    right = FusedDecoder.forward

    def wrong(self: FusedDecoder, **kwargs: Any) -> Any:
        output = right(self, **kwargs)
        output.last_hidden_state = output.last_hidden_state * 1.01
        return output

    monkeypatch.setattr(FusedDecoder, "forward", wrong)
    assert backends.choose(tiny.llava()).name == "plain"


def test_the_model_runs_its_own_code_outside() -> None:
    model = tiny.llava()
    backend = backends.choose(model, "fused")
    ids = {"input_ids": torch.arange(4, 12)[None]}
    with torch.no_grad():
        own = model(**ids).logits
        with backend.running():
            fused = model(**ids).logits
            elsewhere: list[torch.Tensor] = []
            thread = threading.Thread(target=lambda: elsewhere.append(model(**ids).logits))
            thread.start()
            thread.join()
            with backend.running():
                assert torch.equal(model(**ids).logits, fused)
            assert torch.equal(model(**ids).logits, fused)
        assert torch.equal(model(**ids).logits, own) and torch.equal(elsewhere[0], own)
    assert not torch.equal(fused, own)
    assert "forward" not in vars(model.get_decoder()) and "forward" not in vars(model.lm_head)
    pickle.dumps(model.get_decoder())
    copy.deepcopy(model)


def test_changed_weights_are_packed_again() -> None:
    model, inputs = tiny.llava(), tiny.llava_inputs()
    engine = SpeculativeVLM(model, None, SpeculativeConfig(backend="fused"), "ar")
    before = engine.generate(**inputs, max_new_tokens=12, do_sample=False).tokens
    with torch.no_grad():
        for p in model.get_decoder().layers.parameters():
            p.mul_(-0.7)
        model.lm_head.weight.copy_(model.lm_head.weight.roll(5, 0))
    after = engine.generate(**inputs, max_new_tokens=12, do_sample=False).tokens
    expected = model.generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs["input_ids"].shape[1] :].tolist()
    assert after == expected != before


@pytest.mark.parametrize("backend", ["plain", "fused"])
@pytest.mark.parametrize("do_sample", [False, True])
@pytest.mark.parametrize("method", ["ar", "prompt-lookup"])
def test_tokens_are_those_of_generate(backend: str, do_sample: bool, method: str) -> None:
    for build, inputs in ((tiny.llava, tiny.llava_inputs), (tiny.llava_next, tiny.llava_next_inputs)):
        model = build()
        engine = SpeculativeVLM(model, None, SpeculativeConfig(backend=backend), method)
        for seed in range(4):
            given = inputs(seed)
            torch.manual_seed(seed)
            expected = model.generate(**given, max_new_tokens=20, do_sample=do_sample)
            result = engine.generate(**given, max_new_tokens=20, do_sample=do_sample, seed=seed)
            assert result.tokens == expected[0, given["input_ids"].shape[1] :].tolist()


def test_batches_and_teacher_passes_agree_on_both_backends() -> None:
    model = tiny.llava()
    inputs = tiny.batch(*(tiny.llava_inputs(s, images=s % 3, words=6 + 3 * s) for s in range(4)))
    answers, taught = [], []
    for name in ("plain", "fused"):
        engine = SpeculativeVLM(model, None, SpeculativeConfig(backend=name), "prompt-lookup")
        answers.append(
            [r.tokens for r in engine.generate(**inputs, max_new_tokens=20, do_sample=False, suppress_tokens=[3])]
        )
        batch = run_teacher(adapt(model, (1, 3), backend=name), dict(inputs), answers[0])
        taught.append((batch.logits[batch.answer_mask()], batch.taps[:, batch.prompt :]))
    assert answers[0] == answers[1]
    torch.testing.assert_close(taught[0][0], taught[1][0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(taught[0][1], taught[1][1], atol=1e-4, rtol=1e-4)
