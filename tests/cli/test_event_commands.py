"""Capture and training on clips with event recordings: labels by cells and frames, auxiliary tokens for the drafter."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import tiny_checkpoint
from msd.drafters import registry
from msd.drafters.algorithms.msd import MSD
from msd.drafters.auxiliary import FRAMES, SPANS, pooled
from msd.events import events_of_photo, frames, motion, read
from msd.events.auxiliary import event_tokens
from msd.events.cells import cell_kinds
from msd.inputs.prompts import prepare
from msd.labels.gain import event_costs
from msd.labels.label_thresholds import ModalityThresholds
from msd.loading import load_target
from msd.model import SpeculativeVLM
from msd.targets import adapt
from msd.train.capture import label_thresholds_path, read_captured
from msd.train.drafting import DraftTraining
from msd.train.drafting import train as train_drafter
from msd.train.teacher_batches import Stages
from training_command import FLOAT32, run, train


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a target, clips of two frames with events, an image without events, and a text prompt."""
    folder = tmp_path_factory.mktemp("events")
    tiny_checkpoint.write(folder)
    names = tiny_checkpoint.photos(folder / "images", 6)
    lines: list[dict[str, Any]] = []
    for i in range(3):
        stream = events_of_photo(Image.open(folder / "images" / names[2 * i]), (16, 16), 100_000, seed=i)
        np.savez(folder / "images" / f"{i}.npz", t=stream.t, x=stream.x, y=stream.y, p=stream.p, size=(16, 16))
        shown = {"image": names[2 * i : 2 * i + 2], "events": f"{i}.npz", "split": "val" if i == 2 else "train"}
        lines += [{**shown, "prompt": prompt} for prompt in ("What happens?", "Describe it.")]
    lines += [{"image": names[:1], "prompt": "What is it?"}, {"prompt": "Say something."}]
    (folder / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture(scope="module")
def captured(place: Path) -> list[dict[str, Any]]:
    """The captured lines."""
    with pytest.raises(SystemExit) as stop:
        tiny_checkpoint.main([
            "capture", "--data", str(place / "data.jsonl"), "--images", str(place / "images"), "--target", str(place),
            "--out", str(place / "captured.jsonl"), "--max-new-tokens", "12", "--json",
        ])  # fmt: skip
    assert not stop.value.code
    return [json.loads(line) for line in (place / "captured.jsonl").read_text().splitlines()]


def test_captured_clips_have_the_costs_of_their_cells(place: Path, captured: list[dict[str, Any]]) -> None:
    model, processor = load_target(str(place))
    target = adapt(model)
    clips = [line for line in captured if "events" in line]
    assert len(clips) == 6 and all("costs" not in line for line in captured if "events" not in line)
    for line in clips[:2]:
        images = [[place / "images" / name for name in line["image"]]]
        inputs = prepare(processor, images, [line["prompt"]])
        kinds = cell_kinds(read(place / "images" / line["events"]), 2, 4)
        ids = line["ids"] + ([] if line["end"] is None else [line["end"]])
        expected = event_costs(target, inputs, [ids], [kinds])[0]
        torch.testing.assert_close(torch.tensor(line["costs"], dtype=torch.float64), expected, atol=2e-4, rtol=0)
    thresholds = ModalityThresholds.load(place / "captured.jsonl.cuts.json")
    assert thresholds.events is not None and thresholds.modalities == (
        "language",
        "event_sparse",
        "event_dense",
        "video_reasoning",
    )
    assert thresholds.events.tokens == sum(len(line["costs"]) for line in clips if line["split"] == "train")


def test_event_tokens_are_means_of_the_targets_features(place: Path) -> None:
    model, processor = load_target(str(place))
    stream = events_of_photo(Image.new("RGB", (32, 32)), (16, 16), 100_000, seed=1)
    found = event_tokens(adapt(model), processor, stream)
    features = []
    for image in frames(stream, FRAMES, "count"):
        shown = model.model.get_image_features(processor.image_processor(image, return_tensors="pt")["pixel_values"])
        features.append(getattr(shown, "pooler_output", shown)[0])
    torch.testing.assert_close(found[: FRAMES + 4], pooled(torch.stack(features)), atol=1e-5, rtol=1e-4)
    moved = torch.from_numpy(motion(stream, SPANS))
    torch.testing.assert_close(found[FRAMES + 4 :, :6], torch.nn.functional.pad(moved, (0, 1), value=1.0))
    assert found.shape == (FRAMES + 4 + SPANS, 32)


@pytest.mark.usefixtures("captured")
def test_a_drafter_trains_with_event_tokens(capsys: pytest.CaptureFixture[str], place: Path, tmp_path: Path) -> None:
    """The drafter has the event modalities; cached event tokens change nothing."""
    whole = train(capsys, place, tmp_path / "whole", *FLOAT32)
    network = registry.load(tmp_path / "whole" / "drafter")
    assert network.config.modalities == ("language", "event_sparse", "event_dense", "video_reasoning")
    assert network.config.auxiliary == ((FRAMES, 3), (4, 3))
    again = train(capsys, place, tmp_path / "again", *FLOAT32, "--remember", 0)
    train(capsys, place, tmp_path / "without", *FLOAT32, "--no-events")
    same, other = (registry.load(tmp_path / name / "drafter") for name in ("again", "without"))
    assert whole["losses"]["loss"] == again["losses"]["loss"]
    assert all(torch.equal(p, q) for p, q in zip(network.parameters(), same.parameters(), strict=True))
    assert other.config.auxiliary == () and other.config.modalities == network.config.modalities


@pytest.mark.usefixtures("captured")
def test_a_drafter_reads_motion(capsys: pytest.CaptureFixture[str], place: Path, tmp_path: Path) -> None:
    """In decoding it gets the tokens that it was trained with; one without the part gets those of pictures alone."""
    model, processor = load_target(str(place))
    stream = read(place / "images" / "0.npz")
    wanted = event_tokens(adapt(model), processor, stream)
    for parts, groups in (("router,motion", 3), ("router", 2)):
        train(capsys, place, tmp_path / parts, *FLOAT32, "--parts", parts)
        network = registry.load(tmp_path / parts / "drafter")
        assert network.config.auxiliary == ((FRAMES, 3), (4, 3), (SPANS, 3))[:groups]
        vlm = SpeculativeVLM(model, processor, drafter=MSD(network))
        assert isinstance(vlm.drafter, MSD)
        count = sum(n for n, _ in network.config.auxiliary)
        torch.testing.assert_close(vlm.drafter.encode(stream), wanted[:count])
        images = [place / "images" / name for name in tiny_checkpoint.photos(tmp_path / "shown", 2)]
        drafted = vlm.generate(images, "What happens?", events=stream, do_sample=False, max_new_tokens=8)
        plain = SpeculativeVLM(model, processor, drafter="ar").generate(
            images, "What happens?", do_sample=False, max_new_tokens=8
        )
        assert drafted.tokens == plain.tokens


@pytest.mark.usefixtures("captured")
def test_event_tokens_change_the_loss_on_answers_about_clips(place: Path, tmp_path: Path) -> None:
    """Also from the first step on, and also in networks without another part that reads media."""
    model, processor = load_target(str(place))
    path = place / "captured.jsonl"
    answers = [answer for answer in read_captured(path, place / "images") if answer.events and answer.split == "train"]
    thresholds = ModalityThresholds.load(label_thresholds_path(path))
    losses: dict[bool, list[float]] = {}
    for events in (True, False):
        settings = DraftTraining(
            steps=1, batch=2, draft_vocabulary=100, precision="float32", stages=Stages(0, 1), events=events
        )
        log: list[Mapping[str, float]] = []
        out = tmp_path / str(events)
        train_drafter(model, processor, answers, answers[:1], thresholds, out, settings, sink=log.append)
        losses[events] = [row["loss"] for row in log if "loss" in row]
    assert losses[True] and losses[True] != losses[False]


def test_events_of_a_line_must_exist(capsys: pytest.CaptureFixture[str], place: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    for line, part in (({"events": "none.raw"}, "does not exist"), ({"events": ["0.npz", "1.npz"]}, "a line has one")):
        bad.write_text(json.dumps({"prompt": "What?", "image": "0.png", **line}))
        code, _, err = run(
            capsys, "capture", "--data", bad, "--images", place / "images", "--target", place, "--out", tmp_path / "o"
        )
        assert code == 2 and part in err and "bad.jsonl:1" in err


@pytest.mark.usefixtures("captured")
def test_events_reach_the_drafter_and_never_the_answer(
    capsys: pytest.CaptureFixture[str], place: Path, tmp_path: Path
) -> None:
    """A drafter trained with events is verified with them; one trained without events refuses them."""
    train(capsys, place, tmp_path / "with", *FLOAT32)
    train(capsys, place, tmp_path / "without", *FLOAT32, "--no-events")
    data = ("--data", place / "data.jsonl", "--images", place / "images", "--target", place)
    code, out, err = run(
        capsys, "verify", *data, "--drafter", tmp_path / "with" / "drafter", "--method", "msd", "--limit", 3,
        "--max-new-tokens", 8, "--json",
    )  # fmt: skip
    assert code == 0, err
    assert all(row["passed"] and row["identical"] == row["compared"] for row in json.loads(out)["rows"])
    ask = (
        "generate", place / "images" / "0.png", place / "images" / "1.png", "-p", "What?", "--target", place,
        "--max-new-tokens", 12, "--json",
    )  # fmt: skip
    seen = ("--events", place / "images" / "0.npz")
    drafters = {name: ("--drafter", tmp_path / name / "drafter") for name in ("with", "without")}
    answers = [json.loads(run(capsys, *ask, *more)[1]) for more in ((), drafters["with"], (*drafters["with"], *seen))]
    assert len({tuple(answer["tokens"]) for answer in answers}) == 1
    assert answers[2]["time"]["beside"] > 0 and "beside" not in answers[1]["time"]
    code, _, err = run(capsys, *ask, *drafters["without"], *seen)
    assert code == 2 and "sees no events" in err
