"""vLLM serves the reference model with the shipped EAGLE-3 head: greedy answers, and acceptance as in our chain."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from recipes.scale import vllm_checkpoints
from vllm_answers import HEAD, NEAR, Run, acceptance, chain, head, needs_vllm, patient, served, with_placeholders

from msd import formats, reference
from msd.bench.data import Sample
from msd.certify import certificate

pytestmark = [pytest.mark.slow, patient, needs_vllm]
TOKENS = 32
QUESTIONS = ("What is the capital of France?", "Describe a day at the beach.", "Write a caption for a photo of a dog.")


def check(target: tuple[Any, Any], samples: list[Sample], runs: list[Run], folder: Path) -> None:
    """All answers are greedy ones, ties apart, and the head's acceptance is that of our chain."""
    for run in runs:
        answered = [
            Sample(s.images, s.prompt, None, s.task, tuple(ids)) for s, ids in zip(samples, run.answers, strict=True)
        ]
        row = certificate.audit(*target, answered, lambda state: None)
        assert row.passed, str(row)
    plain, speculative = runs
    assert plain.figures is None and speculative.figures is not None
    engine = chain(*target, folder)
    ours = [engine.generate(list(s.images) or None, s.prompt, max_new_tokens=TOKENS, do_sample=False) for s in samples]
    assert speculative.figures["mean_acceptance_length"] == pytest.approx(acceptance(ours), abs=NEAR)


def test_text(reference_model: tuple[Any, Any], tmp_path: Path) -> None:
    """The language model as a LLaMA checkpoint."""
    formats.export(HEAD, "speculators", tmp_path / "head")
    model = vllm_checkpoints.language_model(tmp_path / "model")
    prompts = [vllm_checkpoints.text_prompt(reference_model[1], question) for question in QUESTIONS]
    runs = served(model, prompts, None, head(tmp_path / "head"), tokens=TOKENS)
    check(reference_model, [Sample((), question, None, "text") for question in QUESTIONS], runs, tmp_path / "head")


@pytest.mark.full
def test_photos(reference_model: tuple[Any, Any], tmp_path: Path) -> None:
    """The whole model, with photos as embeddings; the head reads placeholders at their positions."""
    formats.export(HEAD, "speculators", tmp_path / "head")
    model = vllm_checkpoints.vision_language_model(tmp_path / "model")
    photos = reference.sample_photos()[:6]
    samples = [Sample((photo,), "Describe the image.", None, "caption") for photo in photos]
    prompts = [
        vllm_checkpoints.photo_prompt(*reference_model, photo, "Describe the image.", tmp_path / f"{i}.safetensors")
        for i, photo in enumerate(photos)
    ]
    engine = vllm_checkpoints.EMBEDDINGS
    runs = served(model, prompts, None, head(tmp_path / "head"), tokens=TOKENS, engine=engine)
    check(reference_model, samples, runs, with_placeholders(tmp_path / "head", tmp_path / "as-served"))
