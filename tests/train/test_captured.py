"""`TargetWriter`: batched answers equal single ones, gains equal `image_gain`, and `read_captured` returns both."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny_checkpoint
from msd.errors import UserError
from msd.inputs.prompts import prepare
from msd.labels.gain import image_gain
from msd.labels.label_thresholds import ModalityThresholds
from msd.loading import load_target
from msd.targets import adapt
from msd.train.capture import Captured, Decoding, Prompt, capture, fit_label_thresholds, pending, read_captured
from msd.train.target_writer import TargetWriter

NEW = 7
PROMPTS = [
    Prompt("Describe it.", ("0.png",), "detail"),
    Prompt("Describe it.", ("1.png",), "detail"),
    Prompt("What is it?", ("0.png",), "vqa", "val"),
    Prompt("Compare the two.", ("0.png", "1.png"), "vqa"),
    Prompt("What is the capital of France?", (), "text"),
    Prompt("Hello.", (), "text"),
    Prompt("Describe it.", ("2.png",), "detail"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("target")
    tiny_checkpoint.write(place)
    tiny_checkpoint.photos(place / "images", 3)
    return place


@pytest.fixture(scope="module")
def loaded(folder: Path) -> tuple[Any, Any]:
    return load_target(folder)


def writer(loaded: tuple[Any, Any], folder: Path) -> TargetWriter:
    return TargetWriter(*loaded, folder / "images", NEW)


def test_records_hold_greedy_answers_and_their_gains(loaded: tuple[Any, Any], folder: Path, tmp_path: Path) -> None:
    model, processor = loaded
    model.generation_config.eos_token_id = [2, 150]  # an end that a random model reaches now and then
    records = capture(PROMPTS, writer(loaded, folder), tmp_path / "out.jsonl", batch=3)
    target = adapt(model)
    for prompt, record in zip(PROMPTS, records, strict=True):
        inputs = prepare(processor, [[folder / "images" / n for n in prompt.images]], [prompt.text])
        out = model.generate(**inputs, max_new_tokens=NEW, do_sample=False, suppress_tokens=[3])
        tokens = out[0, inputs["input_ids"].shape[1] :].tolist()
        ended = tokens[-1] in (2, 150)
        assert record["ids"] + ([record["end"]] if ended else []) == tokens
        assert record["finished"] == ended
        alone = image_gain(target, inputs, [tokens])[0]
        assert record["gain"] == pytest.approx(alone.tolist(), abs=1e-3)
        assert all(g == round(g, 4) for g in record["gain"])
        assert (record["task"], record["split"]) == (prompt.task, prompt.split)
        assert (max(record["gain"]) > 0.01) == bool(prompt.images)


def test_sampled_answers_have_their_own_seeds(loaded: tuple[Any, Any], folder: Path, tmp_path: Path) -> None:
    model, processor = loaded
    decoding = Decoding(1.5, seed=3)

    def answers(batch: int, decoding: Decoding) -> list[dict[str, Any]]:
        write = TargetWriter(model, processor, folder / "images", NEW, decoding=decoding)
        path = tmp_path / f"{batch}-{decoding.seed}.jsonl"
        return capture(PROMPTS, write, path, batch, metadata=decoding.metadata)

    records = answers(3, decoding)
    assert [r["ids"] for r in answers(2, decoding)] == [r["ids"] for r in records]
    assert [r["ids"] for r in answers(2, Decoding(1.5, seed=4))] != [r["ids"] for r in records]
    target = adapt(model)
    for prompt, record in zip(PROMPTS, records, strict=True):
        assert (record["temperature"], record["seed"]) == (1.5, 3)
        inputs = prepare(processor, [[folder / "images" / n for n in prompt.images]], [prompt.text])
        torch.manual_seed(decoding.seed_of(prompt))
        out = model.generate(**inputs, max_new_tokens=NEW, do_sample=True, temperature=1.5, suppress_tokens=[3])
        tokens = out[0, inputs["input_ids"].shape[1] :].tolist()
        assert record["ids"] + ([] if record["end"] is None else [record["end"]]) == tokens
        assert record["gain"] == pytest.approx(image_gain(target, inputs, [tokens])[0].tolist(), abs=1e-3)


def test_a_file_holds_answers_of_one_decoding(loaded: tuple[Any, Any], folder: Path, tmp_path: Path) -> None:
    greedy, sampled = tmp_path / "greedy.jsonl", tmp_path / "sampled.jsonl"
    for path, decoding in ((greedy, Decoding()), (sampled, Decoding(0.7))):
        write = TargetWriter(*loaded, folder / "images", NEW, decoding=decoding)
        capture(PROMPTS[:2], write, path, metadata=decoding.metadata)
    assert "temperature" not in json.loads(greedy.read_text().splitlines()[0])
    for path, decoding, message in (
        (sampled, Decoding(), "with temperature 0.7, not with no temperature"),
        (sampled, Decoding(0.7, seed=1), "with seed 0, not with seed 1"),
        (greedy, Decoding(0.7), "with no temperature, not with temperature 0.7"),
    ):
        with pytest.raises(UserError, match=message):
            pending(PROMPTS, path, decoding.metadata)


def test_an_image_is_encoded_once_in_a_batch(loaded: tuple[Any, Any], folder: Path) -> None:
    write = writer(loaded, folder)
    write([PROMPTS[0], PROMPTS[2], PROMPTS[3]])
    vision = write.engine.target.vision
    assert vision.misses == 2 + 2  # the two pictures, and the two that the check of the target changed


def test_prompts_are_sorted_by_task_and_image(tmp_path: Path) -> None:
    order = [(p.task, p.images) for p in pending([*PROMPTS, PROMPTS[0]], tmp_path / "none.jsonl")]
    assert order == [
        ("text", ()), ("text", ()), ("detail", ("0.png",)), ("detail", ("1.png",)), ("detail", ("2.png",)),
        ("vqa", ("0.png",)), ("vqa", ("0.png", "1.png")),
    ]  # fmt: skip


def test_a_target_that_ignores_images_writes_nothing(loaded: tuple[Any, Any], folder: Path, tmp_path: Path) -> None:
    model, processor = load_target(folder)
    with torch.no_grad():
        for parameter in model.model.multi_modal_projector.parameters():
            parameter.zero_()
    path = tmp_path / "out.jsonl"
    with pytest.raises(UserError, match="does not change with its images"):
        capture(PROMPTS[:2], TargetWriter(model, processor, folder / "images", NEW), path)
    assert path.read_text() == ""


def test_read_captured(loaded: tuple[Any, Any], folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    records = capture(PROMPTS, writer(loaded, folder), path, batch=4)
    with pytest.raises(UserError, match="does not exist"):
        read_captured(path)
    captured = {(c.images, c.prompt): c for c in read_captured(path, folder / "images")}
    for prompt, record in zip(PROMPTS, records, strict=True):
        images = tuple(folder / "images" / name for name in prompt.images)
        end = () if record["end"] is None else (record["end"],)
        expected = Captured(
            images, prompt.text, (*record["ids"], *end), tuple(record["gain"]), prompt.task, prompt.split
        )
        assert captured[images, prompt.text] == expected
    thresholds = fit_label_thresholds(records, "t")
    assert thresholds == ModalityThresholds.fit(
        [r["gain"] for r in records if r["image"] and r["split"] == "train"], "t"
    )
    assert fit_label_thresholds([r for r in records if not r["image"]], "t") is None


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"gain": [0.1]}, "1 gains for 2"),
        ({"gain": None}, "'gain'"),
        ({"image": "x.png"}, "'image'"),
        ({"ids": [], "end": None, "gain": []}, "no tokens"),
    ],
)
def test_a_damaged_record_is_named(tmp_path: Path, change: dict[str, Any], part: str) -> None:
    good = {"image": [], "prompt": "a", "answer": "b", "ids": [5], "end": 2, "gain": [0, 0], "task": "", "split": "val"}
    path = tmp_path / "out.jsonl"
    path.write_text(json.dumps(good) + "\n" + json.dumps(good | change) + "\n")
    with pytest.raises(UserError, match=rf"out.jsonl:2.*{part}"):
        read_captured(path)


def test_a_file_of_another_kind_or_target_is_unchanged(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    for content, part in [
        ("my notes", "not a file of captured"),
        ('{"image": "x.jpg", "prompt": "a"}\n', "not a captured"),
        ('{"image": [], "prompt": "a", "answer": "", "ids": [], "target": "one"}\n', "target 'one'"),
    ]:
        path.write_text(content)
        with pytest.raises(UserError, match=part):
            pending([], path, {"target": "two"})
        assert path.read_text() == content
