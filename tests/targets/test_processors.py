"""Answers through the real processors, and the errors for processors that need a missing package.

Processors that need torchvision are tested where it is installed (`make test-full`).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from real_tokenizer import CROP, SIZE, tokenizer
from transformers import (
    CLIPImageProcessor,
    Gemma3ImageProcessor,
    Gemma3Processor,
    Idefics3ImageProcessor,
    Idefics3Processor,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
    LlavaProcessor,
    PaliGemmaProcessor,
    Qwen2AudioProcessor,
    SiglipImageProcessor,
    WhisperFeatureExtractor,
)

from clips import write_clip, write_sound
from families import BY_NAME
from family_layouts import AUDIO, WORDS
from msd import Audio, Video
from msd.config import SpeculativeConfig
from msd.errors import UserError
from msd.inputs.prompts import prepare
from msd.labels.label_thresholds import ModalityThresholds
from msd.loading import load_target
from msd.model import SpeculativeVLM
from msd.train.capture import Captured
from msd.train.drafting import DraftTraining, train


def llava() -> Any:
    return LlavaProcessor(
        CLIPImageProcessor(**CROP), tokenizer(), patch_size=8, vision_feature_select_strategy="default",
        image_token="<image>", num_additional_image_tokens=1,
    )  # fmt: skip


def llava_next() -> Any:
    images = LlavaNextImageProcessor(**CROP, image_grid_pinpoints=[[16, 32], [32, 16]])
    return LlavaNextProcessor(
        images, tokenizer(), patch_size=8, vision_feature_select_strategy="default", image_token="<image>",
        num_additional_image_tokens=1,
    )  # fmt: skip


def gemma3() -> Any:
    marks = {"image_token": "<image>", "boi_token": "<start>", "eoi_token": "<end>"}
    return Gemma3Processor(Gemma3ImageProcessor(size=SIZE), tokenizer(**marks), image_seq_length=4)


def idefics3() -> Any:
    tiles = tuple(f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2))
    words = tokenizer("<image>", "<fake_token_around_image>", "<global-img>", ("<end_of_utterance>", *tiles))
    images = Idefics3ImageProcessor(size={"longest_edge": 32}, max_image_size={"longest_edge": 16})
    return Idefics3Processor(images, words, image_seq_len=4)


def paligemma() -> Any:
    return PaliGemmaProcessor(SiglipImageProcessor(size=SIZE, image_seq_length=4), tokenizer())


def qwen2_audio() -> Any:
    """For sounds of one second, 16 mel frames."""
    extractor = WhisperFeatureExtractor(feature_size=8, sampling_rate=1600, hop_length=100, chunk_length=1, n_fft=200)
    return Qwen2AudioProcessor(extractor, tokenizer("<image>", "<|audio_bos|>", "<|audio_eos|>", audio="<|AUDIO|>"))


PROCESSORS: dict[str, Callable[[], Any]] = {
    "llava": llava, "llava_next": llava_next, "gemma3": gemma3, "idefics3": idefics3, "paligemma": paligemma,
}  # fmt: skip
if find_spec("torchvision") is not None:
    from full_processors import FULL

    PROCESSORS |= {n: made for n, made in FULL.items() if n != "smolvlm" or find_spec("num2words") is not None}


def images(count: int, seed: int = 0) -> list[Image.Image]:
    """Noise images, alternately wide and tall."""
    rng = np.random.default_rng(seed)
    shapes = [(16, 32, 3), (32, 16, 3)]
    return [Image.fromarray(rng.integers(0, 256, shapes[i % 2], dtype=np.uint8)) for i in range(count)]


@pytest.mark.parametrize("name", PROCESSORS)
def test_one_two_and_no_image(name: str) -> None:
    """Each alone, and all as a batch."""
    model, processor = BY_NAME[name].make(), PROCESSORS[name]()
    asked = [("what is it?", images(1)), ("and these two", images(2, 1)), ("none", [])]
    if name == "paligemma":
        with pytest.raises(UserError, match="no prompt without an image"):
            prepare(processor, [[]], ["none"])
        asked[2] = ("one", images(1, 2))
    settings: dict[str, Any] = {"max_new_tokens": 12, "eos_token_id": None, "do_sample": True, "top_k": 0}
    vlm = SpeculativeVLM(model, processor, SpeculativeConfig(backend="plain"), "prompt-lookup")
    wanted = []
    for i, (prompt, shown) in enumerate(asked):
        inputs = prepare(processor, [shown], [prompt])
        torch.manual_seed(7 + i)
        wanted.append(model.generate(**inputs, **settings)[0, inputs["input_ids"].shape[1] :].tolist())
        alone = vlm.generate(shown, prompt, **settings, seed=7 + i)
        assert alone.tokens == wanted[-1]
    together = vlm.generate([shown for _, shown in asked], [prompt for prompt, _ in asked], **settings, seed=7)
    assert [result.tokens for result in together] == wanted


@pytest.mark.parametrize("name", [name for name in PROCESSORS if name != "paligemma"])
def test_videos(name: str, tmp_path: Path) -> None:
    """Videos of 4 and of 8 frames, alone and after an image; as images for image models."""
    model, processor = BY_NAME[name].make(), PROCESSORS[name]()
    path = write_clip(tmp_path / "a.mp4", range(1, 18))
    settings: dict[str, Any] = {"max_new_tokens": 8, "eos_token_id": None, "do_sample": True, "top_k": 0}
    vlm = SpeculativeVLM(model, processor, SpeculativeConfig(backend="plain"), "prompt-lookup")
    counts = []
    for shown in ([Video(path, 4)], [Video(path, 8)], [*images(1), Video(path, 4)]):
        inputs = prepare(processor, [shown], ["what"])
        counts.append(int(torch.isin(inputs["input_ids"], torch.tensor([*vlm.target.placeholders])).sum()))
        torch.manual_seed(7)
        wanted = model.generate(**inputs, **settings)[0, inputs["input_ids"].shape[1] :].tolist()
        assert vlm.generate(shown, "what", **settings, seed=7).tokens == wanted
    assert counts[0] < counts[1] and counts[0] < counts[2]


@pytest.mark.filterwarnings("ignore:At least one mel filter")
def test_sounds(tmp_path: Path) -> None:
    """No sound, one, two of unequal lengths, and all as a batch."""
    model, processor = BY_NAME["qwen2_audio"].make(), qwen2_audio()
    long, short = (Audio(write_sound(tmp_path / f"{s}.wav", s, 8000, 90 / s)) for s in (1.0, 0.4))
    settings: dict[str, Any] = {"max_new_tokens": 8, "eos_token_id": None, "do_sample": True, "top_k": 0}
    vlm = SpeculativeVLM(model, processor, SpeculativeConfig(backend="plain"), "prompt-lookup")
    asked: list[list[Audio]] = [[], [long], [short, long]]
    wanted = []
    for i, shown in enumerate(asked):
        inputs = prepare(processor, [shown], ["what is it"])
        assert int((inputs["input_ids"] == AUDIO).sum()) == sum(4 if sound is long else 2 for sound in shown)
        torch.manual_seed(7 + i)
        wanted.append(model.generate(**inputs, **settings)[0, inputs["input_ids"].shape[1] :].tolist())
        assert vlm.generate(shown, "what is it", **settings, seed=7 + i).tokens == wanted[-1]
    together = vlm.generate(asked, ["what is it"] * 3, **settings, seed=7)
    assert [result.tokens for result in together] == wanted
    with pytest.raises(UserError, match="2 s long; the model accepts 1 s"):
        vlm.generate(Audio(write_sound(tmp_path / "long.wav", 1.6)), "what is it")


@pytest.mark.parametrize("name", PROCESSORS)
def test_chat(name: str) -> None:
    processor = PROCESSORS[name]()
    vlm = SpeculativeVLM(BY_NAME[name].make(), processor, SpeculativeConfig(backend="plain"), "prompt-lookup")
    settings: dict[str, Any] = {"max_new_tokens": 6, "eos_token_id": None, "suppress_tokens": list(range(WORDS))}
    chat = vlm.chat()
    misses = []
    for prompt, shown in (("what is it?", images(1)), ("why", None), ("and this", images(1, 5))):
        result = chat.say(prompt, shown, **settings)
        misses.append(vlm.target.vision.misses)
        inputs = prepare(processor, [chat.images], chats=[chat.messages[:-1]])
        wanted = vlm.model.generate(**inputs, **settings)[0, inputs["input_ids"].shape[1] :].tolist()
        assert result.tokens == wanted
    assert 0 < misses[0] == misses[1] < misses[2]


@pytest.mark.parametrize("name", PROCESSORS)
def test_training(name: str, tmp_path: Path) -> None:
    for i, image in enumerate(images(2)):
        image.save(tmp_path / f"{i}.png")
    paths = [(tmp_path / "0.png",), (tmp_path / "0.png", tmp_path / "1.png"), *([()] if name != "paligemma" else [])]
    ids = tuple(range(WORDS, WORDS + 8))
    captured = [Captured(p, "what", ids, (0.1 * len(p),) * 8, "vqa", "train") for p in paths]
    thresholds = ModalityThresholds(language_max=0.1, vision_min=0.2, tokens=10, target="tiny-0")
    settings = DraftTraining(steps=2, batch=1, anchors=4, draft_vocabulary=32, precision="float32", evaluate_every=2)
    assert train(
        BY_NAME[name].make(), PROCESSORS[name](), captured, captured[1:2], thresholds, tmp_path / "run", settings
    )


@pytest.mark.parametrize("name, processor", [("qwen2_vl", "Qwen2VLProcessor"), ("mistral3", "PixtralProcessor")])
def test_a_processor_that_cannot_be_loaded_is_a_one_line_error(name: str, processor: str, tmp_path: Path) -> None:
    if find_spec("torchvision") is not None:
        pytest.skip("torchvision is installed")
    _checkpoint(name, processor, tmp_path)
    with pytest.raises(UserError, match=r"needs torchvision, which is not installed") as caught:
        load_target(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_voxtral_checkpoint_is_loaded(tmp_path: Path) -> None:
    """Only its model is loaded: AutoModelForImageTextToText does not support it."""
    _checkpoint("voxtral", "LlavaProcessor", tmp_path)
    llava().save_pretrained(tmp_path)
    model, _ = load_target(tmp_path)
    assert model.config.model_type == "voxtral"
    assert model.dtype == torch.float32


def test_an_architecture_that_transformers_does_not_include(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen", "architectures": ["QWenLMHeadModel"]}))
    with pytest.raises(UserError, match=r"architecture 'qwen', which transformers .* does not have"):
        load_target(tmp_path)


def test_the_error_for_an_unsupported_architecture_names_the_file_to_write(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "blip-2"}))
    with pytest.raises(UserError, match=r"no adapter for architecture 'blip-2'.*write msd/targets/blip_2.py"):
        load_target(tmp_path)


def _checkpoint(name: str, processor: str, folder: Path) -> None:
    """A tiny model's checkpoint whose configuration names `processor`."""
    BY_NAME[name].make().save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    for file in ("processor_config", "preprocessor_config"):
        (folder / f"{file}.json").write_text(json.dumps({"processor_class": processor}))
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "processor_class": processor}))
