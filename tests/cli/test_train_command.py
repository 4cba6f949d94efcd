"""`msd train` on a tiny target: a resumed run gives the same drafter, and `generate`, `verify` and `bench` use it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import tiny_checkpoint
from msd.cli.train import PARTS
from msd.drafters.algorithms.msd import SWITCHES, DraftObjective
from msd.drafters.toolkit import checkpoint
from msd.errors import UserError
from msd.labels.label_thresholds import ModalityThresholds
from msd.loading import load_target
from msd.train.capture import label_thresholds_path, read_captured
from msd.train.drafting import DraftTraining, step_folder
from msd.train.drafting import train as train_drafter
from training_command import FLOAT32, STEPS, interrupt, run, train


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A target with captured answers."""
    return tiny_checkpoint.captured(tmp_path_factory.mktemp("train"))


def test_a_run_starts_from_a_drafter(capsys: pytest.CaptureFixture[str], place: Path, tmp_path: Path) -> None:
    train(capsys, place, tmp_path / "first", "--parts", "router,subtrees", *FLOAT32)
    first = tmp_path / "first" / "drafter"
    train(capsys, place, tmp_path / "more", "--start", first, "--lr", 0, *FLOAT32)
    one, two = (load_file(folder / "model.safetensors") for folder in (first, tmp_path / "more" / "drafter"))
    assert one.keys() == two.keys(), "the parts are those of the first"
    same = {name for name in one if torch.equal(one[name], two[name])}
    assert one.keys() - same <= {"heads.calibration"}, "a learning rate of 0 changes no weight"
    record = json.loads((tmp_path / "more" / "drafter" / "training.json").read_text())
    assert record["before"]["steps"] == STEPS and record["before"]["before"] is None
    train(capsys, place, tmp_path / "learnt", "--start", first, *FLOAT32)
    other = load_file(tmp_path / "learnt" / "drafter" / "model.safetensors")
    assert not torch.equal(one["fuse.weight"], other["fuse.weight"])
    code, _, err = run(
        capsys, "train", "--captured", place / "captured.jsonl", "--images", place / "images", "--target", place,
        "--out", tmp_path / "no", "--start", first, "--form", "ar",
    )  # fmt: skip
    assert code == 2 and "fixes the method, form" in err


@pytest.mark.parametrize("form", ["block", "ar"])
def test_an_interrupted_run_equals_an_uninterrupted_one(
    capsys: pytest.CaptureFixture[str], place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    whole = train(capsys, place, tmp_path / "whole", "--form", form, *FLOAT32)
    assert whole["finished"] and whole["steps"] == STEPS
    assert set(whole["held_out"]) == {"language", "vision", "fusion", "text", "acceptance"}
    assert Path(whole["curves"]).read_bytes().startswith(b"\x89PNG")

    interrupt(monkeypatch, DraftObjective)
    part = train(capsys, place, tmp_path / "parts", "--form", form, *FLOAT32)
    assert not part["finished"] and part["steps"] == 4
    again = train(capsys, place, tmp_path / "parts", "--form", form, *FLOAT32)
    assert again["finished"] and again["held_out"] == whole["held_out"]
    record = (tmp_path / "parts" / "drafter" / "training.json").read_bytes()
    train(capsys, place, tmp_path / "parts", "--form", form, *FLOAT32)
    assert (tmp_path / "parts" / "drafter" / "training.json").read_bytes() == record  # a finished run stays as it is
    code, _, err = run(
        capsys, "train", "--captured", place / "captured.jsonl", "--images", place / "images", "--target", place,
        "--out", tmp_path / "parts", "--form", form, "--steps", STEPS, "--batch", 3, "--draft-vocabulary", 90,
    )  # fmt: skip
    assert code == 2 and "holds a run with draft_vocabulary 100, not 90" in err
    one, two = (load_file(tmp_path / name / "drafter" / "model.safetensors") for name in ("whole", "parts"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[k], two[k]) for k in one)


def test_the_drafter_is_used_by_every_command(capsys: pytest.CaptureFixture[str], place: Path, tmp_path: Path) -> None:

    drafter = train(capsys, place, tmp_path / "run", "--calibrate", 2)["drafter"]
    record = json.loads((Path(drafter) / "training.json").read_text())
    assert set(record["thresholds"]) == {"0.005", "0.01", "0.02", "0.05", "0.1"}
    image = place / "images" / "0.png"
    common = ["--target", place, "--drafter", drafter, "--max-new-tokens", 10, "--json"]
    code, out, err = run(capsys, "generate", image, "-p", "Describe it.", *common)
    assert code == 0, err
    answer = json.loads(out)
    assert answer["method"] == "msd"
    labels = answer["predicted_modality"]
    assert len(labels) == len(answer["tokens"]) and labels[0] is None
    assert set(labels[1:]) <= {"language", "vision", "fusion"}
    assert answer["divergence"] is None
    plain = ["generate", image, "-p", "Describe it.", "--target", place, "--max-new-tokens", 10, "--json"]
    _, out, _ = run(capsys, *plain, "--method", "ar")
    assert answer["tokens"] == json.loads(out)["tokens"]
    lossy = [
        "--verifier",
        "budget",
        "--epsilon",
        "0.05",
        "--threshold",
        "vision=0.7",
        "--temperature",
        "1",
        "--seed",
        1,
    ]
    code, out, err = run(capsys, "generate", image, "-p", "Describe it.", *common, *lossy)
    assert code == 0, err
    spent = json.loads(out)["divergence"]
    assert 0 <= spent["per_token"] <= 0.05 + 1e-9
    data = ["--data", place / "data.jsonl", "--images", place / "images", "--limit", 2, "--method", "msd"]
    code, out, err = run(capsys, "verify", *common, *data)
    assert code == 0, err
    assert [r["passed"] for r in json.loads(out)["rows"]] == [True]
    thresholds = ["--cuts", place / "captured.jsonl.cuts.json"]
    code, out, err = run(capsys, "bench", *common, *data, *thresholds)
    assert code == 0, err
    row = next(r for r in json.loads(out)["rows"] if r["method"] == "msd")
    assert row["identical"] == 1.0
    assert set(row["acceptance_by_modality"]) == {"vision", "language", "fusion"}
    counted = sum(row["positions_by_modality"]["acceptance"].values())
    assert sum(e["drafted"] for e in row["errors"]) == counted > 0


def test_tensorboard_gets_the_log(capsys: pytest.CaptureFixture[str], place: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    train(capsys, place, tmp_path / "run", "--tensorboard")
    assert list((tmp_path / "run" / "tensorboard").glob("events.*"))


def test_help_names_the_parts() -> None:
    assert tuple(PARTS.split(",")) == SWITCHES


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--form", "tree"], "form 'tree' is unknown; choose one of ar, block"),
        (["--parts", "router,hands"], "--parts 'hands' is no part of the drafter"),
        (["--parts", ""], "--parts '' is no part of the drafter"),
        (["--weighting", "wild"], "loss weighting 'wild' is unknown"),
        (["--cuts", "none.json"], "no label thresholds at 'none.json'"),
        (["--captured", "none.jsonl"], "cannot read data 'none.jsonl'"),
    ],
)
def test_bad_input_is_one_line(
    capsys: pytest.CaptureFixture[str], place: Path, tmp_path: Path, options: list[str], message: str
) -> None:
    code, out, err = run(
        capsys, "train", "--captured", place / "captured.jsonl", "--images", place / "images", "--target", place,
        "--out", tmp_path / "run", *options,
    )  # fmt: skip
    assert (code, out) == (2, "")
    assert message in err.strip().splitlines()[-1]


