"""`msd train --method NAME`: every published method is trained, saved, resumed, and used by the other commands."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import rivals
import tiny_checkpoint
from msd.drafters import registry
from msd.drafters.toolkit import checkpoint
from msd.drafters.toolkit.drafter import TrainedDrafter
from msd.drafters.toolkit.training import Objective
from training_command import FLOAT32, STEPS, interrupt, run, train


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A target with captured answers."""
    return tiny_checkpoint.captured(tmp_path_factory.mktemp("rivals"))


@pytest.mark.parametrize("method", rivals.RIVALS)
def test_trained_loaded_and_used(capsys: pytest.CaptureFixture[str], place: Path, tmp_path: Path, method: str) -> None:
    summary = train(capsys, place, tmp_path / "run", "--method", method)
    assert summary["finished"] and set(summary["held_out"]) == {"language", "vision", "fusion", "text", "acceptance"}
    assert Path(summary["curves"]).read_bytes().startswith(b"\x89PNG")
    made = registry.load(summary["drafter"])
    assert type(made) is rivals.RIVALS[method] and made.config.method == method
    assert made.calibration == made.provenance["calibration"] and {"log_odds", "bias"} <= made.calibration.keys()
    image = place / "images" / "0.png"
    command = ["generate", image, "-p", "Describe it.", "--target", place, "--max-new-tokens", 10, "--json"]
    code, out, err = run(capsys, *command, "--drafter", summary["drafter"])
    assert code == 0, err
    answer = json.loads(out)
    assert answer["method"] == method
    _, out, _ = run(capsys, *command, "--method", "ar")
    assert answer["tokens"] == json.loads(out)["tokens"]


def test_an_interrupted_run_equals_an_uninterrupted_one(
    capsys: pytest.CaptureFixture[str], place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(capsys, place, tmp_path / "whole", "--method", "vispec", *FLOAT32)
    interrupt(monkeypatch, Objective)
    assert not train(capsys, place, tmp_path / "parts", "--method", "vispec", *FLOAT32)["finished"]
    again = train(capsys, place, tmp_path / "parts", "--method", "vispec", *FLOAT32)
    assert again["finished"] and again["held_out"] == whole["held_out"]
    one, two = (load_file(tmp_path / name / "drafter" / "model.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(one[k], two[k]) for k in one)
    code, _, err = run(
        capsys, "train", "--captured", place / "captured.jsonl", "--images", place / "images", "--target", place,
        "--out", tmp_path / "parts", "--method", "eagle2", "--steps", STEPS,
    )  # fmt: skip
    assert code == 2 and "holds a run with method 'vispec', not 'eagle2'" in err


def test_the_chances_of_a_trained_drafter_are_fitted_again(
    capsys: pytest.CaptureFixture[str], place: Path, tmp_path: Path
) -> None:
    drafter = Path(train(capsys, place, tmp_path / "run", "--method", "eagle2")["drafter"])
    fitted, weights = checkpoint.training(drafter), (drafter / "model.safetensors").read_bytes()
    answers = ["--captured", place / "captured.jsonl", "--images", place / "images"]
    fit = ["calibrate", *answers, "--target", place, "--drafter"]
    code, out, err = run(capsys, *fit, drafter, "--limit", 3, "--json")
    assert code == 0, err
    again, told = checkpoint.training(drafter), json.loads(out)
    assert told == {"drafter": str(drafter), **{name: again[name] for name in ("calibration", "confidence")}}
    assert again["calibration"] != fitted["calibration"] and again["settings"] == fitted["settings"]
    assert registry.load(drafter).calibration == again["calibration"]
    assert (drafter / "model.safetensors").read_bytes() == weights
    code, out, err = run(capsys, *fit, drafter, "--limit", 3)
    assert code == 0 and "candidates, calibration error" in out and len(out.splitlines()) == 1
    other = Path(train(capsys, place, tmp_path / "other", "--method", "msd")["drafter"])  # it reads other layers
    alone = checkpoint.training(other)["calibration"]
    code, out, err = run(capsys, *fit, other, "--limit", 3, "--json")
    assert code == 0 and json.loads(out)["calibration"] != alone, err
    alone = checkpoint.training(other)["calibration"]
    code, out, err = run(capsys, *fit, other, "--drafter", drafter, "--limit", 3, "--json")
    both = [json.loads(line)["calibration"] for line in out.splitlines()]
    assert code == 0 and len(both) == 2, err
    for shared, single in zip(both, (alone, again["calibration"]), strict=True):
        assert shared == pytest.approx(single, abs=0.05), "the shared states are rounded to bfloat16"
    code, _, err = run(capsys, *fit, drafter, "--drafter", tmp_path / "none")
    assert code == 2 and "there is no folder" in err and len(err.splitlines()) == 1
    checkpoint.save_training(drafter, {})
    assert registry.load(drafter).calibration is None  # as in folders of earlier versions
    code, out, err = run(
        capsys, "generate", place / "images" / "0.png", "-p", "Describe it.", "--target", place, "--drafter", drafter,
        "--max-new-tokens", 5, "--json",
    )  # fmt: skip
    assert code == 0 and json.loads(out)["method"] == "eagle2", err


def test_weights_in_the_repository_are_methods_for_the_reference_model(
    capsys: pytest.CaptureFixture[str], place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drafter = Path(train(capsys, place, tmp_path / "run", "--method", "eagle2")["drafter"])
    (tmp_path / "weights").mkdir()
    drafter.rename(tmp_path / "weights" / "any-name")
    monkeypatch.setattr(registry, "ROOTS", (tmp_path / "weights",))
    for name in ("eagle2", "specvlm-video"):  # the second drafts with the first one's weights
        assert name in registry.methods() and name not in registry.methods("other/target")
        made = registry.create(name)
        assert isinstance(made, TrainedDrafter) and type(made.network) is rivals.RIVALS[name]
    row = ["--target", place, "--data", place / "data.jsonl", "--images", place / "images", "--limit", 2, "--json"]
    code, out, err = run(capsys, "verify", "--method", "eagle2,specvlm-video", *row)
    assert code == 0, err
    assert [r["passed"] for r in json.loads(out)["rows"]] == [True, True]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--method", "eagle9"], "method 'eagle9' cannot be trained; choose msd or one of"),
        (["--method", "eagle2", "--parts", "router"], "method 'eagle2' is trained as published"),
        (["--method", "eagle2", "--weighting", "fixed"], "method 'eagle2' is trained as published"),
        (["--method", "eagle2", "--calibrate", "2"], "--calibrate is for msd's router"),
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
