"""The second turn about a photo, on the reference model: no image is encoded again, and prefill is short."""

from __future__ import annotations

from typing import Any

import pytest

from msd.config import SpeculativeConfig
from msd.inputs.prompts import prepare
from msd.model import SpeculativeVLM
from msd.reference import sample_photos

pytestmark = pytest.mark.slow
SETTINGS: dict[str, Any] = {"max_new_tokens": 16, "do_sample": False}


def test_the_second_turn_about_a_photo(reference_model: tuple[Any, Any]) -> None:
    model, processor = reference_model
    vlm = SpeculativeVLM(model, processor, SpeculativeConfig(), "prompt-lookup")
    photo = sample_photos()[0]
    chat = vlm.chat()
    first = chat.say("Describe the image.", photo, **SETTINGS)
    second = chat.say("What colour is it?", **SETTINGS)
    assert vlm.target.vision.misses == 1
    asked = prepare(processor, [chat.images], chats=[chat.messages[:-1]])["input_ids"][0].tolist()
    before = prepare(processor, [chat.images], chats=[chat.messages[:1]])["input_ids"][0].tolist()
    held = [*before, *first.tokens[:-1]]
    shared = next(i for i, (a, b) in enumerate(zip([*held, None], asked, strict=False)) if a != b)
    rows = [turn.statistics.num_prefill_rows for turn in (first, second)]
    assert rows == [len(before), len(asked) - shared]
    assert rows[1] < 0.4 * rows[0]
    anew = vlm.generate(chat.images, messages=chat.messages[:-1], **SETTINGS)
    assert second.tokens == anew.tokens
