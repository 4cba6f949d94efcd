"""Text that spells what a model reserves for pictures is refused; templates put every picture where it was placed."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import tiny_checkpoint
from msd.errors import UserError
from msd.inputs.prompts import placeholders, prepare

sys.path.insert(0, str(Path(__file__).parents[1] / "targets"))
from test_processors import PROCESSORS, images, qwen2_audio

RESERVED = {
    "llava": ["<image>", "<video>", "<audio>"],
    "llava_next": ["<image>"],
    "gemma3": ["<start>", "<end>", "<image>"],
    "idefics3": ["<image>", "<fake_token_around_image>", "<global-img>", "<row_1_col_2>"],
    "paligemma": ["<image>"],
}
TURNS = "{% for m in messages %}[{{ m['role'] }}]{% if m['content'] is string %}{{ m['content'] }}{% else %}"
PARTS = "{% for p in m['content'] %}{{ '<image>' if p['type'] == 'image' else p['text'] }}{% endfor %}{% endif %}"
END = "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"


def refused(processor: Any, shown: list[Any], chat: list[dict[str, Any]]) -> str:
    with pytest.raises(UserError) as caught:
        prepare(processor, [shown], chats=[chat])
    assert "\n" not in str(caught.value)
    return str(caught.value)


def user(*parts: Any) -> list[dict[str, Any]]:
    content = [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts]
    return [{"role": "user", "content": content}]


@pytest.mark.parametrize("name", RESERVED)
def test_every_reserved_word_is_refused(name: str) -> None:
    """Also where the model is shown nothing, and the word comes with other text around it."""
    processor = PROCESSORS[name]()
    for token in RESERVED[name]:
        assert token in placeholders(processor)
        for shown in ([], images(1)):
            with pytest.raises(UserError, match="which this model reserves"):
                prepare(processor, [shown], [f"what is {token} here"])


def test_reserved_words_of_a_model_that_hears() -> None:
    assert {"<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>"} <= set(placeholders(qwen2_audio()))


def test_marks_of_turns_and_text_are_not_reserved() -> None:
    for made in PROCESSORS.values():
        assert not {"<s>", "</s>", "<pad>", "<unk>", "<end_of_utterance>"} & set(placeholders(made()))


def test_a_reserved_word_in_pieces_and_in_other_fields() -> None:
    """A template writes the parts of a message, and other fields of it, into one text."""
    processor = PROCESSORS["llava"]()
    assert "reserves" in refused(processor, [], user("what is <ima", "ge> here"))
    assert "reserves" in refused(processor, [], [{"role": "user", "content": "what", "name": "<image>"}])
    assert "reserves" in refused(processor, [], [{"role": "system", "content": "<image>"}, *user("what")])
    assert "reserves" in refused(processor, [], [*user("what"), {"role": "assistant", "content": "<image>"}])
    prepare(processor, [[]], ["what is < image > or <imag here"])


def test_a_template_that_drops_a_picture_is_refused() -> None:
    processor = tiny_checkpoint.processor()
    processor.chat_template = TURNS + PARTS.replace(
        "p['type'] == 'image'", "m['role'] == 'user' and p['type'] == 'image'"
    )
    processor.chat_template += END
    system = [{"role": "system", "content": [{"type": "text", "text": "see"}, {"type": "image"}]}]
    for shown, chat in (
        (images(1), [*system, *user("what")]),
        (images(2), [*system, *user({"type": "image"}, "what")]),
    ):
        assert "template" in refused(processor, shown, chat) or "processor" in refused(processor, shown, chat)


def test_what_a_template_refuses_is_one_line() -> None:
    processor = tiny_checkpoint.processor()
    processor.chat_template = "{{ raise_exception('roles must take turns') }}"
    assert "roles must take turns" in refused(processor, [], user("what"))
    processor.chat_template = "{{ messages[0]['content'] + 'x' }}"  # of a model for text alone
    assert "does not take these messages" in refused(processor, [], user("what"))
    processor.chat_template = "{% for %}"
    assert "does not take these messages" in refused(processor, [], user("what"))


CHATS: dict[str, list[dict[str, Any]]] = {
    "text": [{"role": "user", "content": "what"}],
    "parts": user("what", "is it"),
    "picture first": user({"type": "image"}, "what"),
    "picture last": user("what", {"type": "image"}),
    "in the middle": user("this", {"type": "image"}, "or this", {"type": "image"}, "?"),
    "system": [{"role": "system", "content": "Be brief."}, *user({"type": "image"}, "what")],
    "second turn": [*user("hello"), {"role": "assistant", "content": "hi"}, *user({"type": "image"}, "what")],
    "picture of the assistant": [
        *user("draw"), {"role": "assistant", "content": [{"type": "image"}, {"type": "text", "text": "there"}]},
        *user("what"),
    ],
    "system with a picture": [
        {"role": "system", "content": [{"type": "image"}, {"type": "text", "text": "see"}]}, *user("what")
    ],
    "answer begun": [*user({"type": "image"}, "what"), {"role": "assistant", "content": "It is"}],
}  # fmt: skip


def assert_as_the_library_writes(processor: Any) -> None:
    """Every chat, by the template and the processor alone."""
    for name, chat in CHATS.items():
        count = sum(p["type"] == "image" for m in chat for p in m["content"] if isinstance(p, dict))
        shown = images(count)
        text = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        bos = processor.tokenizer.bos_token
        wanted = processor(
            text=[text], images=[shown] if shown else None, return_tensors="pt",
            add_special_tokens=not text.startswith(bos),
        )  # fmt: skip
        found = prepare(processor, [shown], chats=[chat])
        assert all(torch.equal(found[key], wanted[key]) for key in wanted), name


def test_chats_are_as_the_library_writes_them() -> None:
    processor = tiny_checkpoint.processor()
    processor.chat_template = TURNS + PARTS + END
    assert_as_the_library_writes(processor)


@pytest.mark.slow
def test_chats_of_the_reference_model(reference_model: tuple[Any, Any]) -> None:
    """Its template places a picture that a message of OpenAI's form carries, and nothing where there is none."""
    _, processor = reference_model
    assert placeholders(processor) == ["<image>"]
    assert_as_the_library_writes(processor)
    part = {"type": "image_url", "image_url": {"url": "no-such-file.png"}}
    assert "no-such-file.png" in refused(processor, [], user(part, "what"))
    image = Image.new("RGB", (1, 2000), "red")
    found = prepare(processor, [[]], chats=[user({"type": "image", "image": image}, "what")])
    wanted = prepare(processor, [[image]], ["what"])
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)
    assert "'robot'" in refused(processor, [], [{"role": "robot", "content": "what"}])
