"""Targets whose weights are quantised answer as their own `generate()` does, on the backend that can run them."""

from __future__ import annotations

import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BitsAndBytesConfig, TorchAoConfig

import tiny
from msd.config import SpeculativeConfig
from msd.drafters import Drafter
from msd.drafters.algorithms.msd import MSD, MSDConfig, MSDNetwork
from msd.errors import UserError
from msd.model import SpeculativeVLM
from msd.result import Result
from msd.targets.registry import fingerprint
from random_drafter import RandomDrafter

KINDS = ("torchao-int8", "bitsandbytes-int8", "bitsandbytes-nf4")
SETTINGS: list[dict[str, Any]] = [{"do_sample": False}, {"do_sample": True, "temperature": 0.9, "top_k": 0}]


def config(kind: str) -> Any:
    """The library's own; skips where its package is not installed."""
    package, _, _ = kind.partition("-")
    if find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    if package == "torchao":
        from torchao.quantization import Int8WeightOnlyConfig

        return TorchAoConfig(Int8WeightOnlyConfig())
    if kind == "bitsandbytes-int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)


@pytest.fixture(params=KINDS)
def model(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    """Tiny LLaVA, saved and loaded quantised; skips where the package does not run on this machine."""
    tiny.llava().save_pretrained(tmp_path)
    from transformers import AutoModelForImageTextToText

    wanted = config(request.param)
    try:
        with warnings.catch_warnings(action="ignore"):
            made = AutoModelForImageTextToText.from_pretrained(
                tmp_path, dtype=torch.float32, quantization_config=wanted
            )
            made.generate(**tiny.llava_inputs(), max_new_tokens=1)
    except (ImportError, RuntimeError, NotImplementedError, ValueError, AssertionError) as reason:
        pytest.skip(f"{request.param} does not run here: {reason}")
    made.generation_config = tiny.llava().generation_config
    return made.eval()


def said(model: Any, inputs: dict[str, Any], settings: dict[str, Any]) -> list[int]:
    torch.manual_seed(5)
    out = model.generate(**inputs, **settings, max_new_tokens=12, eos_token_id=None)
    return out[0, inputs["input_ids"].shape[1] :].tolist()


def drafter(method: str, model: Any, answer: list[int]) -> str | Drafter:
    if method == "random":
        return RandomDrafter(1, 64, [answer])
    if method == "msd":
        sizes: dict[str, Any] = {"hidden": 8, "heads": 1, "kv_heads": 1, "head_dim": 8, "intermediate": 8}
        return MSD(MSDNetwork(MSDConfig(**sizes, vocabulary=8, draft_vocabulary=8, taps=(0, 1, 2)))).twin(model)
    return method


def test_answers_are_the_models_own(model: Any) -> None:
    accepted = 0
    for inputs in (tiny.llava_inputs(3), tiny.llava_inputs(4, images=2), tiny.llava_inputs(5, images=0)):
        for settings in SETTINGS:
            wanted = said(model, inputs, settings)
            for method in ("prompt-lookup", "msd", "random"):
                vlm = SpeculativeVLM(model, None, SpeculativeConfig(adaptive=False), drafter(method, model, wanted))
                result = vlm.generate(**inputs, **settings, max_new_tokens=12, eos_token_id=None, seed=5)
                assert isinstance(result, Result)
                assert result.tokens == wanted, (method, settings)
                accepted += result.statistics.num_accepted_draft_tokens
    assert accepted > 0


def test_the_fused_backend_steps_aside(model: Any) -> None:
    assert SpeculativeVLM(model, None).target.backend.name == "plain"
    with pytest.raises(UserError, match="no fused backend"):
        SpeculativeVLM(model, None, SpeculativeConfig(backend="fused"))


def test_a_fingerprint_of_its_own(model: Any) -> None:
    assert fingerprint(model) == fingerprint(model) != fingerprint(tiny.llava())


def test_a_quantised_output_layer_too() -> None:
    """Which the library leaves as it is, but a user may not."""
    if find_spec("torchao") is None:
        pytest.skip("torchao is not installed")
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = tiny.llava()
    quantize_(model.lm_head, Int8WeightOnlyConfig())
    inputs = tiny.llava_inputs(3)
    wanted = said(model, inputs, SETTINGS[0])
    for backend in ("plain", "measure"):
        vlm = SpeculativeVLM(model, None, SpeculativeConfig(backend=backend), "prompt-lookup")
        result = vlm.generate(**inputs, do_sample=False, max_new_tokens=12, eos_token_id=None)
        assert isinstance(result, Result) and result.tokens == wanted
