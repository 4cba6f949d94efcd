"""Chat messages: their media are used, errors are one line, and one image may have several prompts."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import tiny
import tiny_checkpoint
from clips import write_clip, write_sound
from families import BY_NAME
from family_processor import FamilyProcessor
from msd import Audio, Video
from msd.config import SpeculativeConfig
from msd.errors import UserError
from msd.inputs.messages import read
from msd.inputs.prompts import prepare
from msd.model import SpeculativeVLM

SETTINGS: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False}


def engine(name: str = "llava") -> SpeculativeVLM:
    if name == "llava":
        model, processor = tiny.llava(len(tiny_checkpoint.SPECIAL) + 256), tiny_checkpoint.processor()
    else:
        model, processor = BY_NAME[name].make(), FamilyProcessor(BY_NAME[name])
    return SpeculativeVLM(model, processor, SpeculativeConfig(backend="plain", adaptive=False), "ar")


@pytest.fixture(scope="module")
def vlm() -> SpeculativeVLM:
    return engine()


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    return folder / tiny_checkpoint.photos(folder, 1)[0]


def asked(*parts: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": list(parts)}]


def text(words: str = "what is it?") -> dict[str, str]:
    return {"type": "text", "text": words}


def carriers(path: Path) -> list[dict[str, Any]]:
    """Returns every form of a message part that contains the image at `path`."""
    data = path.read_bytes()
    encoded = base64.b64encode(data).decode()
    uri = f"data:image/png;base64,{encoded}"
    image = Image.open(io.BytesIO(data))
    return [
        {"type": "image", "path": str(path)},
        {"type": "image", "path": path},
        {"type": "image", "url": str(path)},
        {"type": "image", "url": path.as_uri()},
        {"type": "image", "url": uri},
        {"type": "image", "base64": encoded},
        {"type": "image", "base64": uri},
        {"type": "image", "image": image},
        {"type": "image", "image": np.asarray(image)},
        {"type": "image", "image": data},
        {"type": "image", "image": str(path), "url": None, "text": None},
        {"type": "image", "image": {"bytes": data, "path": None}},
        {"type": "image_url", "image_url": {"url": uri, "detail": "low"}},
        {"type": "image_url", "image_url": uri},
        {"type": "image_url", "image_url": {"url": path.as_uri()}},
    ]


def test_an_image_in_a_message_is_used(vlm: SpeculativeVLM, photo: Path) -> None:
    given = vlm.generate(photo, messages=asked({"type": "image"}, text()), **SETTINGS)
    wanted = prepare(vlm.processor, [[photo]], chats=[asked({"type": "image"}, text())])
    for part in carriers(photo):
        found = prepare(vlm.processor, [[]], chats=[asked(part, text())])
        assert all(torch.equal(found[name], wanted[name]) for name in wanted), part
    for part in carriers(photo)[::5]:
        assert vlm.generate(messages=asked(part, text()), **SETTINGS).tokens == given.tokens


def test_pictures_of_several_turns_in_their_order(vlm: SpeculativeVLM, photo: Path) -> None:
    other = Image.new("RGB", (16, 16), "red")
    chat = [
        *asked({"type": "image", "path": str(photo)}, text()),
        {"role": "assistant", "content": "A thing."},
        *asked(text("and"), {"type": "image", "image": other}, text("this?")),
    ]
    plain = [{**m, "content": m["content"] if isinstance(m["content"], str) else [
        {"type": "image"} if p["type"] == "image" else p for p in m["content"]]} for m in chat]  # fmt: skip
    found, wanted = prepare(vlm.processor, [[]], chats=[chat]), prepare(vlm.processor, [[photo, other]], chats=[plain])
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert found["pixel_values"].shape[0] == 2


def test_videos_and_sounds_in_messages(tmp_path: Path) -> None:
    clip, sound = write_clip(tmp_path / "a.mp4", range(1, 9)), write_sound(tmp_path / "a.wav")
    for name, kind, path, source in (
        ("qwen2_5_vl", "video", clip, Video(clip)),
        ("qwen2_audio", "audio", sound, Audio(sound)),
    ):
        processor = FamilyProcessor(BY_NAME[name])
        wanted = prepare(processor, [[source]], ["what"])
        encoded = base64.b64encode(path.read_bytes()).decode()
        for part in (
            {"type": kind, "path": str(path)},
            {"type": kind, kind: source},
            {"type": kind, "url": path.as_uri()},
            {"type": f"{kind}_url", f"{kind}_url": {"url": f"data:{kind}/x;base64,{encoded}"}},
            {"type": kind, "base64": encoded},
        ):
            found = prepare(processor, [[]], chats=[asked(part, text("what"))])
            assert all(torch.equal(found[name], wanted[name]) for name in wanted), part
    heard = {"type": "input_audio", "input_audio": {"data": encoded, "format": "wav"}}
    assert torch.equal(
        prepare(processor, [[]], chats=[asked(heard, text("what"))])["input_features"], wanted["input_features"]
    )


def test_a_chat_whose_earlier_turns_contain_their_images(vlm: SpeculativeVLM, photo: Path) -> None:
    chat = vlm.chat()
    chat.messages = [*asked({"type": "image", "path": photo}, text()), {"role": "assistant", "content": "A thing."}]
    answer = chat.say("why?", **SETTINGS)
    assert answer.tokens == vlm.generate(messages=chat.messages[:-1], **SETTINGS).tokens
    with pytest.raises(UserError, match="1 of the 2 media parts"):
        chat.say("and this?", photo, **SETTINGS)


@pytest.mark.parametrize(
    ("chat", "said"),
    [
        ([], "an empty list"),
        ({}, "an empty dict"),
        ("what", "'what'"),
        (None, "None"),
        ([None], "message 1 is None"),
        (["what"], "message 1 is 'what'"),
        ([[{"role": "user", "content": "what"}]], "message 1 is of type list"),
        ([{}], "the role None"),
        ([{"content": "what"}], "the role None"),
        ([{"role": "robot", "content": "what"}], "'robot'; give one of system"),
        ([{"role": 3, "content": "what"}], "of type int"),
        ([{"role": ["user"], "content": "what"}], "of type list"),
        ([{"role": "user"}], "message 1 has the content None"),
        ([{"role": "user", "content": None}], "the content None"),
        ([{"role": "user", "content": []}], "an empty list"),
        ([{"role": "user", "content": 7}], "of type int"),
        ([{"role": "user", "content": {"type": "text", "text": "a"}}], "of type dict"),
        ([{"role": "user", "content": "  "}], "message 1 is empty"),
        ([{"role": "user", "content": "a"}, {"role": "user", "content": [{"type": "text", "text": ""}]}], "message 2"),
        (asked("what"), "part 1 of message 1 is 'what'"),
        (asked(None), "part 1 of message 1 is None"),
        (asked({}), "the type None"),
        (asked({"text": "what"}), "the type None"),
        (asked({"type": "picture"}), "the type 'picture'; give one of text, image"),
        (asked({"type": ["text"]}), "of type list"),
        (asked({"type": "text"}), "the text None"),
        (asked({"type": "text", "text": 3}), "the text of type int"),
        (asked(text("a\ud800")), "half a character (U+D800)"),
        (asked({"type": "image_url"}, text()), "carries 0 images"),
        (asked({"type": "image_url", "image_url": {}}, text()), "without any of url"),
        (asked({"type": "image", "path": "a.png", "image": "b.png"}, text()), "carries 2 images"),
        (asked({"type": "image", "path": "a.png", "max_pixels": 9}, text()), "'max_pixels', which is not supported"),
        (asked({"type": "image", "path": "no-such.png"}, text()), "there is no file 'no-such.png'"),
        (asked({"type": "image", "url": "https://host/a.png"}, text()), "fetching is off; save the image and give"),
        (asked({"type": "image_url", "image_url": {"url": "http://host/a.png"}}, text()), "fetching is off"),
        (asked({"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}, text()), "not a readable"),
        (asked({"type": "image", "base64": "%%%"}, text()), "no data URI"),
        (asked({"type": "image", "image": 3}, text()), "from a int"),
        (asked({"type": "video", "video": ["a.png"]}, text()), "give the path of the video"),
        (asked({"type": "image"}, text()), "place 1 image(s) but 0 image(s) were given"),
    ],
)
def test_errors_of_a_chat_are_one_line(vlm: SpeculativeVLM, chat: Any, said: str) -> None:
    if chat is None:
        with pytest.raises(UserError, match="None"):
            read(chat)
        return
    with pytest.raises(UserError) as caught:
        vlm.generate(messages=chat, **SETTINGS)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_images_are_given_in_one_way(vlm: SpeculativeVLM, photo: Path) -> None:
    carrying = {"type": "image", "path": photo}
    with pytest.raises(UserError, match=r"carry 1 image.*1 were given separately"):
        vlm.generate(photo, messages=asked(carrying, text()), **SETTINGS)
    with pytest.raises(UserError, match="1 of the 2 media parts in the messages have a source"):
        vlm.generate(photo, messages=asked(carrying, {"type": "image"}, text()), **SETTINGS)


def test_one_image_and_several_prompts(vlm: SpeculativeVLM, photo: Path) -> None:
    questions = ["what is it?", "and why", "where?"]
    wanted = [vlm.generate(photo, question, **SETTINGS).tokens for question in questions]
    image = Image.open(photo)
    for source in (photo, str(photo), image, np.asarray(image), photo.read_bytes()):
        assert [r.tokens for r in vlm.generate(source, questions, **SETTINGS)] == wanted
    for entries in ([photo] * 3, [[photo], [photo], [photo]], (photo, [photo], str(photo))):
        assert [r.tokens for r in vlm.generate(entries, questions, **SETTINGS)] == wanted


def test_empty_lists(vlm: SpeculativeVLM, photo: Path) -> None:
    for images in (None, [], photo):
        assert vlm.generate(images, [], **SETTINGS) == []
    none = [r.tokens for r in vlm.generate(None, ["what", "why"], **SETTINGS)]
    for images in ([], [[], []], [None, None], [None, []]):
        assert [r.tokens for r in vlm.generate(images, ["what", "why"], **SETTINGS)] == none
    assert vlm.generate([], "what", **SETTINGS).tokens == none[0]


@pytest.mark.parametrize(
    ("images", "prompt", "said"),
    [
        (["a.png"] * 3, ["what", "why"], "2 prompts but 3 entries of images"),
        ([["a.png"]], ["what", "why"], "2 prompts but 1 entries"),
        (None, ["what", 3], "must be text, got int"),
        (None, ["what", ""], "the prompt is empty"),
        (None, 3, "text or a list of texts, got int"),
        (None, {"a": 1}, "text or a list of texts, got dict"),
        (None, None, "a prompt or messages"),
        (None, "a\udcff", "half a character (U+DCFF) at position 1"),
        (None, ["a", "b\ud83d"], "half a character"),
    ],
)
def test_wrong_prompts_and_counts(vlm: SpeculativeVLM, images: Any, prompt: Any, said: str) -> None:
    with pytest.raises(UserError) as caught:
        vlm.generate(images, prompt, **SETTINGS)
    assert said in str(caught.value)


SAMPLED: dict[str, Any] = {"max_new_tokens": 6, "do_sample": True, "top_k": 0, "eos_token_id": None}


@pytest.mark.parametrize(
    "seed",
    [5, -5, 2**63 + 7, 2**64 - 1, -(2**63), np.int32(5), np.uint64(2**63 + 7), np.int64(-5), np.uint8(3),
     torch.tensor(5), torch.tensor(-5), np.array(5), [5], (5,), np.array([5]), torch.tensor([5]), [np.int64(5)]],
    ids=repr,
)  # fmt: skip
def test_seeds_of_every_integer_type(vlm: SpeculativeVLM, seed: Any) -> None:
    inputs = prepare(vlm.processor, [[]], ["what"])
    torch.manual_seed(int(np.asarray(seed).reshape(-1)[0]) if not isinstance(seed, int) else seed)
    wanted = vlm.model.generate(**inputs, **SAMPLED)[0, inputs["input_ids"].shape[1] :].tolist()
    assert vlm.generate(None, "what", seed=seed, **SAMPLED).tokens == wanted


@pytest.mark.parametrize(
    ("seed", "said"),
    [
        (2**64, "does not fit 64 bits"),
        (-(2**63) - 1, "does not fit 64 bits"),
        (True, "type bool"),
        (1.5, "type float"),
        ("7", "type str"),
        (np.float64(3), "type float"),
        ([1, 2], "2 seeds for 1 answers"),
        ([], "0 seeds for 1 answers"),
        ([None], "type NoneType"),
        ({1}, "type set"),
    ],
)
def test_invalid_seeds_are_refused(vlm: SpeculativeVLM, seed: Any, said: str) -> None:
    with pytest.raises(UserError, match=said):
        vlm.generate(None, "what", seed=seed, **SAMPLED)


def test_an_image_too_narrow_to_be_scaled(vlm: SpeculativeVLM) -> None:
    """The processor scales the short side up before it crops."""
    assert vlm.generate(Image.new("RGB", (1, 2000)), "what", **SETTINGS).tokens
    with pytest.raises(UserError, match="1x2000000 pixels would be scaled"):
        vlm.generate(Image.new("RGB", (1, 2_000_000)), "what", **SETTINGS)
