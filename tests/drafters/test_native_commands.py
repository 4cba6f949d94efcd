"""The commands with what a checkpoint brings: layers of Qwen3.5 under their published names, Gemma 4's assistant.

The processors of both need torchvision. The family's tiny one takes their place.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import test_assistant
import torch
from safetensors.torch import load_file, save_file
from transformers.modeling_layers import MtpModel

from families import BY_NAME
from family_processor import FamilyProcessor, photos
from msd import loading
from msd.cli import main
from msd.drafters.algorithms import mtp
from mtp_targets import TARGETS, layers_of

PUBLISHED = {
    "layers.0.eh_proj.": "mtp.fc.", "layers.0.enorm.": "mtp.pre_fc_norm_embedding.", "layers.0.post_norm.": "mtp.norm.",
    "layers.0.hnorm.": "mtp.pre_fc_norm_hidden.", "layers.0.mtp_block.": "mtp.layers.0.",
}  # fmt: skip


def write(folder: Path, name: str) -> MtpModel:
    """Saves a tiny Qwen3.5 with one multi-token-prediction layer as it is published; returns the layer."""
    model = TARGETS[name].make(1)
    network = layers_of(model, 1)
    model.save_pretrained(folder)
    path = folder / "model.safetensors"
    stored = load_file(path)
    for key, weight in network.state_dict().items():
        for own, published in PUBLISHED.items():
            if key.startswith(own):
                stored[key.replace(own, published)] = weight.clone()
    assert sum(key.startswith("mtp.") for key in stored) == len(network.layers.state_dict())
    save_file(stored, path, metadata={"format": "pt"})
    return network


def command(capsys: pytest.CaptureFixture[str], *arguments: str, fails: bool = False) -> Any:
    """What a command prints as JSON; its error if it fails."""
    with pytest.raises(SystemExit) as stop:
        main([*arguments, "--json"])
    captured = capsys.readouterr()
    assert bool(stop.value.code) == fails, captured.err
    return captured.err if fails else json.loads(captured.out)


def verify(capsys: pytest.CaptureFixture[str], name: str, folder: Path, method: str, *arguments: str) -> None:
    """`msd verify` on one prompt with an image, under all of its settings."""
    (photo,) = photos(BY_NAME[name], folder, 1)
    (folder / "data.jsonl").write_text(json.dumps({"image": photo.name, "prompt": "What is it?"}))
    lines = ("--data", str(folder / "data.jsonl"), "--max-new-tokens", "6", "--method", method)
    (row,) = command(capsys, "verify", "--target", str(folder / "target"), *lines, *arguments)["rows"]
    assert (row["method"], row["compared"], row["passed"]) == (method, 6, True)


@pytest.fixture
def processors(monkeypatch: pytest.MonkeyPatch) -> None:
    def of(_: Any, path: str | Path) -> FamilyProcessor:
        return FamilyProcessor(BY_NAME[json.loads((Path(path) / "config.json").read_text())["model_type"]])

    monkeypatch.setattr(loading, "_processor", of)


@pytest.mark.usefixtures("processors")
@pytest.mark.parametrize("name", ["qwen3_5", "qwen3_5_moe"])
def test_layers_of_a_published_checkpoint(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The library loads them all; they pass `msd verify`, and `msd generate` chooses them."""
    network, folder = write(tmp_path / "target", name), str(tmp_path / "target")
    loaded = mtp.load(loading.load_target(folder)[0]).layers.state_dict()
    for key, weight in network.layers.state_dict().items():
        assert torch.equal(weight, loaded[key]), key
    if name == "qwen3_5":
        verify(capsys, name, tmp_path, "mtp")
        asked = ("generate", str(tmp_path / "0.png"), "-p", "Who?", "--target", folder)
        answer = command(capsys, *asked, "--max-new-tokens", "6")
        assert (answer["method"], answer["method_reason"]) == ("mtp", "the target's checkpoint brings it")
        assert answer["num_spec_steps"] > 0
        refused = command(capsys, *asked, "--method", "mtp", "--draft-sees", "image", fails=True)
        assert "draft_sees 'image' is for a draft model" in refused


@pytest.mark.usefixtures("processors")
def test_an_assistant(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    test_assistant.constructible.__wrapped__(monkeypatch)  # type: ignore[attr-defined]
    helper = ("--draft-model", str(tmp_path / "assistant"))
    test_assistant.gemma4(2, 12).save_pretrained(tmp_path / "target")
    test_assistant.assistant(12).save_pretrained(tmp_path / "assistant")
    verify(capsys, "gemma4", tmp_path, "draft-model", *helper)
    asked = ("generate", str(tmp_path / "0.png"), "-p", "Who?", "--target", str(tmp_path / "target"), *helper)
    answer = command(capsys, *asked, "--max-new-tokens", "6")
    assert answer["method"] == "assistant" and answer["num_spec_steps"] > 0
    assert "leave out draft_sees" in command(capsys, *asked, "--draft-sees", "image", fails=True)
