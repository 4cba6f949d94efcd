"""What a newcomer types first: each mistake gets one line that says what to do."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest

import tiny_checkpoint
from msd import loading
from msd.bench.data import load_data
from training_command import run


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model and photos."""
    folder = tmp_path_factory.mktemp("newcomer")
    tiny_checkpoint.write(folder / "model")
    tiny_checkpoint.photos(folder / "photos", 1)
    return folder


@pytest.fixture(autouse=True)
def there(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)


ASK = ("generate", "photos/0.png", "-p", "What?")


@pytest.mark.parametrize(
    ("command", "parts"),
    [
        (("generate",), ("the prompt is empty", "-p 'Describe the image.'")),
        (("generate", "photos/0.png", "What is it?"), ("the prompt is empty", "-p 'What is it?'")),
        (("generate", "clip.mp4", "-p", "What?"), ("looks like video", "--video")),
        (("generate", "sound.wav", "-p", "What?"), ("looks like audio", "--audio")),
        ((*ASK, "--target", "./nowhere"), ("no such folder", "./nowhere")),
        ((*ASK, "--target", "/nowhere/model"), ("no such folder", "/nowhere/model")),
        ((*ASK, "--target", "photos"), ("folder without config.json", "checkpoint")),
        ((*ASK, "--target", "model", "--method", "msd"), ("made for another target", "train it")),
        ((*ASK, "--target", "model", "--method", "eagl3"), ("unknown method 'eagl3'", "did you mean 'eagle3'?")),
        ((*ASK, "--target", "model", "--drafter", "model"), ("no known format", "as --draft-model")),
        ((*ASK, "--target", "model", "--draft-model", "./nowhere"), ("draft model './nowhere'", "no such folder")),
        ((*ASK, "--target", "model/config.json"), ("is a file", "give the folder")),
        (("inspect", *ASK[1:], "--target", "model", "-o", "photos/0.png"), ("'photos/0.png' is an input",)),
        (("export", "model", "--to", "vllm"), ("'model' has a config.json", "choose another folder")),
        (("check", "nowhere"), ("there is no folder 'nowhere'",)),
        (("export", "out"), ("Missing option '--to'", "see 'msd export --help'")),
        (("gnerate",), ("Did you mean 'generate'", "see 'msd --help'")),
        (("reference", "instal"), ("see 'msd reference --help'",)),
        ((*ASK, "--target", "org/model"), ("unknown target 'org/model'", "HF_HUB_OFFLINE is set")),
        (("serve", "--target", "model", "--host", "nowhere.invalid"), ("cannot listen on nowhere.invalid", "--host")),
    ],
    ids=lambda value: " ".join(value),
)
def test_a_mistake_gets_a_line_that_helps(
    capsys: pytest.CaptureFixture[str], command: tuple[str, ...], parts: tuple[str, ...]
) -> None:
    code, _, err = run(capsys, *command)
    assert code == 2 and err.count("\n") == 1
    assert all(part in err for part in parts), err


def test_the_folder_of_a_run_names_the_one_of_its_drafter(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "run" / "drafter").mkdir(parents=True)
    (tmp_path / "run" / "drafter" / "config.json").write_text("{}")
    code, _, err = run(capsys, *ASK, "--target", "model", "--drafter", tmp_path / "run")
    assert code == 2 and f"give '{tmp_path / 'run' / 'drafter'}'" in err
    code, _, err = run(capsys, *ASK, "--target", "model", "--drafter", tmp_path)
    assert code == 2 and "give the folder that `msd train` wrote" in err


def test_a_supported_architecture_that_the_library_lacks_names_the_upgrade(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "newest_vl"}')
    code, _, err = run(capsys, *ASK, "--target", tmp_path)
    assert code == 2 and "no adapter can be written" in err
    known = loading.families()
    monkeypatch.setattr(loading, "families", lambda: {**known, "newest_vl": known["llava"]})
    code, _, err = run(capsys, *ASK, "--target", tmp_path)
    assert code == 2 and "'newest_vl'" in err and "pip install --upgrade transformers" in err


def test_a_port_that_is_taken_is_named_before_the_model_is_loaded(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "load_target", lambda *_, **__: pytest.fail("the model was loaded"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, _, err = run(capsys, "serve", "--target", "model", "--port", port)
    assert code == 2 and f"port {port}" in err and "--port" in err and err.count("\n") == 1


def test_the_bundled_prompts_can_be_captured(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "capture", "--target", "model", "--out", "own.jsonl", "--max-new-tokens", 1, "--json")
    assert code == 0
    singles = {(line.images, line.prompt) for line in load_data(None) if not line.before}
    assert json.loads(out)["records"] == len(singles)
