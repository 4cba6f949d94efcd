"""vLLM computes images itself: a small random LLaVA and a small random Qwen3-VL, each with a fitted random head."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import vllm_targets
from vllm_answers import NEAR, acceptance, chain, head, needs_vllm, patient, served
from vllm_targets import Target

pytestmark = [pytest.mark.slow, pytest.mark.full, patient, needs_vllm]
TOKENS = 24
ENGINE = {"max_model_len": 256}


@pytest.mark.parametrize(
    ("made", "columns", "modules"),
    # the head of a target with M-RoPE reads its positions; vLLM 0.32.0 needs a correction of its slots
    [(vllm_targets.llava, True, []), (vllm_targets.qwen3_vl, False, ["draft_slots"])],
    ids=["llava", "qwen3_vl"],
)
def test_images(made: Callable[[Path], Target], columns: bool, modules: list[str], tmp_path: Path) -> None:
    """Greedy text with and without the head, and acceptance as in our chain."""
    (tmp_path / "model").mkdir()
    target = made(tmp_path / "model")
    greedy = [
        target.model.generate(**row, max_new_tokens=TOKENS, do_sample=False)[0, row["input_ids"].shape[1] :].tolist()
        for row in target.inputs
    ]
    folder = vllm_targets.random_head(tmp_path / "head", target.model, greedy, columns)
    engine = chain(target.model, None, folder)
    vllm_targets.fit(engine, target, greedy, folder)
    ours = [engine.generate(**row, max_new_tokens=TOKENS, do_sample=False) for row in target.inputs]
    assert acceptance(ours) > 2
    plain, speculative = served(
        target.folder, target.prompts, None, head(folder), tokens=TOKENS, engine=ENGINE | target.engine,
        modules=modules, path=str(Path(__file__).parent),
    )  # fmt: skip
    assert plain.answers == speculative.answers == greedy
    assert speculative.figures is not None
    assert speculative.figures["mean_acceptance_length"] == pytest.approx(acceptance(ours), abs=NEAR)