def test_bad_policies_are_one_line(capsys: pytest.CaptureFixture[str], place: Path) -> None:
    for options, message in (
        (["--verifier", "brave"], "unknown verifier 'brave'"),
        (["--threshold", "vision"], "--threshold 'vision' is not NAME=NUMBER"),
        (["--verifier", "threshold", "--threshold", "smell=0.5"], "unknown modality 'smell'"),
        (["--epsilon", "0.1"], "verifier 'lossless' has no epsilon"),
        (["--drafter", str(place)], "has no known format of draft heads"),
    ):
        code, out, err = run(capsys, "generate", "-p", "Hello", "--target", place, *options)
        assert (code, out) == (2, ""), options
        assert message in err, options


@pytest.mark.parametrize("method", ["msd", "eagle2"])
def test_a_drafter_saved_within_a_run_does_not_change_it(place: Path, tmp_path: Path, method: str) -> None:
    """The drafter of step 3 is saved like a finished one. The run's own drafter is that of a run without copies."""
    answers = read_captured(place / "captured.jsonl", place / "images")
    thresholds = ModalityThresholds.load(label_thresholds_path(place / "captured.jsonl"))
    model, processor = load_target(str(place))
    settings = DraftTraining(method=method, steps=STEPS, batch=3, draft_vocabulary=100, precision="float32")
    for out, keep_at in (("plain", ()), ("kept", (3, STEPS))):
        with_copies = replace(settings, keep_at=keep_at)
        assert train_drafter(model, processor, answers, answers[:3], thresholds, tmp_path / out, with_copies)
    plain, kept = (tmp_path / out / "drafter" for out in ("plain", "kept"))
    early, last = (step_folder(tmp_path / "kept", step) for step in (3, STEPS))
    weights = {folder: load_file(folder / "model.safetensors") for folder in (plain, kept, early, last)}
    assert all(torch.equal(weights[plain][name], weights[kept][name]) for name in weights[plain])
    assert all(torch.equal(weights[last][name], weights[kept][name]) for name in weights[kept])
    assert any(not torch.equal(weights[early][name], weights[kept][name]) for name in weights[kept])
    records = [checkpoint.training(folder) for folder in (early, last, kept)]
    assert [record["steps"] for record in records] == [3, STEPS, STEPS]
    assert [record["finished"] for record in records] == [None, STEPS, STEPS]
    assert records[0].keys() == records[2].keys() and records[1]["held_out"] == records[2]["held_out"]
    with pytest.raises(UserError, match="cannot save its drafter at step 9"):
        replace(settings, keep_at=(9,))
