"""The real reference model, assembled from the installed wheel."""

import importlib.util
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from msd import reference
from msd.inputs.images import load_image
from msd.reference import folder
from msd.reference.assemble import load_language_model

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec(folder.GGUF_PACKAGE) is None, reason=f"needs: {folder.INSTALL_GGUF}"),
]


@pytest.fixture(scope="module")
def parts() -> tuple[Any, Any]:
    """Loads model and processor from the user's cache; the first run assembles them (half a minute)."""
    folder = reference.path()
    return AutoModelForImageTextToText.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)


def ask(parts: tuple[Any, Any], photos: list[str], prompt: str) -> list[str]:
    """Returns greedy answers to one prompt about several photos, as one batch."""
    model, processor = parts
    content = [{"type": "image"}, {"type": "text", "text": prompt}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    images = [load_image(path) for path in reference.sample_photos() if path.stem in photos]
    inputs = processor(images=images, text=[text] * len(images), return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=40, do_sample=False)
    return processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def test_it_is_a_tied_float32_llava(parts: tuple[Any, Any]) -> None:
    model, processor = parts
    assert type(model).__name__ == "LlavaForConditionalGeneration"
    assert model.dtype == torch.float32
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert model.config.image_seq_length == 64
    assert processor.tokenizer.encode(processor.image_token) == [model.config.image_token_id]
    assert len(processor.tokenizer) == model.config.text_config.vocab_size == 49152
    assert not hasattr(model.config.text_config, "quantization_config")
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_answers_depend_on_the_photo(parts: tuple[Any, Any]) -> None:
    skier, surfer = ask(parts, ["skier", "surfer"], "Write a short caption for this picture.")
    assert "surfer" in surfer and "surfer" not in skier
    for answer in (skier, surfer):
        assert answer.endswith(".")
        assert len(answer.split()) >= 3


def test_the_language_model_is_the_published_one() -> None:
    model, tokenizer = load_language_model(folder.locate().gguf)
    inputs = tokenizer("The capital of France is", return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=1, do_sample=False)
    assert tokenizer.decode(output[0]).endswith("Paris")
