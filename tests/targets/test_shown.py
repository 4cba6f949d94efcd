"""Video and sound files through `generate`: the answer is that of the model's own `generate()`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from clips import write_clip, write_sound
from families import BY_NAME, named
from family_layouts import WORDS
from family_processor import FamilyProcessor, photos
from msd import Audio, Video
from msd.config import SpeculativeConfig
from msd.errors import UserError
from msd.inputs.prompts import prepare
from msd.model import SpeculativeVLM

SETTINGS: dict[str, Any] = {"max_new_tokens": 6, "do_sample": True, "top_k": 0, "eos_token_id": None}
SEEING, HEARING = named("image"), named("audio")


def engine(name: str) -> SpeculativeVLM:
    family = BY_NAME[name]
    return SpeculativeVLM(
        family.make(), FamilyProcessor(family), SpeculativeConfig(backend="plain", adaptive=False), "prompt-lookup"
    )


def expected(vlm: SpeculativeVLM, inputs: dict[str, Any]) -> list[int]:
    """Answer tokens of the model's own `generate()`."""
    torch.manual_seed(3)
    return vlm.model.generate(**inputs, **SETTINGS)[0, inputs["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize("name", SEEING)
def test_a_video(name: str, tmp_path: Path) -> None:
    vlm, video = engine(name), Video(write_clip(tmp_path / "a.mp4", range(1, 18)), 4)
    answer = vlm.generate(video, "what", **SETTINGS, seed=3)
    assert answer.tokens == expected(vlm, prepare(vlm.processor, [[video]], ["what"]))


@pytest.mark.parametrize("name", ["llava", "llava_onevision", "video_llava", "qwen3_vl", "smolvlm"])
def test_photos_and_videos_in_a_batch(name: str, tmp_path: Path) -> None:
    vlm = engine(name)
    video, photo = Video(write_clip(tmp_path / "a.mp4", range(1, 18)), 4), photos(BY_NAME[name], tmp_path, 1)[0]
    shown = [[photo, video], [video], []]
    together = vlm.generate(shown, ["what"] * 3, **SETTINGS, seed=[3, 3, 3])
    assert [result.tokens for result in together] == [
        expected(vlm, prepare(vlm.processor, [s], ["what"])) for s in shown
    ]


@pytest.mark.parametrize("name", SEEING)
def test_a_video_enters_as_video_or_as_frames(name: str, tmp_path: Path) -> None:
    """One video, or one image per frame."""
    family, processor = BY_NAME[name], FamilyProcessor(BY_NAME[name])
    clip = Video(write_clip(tmp_path / "a.mp4", range(9)), 4).load()
    given = prepare(processor, [[clip]], ["what"])
    if "video" in family.kinds:
        wanted = processor(text=["<video>what"], videos=[[np.asarray(frame) for frame in clip.frames]])
    else:
        wanted = prepare(processor, [list(clip.frames)], ["what"])
    assert given.keys() == wanted.keys()
    assert all(torch.equal(given[name], wanted[name]) for name in given)


@pytest.mark.parametrize("name", HEARING)
def test_a_sound(name: str, tmp_path: Path) -> None:
    vlm = engine(name)
    low, high = (Audio(write_sound(tmp_path / f"{h}.wav", hertz=h, rate=10 * h)) for h in (440, 3520))
    answers = []
    for shown in ([low], [high], [low, high]):
        answers.append(vlm.generate(shown, "what", **SETTINGS, seed=3).tokens)
        assert answers[-1] == expected(vlm, prepare(vlm.processor, [shown], ["what"]))
    assert answers[0] != answers[1]
    with pytest.raises(UserError, match=r"is 3 s long; the model accepts 1 s"):
        vlm.generate(Audio(write_sound(tmp_path / "long.wav", 3.0)), "what")


def test_a_chat_about_a_video(tmp_path: Path) -> None:
    """The second turn encodes nothing again, for video models and for image models."""
    clip = Video(write_clip(tmp_path / "a.mp4", range(1, 10)))
    for name in ("llava", "video_llava", "qwen2_5_vl"):
        vlm = engine(name)
        chat = vlm.chat()
        rows, encoded = [], []
        for prompt, shown in (("what", clip), ("why", None)):
            result = chat.say(prompt, shown, max_new_tokens=6, suppress_tokens=list(range(WORDS)))
            rows.append(result.statistics.num_prefill_rows)
            encoded.append(vlm.target.vision.misses)
        assert encoded[0] == encoded[1] > 0
        assert rows[1] < rows[0]


def test_unsupported_media_are_refused(tmp_path: Path) -> None:
    sound, video = Audio(write_sound(tmp_path / "a.wav")), Video(write_clip(tmp_path / "a.mp4", range(3)))
    for name, shown, message in (
        ("llava", sound, "supports image, not audio"),
        ("qwen2_vl", sound, "supports image and video, not audio"),
        ("voxtral", video, "supports audio, not video"),
    ):
        with pytest.raises(UserError, match=message):
            engine(name).generate(shown, "what")
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what"}]}]
    with pytest.raises(UserError, match=r"place 1 image\(s\) but 0 image\(s\) and 1 video\(s\) were given"):
        engine("qwen2_vl").generate(video, messages=chat)
    with pytest.raises(UserError, match="'<video>', which this model reserves"):
        engine("qwen2_vl").generate(None, "what is <video>")


@pytest.mark.parametrize(
    ("name", "kind", "tensor"),
    [("kimi_k25", "video", "pixel_values_videos"), ("gemma4", "audio", "input_features"),
     ("nemotron_h_omni", "audio", "input_features"), ("qwen2_audio", "image", "pixel_values")],
)  # fmt: skip
def test_tensors_of_unsupported_media_are_refused(name: str, kind: str, tensor: str) -> None:
    """Such as a processor prepares them, although the architecture in the library knows them."""
    row = BY_NAME[name].row(BY_NAME[name].parts(3, []))
    with pytest.raises(UserError, match=rf"'{name}' supports [a-z ]+, not {kind}; see 'msd targets'$"):
        engine(name).generate(**row, **{tensor: torch.zeros(1, 3, 16, 16)}, **SETTINGS)


def test_pixels_of_video_llava_under_its_processors_name() -> None:
    """They are encoded once and cached, as under the model's own name."""
    family, vlm = BY_NAME["video_llava"], engine("video_llava")
    row = family.row(family.parts(3, ["image"]))
    answer = vlm.generate(**row, **SETTINGS, seed=3)
    misses = vlm.target.vision.misses
    row["pixel_values_images"] = row.pop("pixel_values")
    assert vlm.generate(**row, **SETTINGS, seed=3).tokens == answer.tokens
    assert vlm.target.vision.misses == misses > 0
