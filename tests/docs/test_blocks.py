"""Every block of Python and shell in the README and the pages runs, or is at least parsed against the command line."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import runpy
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from PIL import Image

import clips
import tiny_checkpoint
from docs.blocks import PAGES, PARSED, ROOT, TESTED, Block, blocks, commands
from events import writers
from msd import loading
from msd.cli import app, main
from msd.reference import sample_photos
from training_command import FLOAT32, run, train

ALL = [block for page in PAGES for block in blocks(page)]
SHELL = [block for block in ALL if block.language == "bash"]
LANGUAGES = {"python", "bash", "json", "text"}
HARMLESS = {"python3.11", ".", "git", "pre-commit", "vllm"}


@pytest.mark.parametrize("block", ALL, ids=lambda block: block.name)
def test_a_block_is_named_and_its_comment_understood(block: Block) -> None:
    assert block.language in LANGUAGES
    if block.mark.startswith(TESTED):
        test = ROOT / block.mark.removeprefix(TESTED)
        assert test.is_file()
        assert block.page.name in test.read_text(encoding="utf-8") or block.page.name == "targets.md"
    elif block.mark.startswith(PARSED):
        assert len(block.mark) > len(PARSED)
    else:
        block.replaced()
    if block.language == "json":
        for line in block.text.splitlines():
            json.loads(line)
    if block.language == "python" and "…" not in block.text:
        tree = ast.parse(block.text if not block.text.startswith('"deepseek') else f"{{{block.text}}}")
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("msd"):
                assert importlib.util.find_spec(node.module or "") is not None


def check_msd(words: list[str]) -> None:
    """Raises for a command or an option that does not exist, or an option without its value."""
    command: Any = typer.main.get_command(app)
    context = command.context_class(command, info_name="msd")
    while hasattr(command, "commands") and words and not words[0].startswith("-"):
        assert words[0] in command.commands, words
        command = command.commands[words[0]]
        context, words = command.context_class(command, info_name=words[0], parent=context), words[1:]
    command.make_parser(context).parse_args(list(words))


def check_python(words: list[str]) -> None:
    """Raises for a script, module or option that the repository does not have."""
    if words[0] != "-m":
        assert (ROOT / words[0]).is_file(), words
        return
    if words[1] in ("pytest", "mkdocs"):
        return
    place = ROOT / words[1].replace(".", "/")
    files = list(place.glob("*.py")) if place.is_dir() else [place.with_suffix(".py")]
    text = "".join(file.read_text(encoding="utf-8") for file in files)
    for word in words[2:]:
        if word.startswith("--"):
            option = word.split("=")[0]
            assert f'"{option}"' in text, f"{words[1]} has no {option}"


def check(words: list[str]) -> None:
    """Checks one command of a shell block."""
    name, rest = words[0], words[1:]
    if name == "msd":
        check_msd(rest)
    elif name == "python":
        check_python(rest)
    elif name == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
        assert {word for word in rest if "=" not in word} <= set(targets), words
    elif name == "pip":
        text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
        for extra in re.findall(r"\[([\w,]+)\]", " ".join(rest)):
            assert all(f"\n{part} = [" in text for part in extra.split(",")), extra
    elif name == "accelerate":
        assert (ROOT / rest[rest.index("--config_file") + 1]).is_file()
        check_msd(rest[rest.index("msd") + 1 :])
    else:
        assert name in HARMLESS, words


@pytest.mark.parametrize("block", SHELL, ids=lambda block: block.name)
def test_commands_and_options_exist(block: Block) -> None:
    found = commands(block.text)
    assert found
    for words in found:
        check(words)


@pytest.mark.parametrize(
    "line",
    [
        "msd generate x.jpg --promt Hi",
        "msd gnerate",
        "msd bench --limit",
        "python -m recipes.serve.load --pids 1",
        "make tests",
        "pip install '.[vidoe]'",
    ],
)
def test_a_wrong_command_is_found(line: str) -> None:
    with pytest.raises(Exception, match=r"."):
        check(commands(line)[0])


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a reader has: photos, recordings, a model with captured answers, a smaller one, and a trained head."""
    folder = tmp_path_factory.mktemp("reader")
    place = tiny_checkpoint.captured(folder / "my-model")
    tiny_checkpoint.write(folder / "small-model", seed=1)
    shutil.copytree(place / "images", folder / "images")
    for file in place.glob("*.json*"):
        if file.name.startswith(("data", "captured")):
            shutil.move(file, folder)
    shutil.copy(sample_photos()[0], folder / "photo.jpg")
    clips.write_clip(folder / "clip.mp4", range(10))
    stream = writers.scene()
    (folder / "recording.raw").write_bytes(writers.evt3(stream))
    (folder / "long.h5").write_bytes(writers.hdf5(stream))
    return folder


@pytest.fixture
def reader(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reference_model: tuple[Any, Any]) -> Path:
    """A copy of that folder as the current one; the reference model is loaded once."""
    folder = tmp_path / "reader"
    shutil.copytree(made, folder)
    monkeypatch.chdir(folder)
    load = loading.load_target
    shared = lambda target="reference", *a, **k: reference_model if target == "reference" else load(target, *a, **k)  # noqa: E731
    monkeypatch.setattr(loading, "load_target", shared)
    return folder


def names(folder: Path) -> dict[str, Any]:
    """The names that the pages use without making them."""
    from msd import SpeculativeVLM

    frames = [np.full((8, 8), 20 * i, np.uint8) for i in range(4)]
    p = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.8, 0.1], [0.2, 0.2, 0.6]])
    return {
        "vlm": SpeculativeVLM.from_pretrained(folder / "my-model"),
        "photo": Image.open(folder / "photo.jpg"), "frames": frames, "times": [0, 1000, 2000, 3000],
        "draft_tokens": torch.tensor([0, 1]), "target_probs": p, "draft_probs": p[:2].flip(1),
        "modalities": ["vision", "language"],
    }  # fmt: skip


RUN = {page: [block for block in blocks(page) if block.runs] for page in PAGES}


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if RUN[page]], ids=lambda page: page.name)
def test_the_blocks_of_a_page_run(page: Path, reader: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if page.name == "train_a_drafter.md":
        for file in reader.glob("captured*"):
            file.unlink()
    if page.name == "published_heads.md":
        train(capsys, reader_as_place(reader), reader / "run", "--method", "eagle3", *FLOAT32)
        assert run(capsys, "export", "--to", "eagle", "head", "--drafter", "run/drafter")[0] == 0
    known = names(reader) if any(block.language == "python" for block in RUN[page]) else {}
    for block in RUN[page]:
        if block.language == "python":
            exec(compile(block.replaced(), block.name, "exec"), known)
            continue
        for words in commands(block.replaced()):
            execute(words, block.name, capsys)


def reader_as_place(folder: Path) -> Path:
    """The model's folder with its answers, as `training_command.train` expects it."""
    place = folder / "my-model"
    for file in folder.glob("captured*"):
        shutil.copy(file, place)
    return place


def execute(words: list[str], name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Runs one command in this process."""
    if words[0] == "python":
        runpy.run_path(str(ROOT / words[1]), run_name="__main__")
        return
    assert words[0] == "msd", f"{name}: mark this block as parsed"
    with pytest.raises(SystemExit) as stop:
        main(words[1:])
    assert not stop.value.code, f"{name}: {' '.join(words)}: {capsys.readouterr().err}"
