"""The examples run: with small numbers in the one process of the tests, and with their own numbers under `--full`."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tools import notebooks

import tiny_checkpoint
from msd import loading
from msd.core import modality
from msd.drafters import auxiliary

SMALL = {"TOKENS": "6", "STEPS": "2", "PHOTOS": "2", "PROMPTS": "1"}
NAMES = [path.stem for path in notebooks.scripts()]
ALONE = ("client", "train_a_drafter")  # they start processes, which get a tiny target
LONG = ("compare_methods",)
pytestmark = pytest.mark.slow


def smaller(text: str, **more: str) -> str:
    """An example with other numbers in its lines of constants."""

    def line(found: re.Match[str]) -> str:
        names, values = (part.split(", ") for part in found[0].split("  #")[0].split(" = "))
        new = [{**SMALL, **more}.get(name, value) for name, value in zip(names, values, strict=True)]
        return f"{', '.join(names)} = {', '.join(new)}"

    pattern = rf"^(?=[A-Z, ]*\b(?:{'|'.join([*SMALL, *more])})\b)[A-Z]+(?:, [A-Z]+)* = [^\n(]*$"
    return re.sub(pattern, line, text, flags=re.M)


@pytest.fixture
def tiny_target(tmp_path: Path) -> str:
    """A tiny checkpoint, as the text of a Python string."""
    return repr(str(tiny_checkpoint.write(tmp_path / "target")))


@pytest.fixture(autouse=True)
def nothing_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    auxiliary.get("events")
    monkeypatch.setattr(auxiliary, "_SOURCES", dict(auxiliary._SOURCES))
    monkeypatch.setattr(modality, "_REGISTRY", dict(modality._REGISTRY))


def text(name: str) -> str:
    return (notebooks.EXAMPLES / f"{name}.py").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.full if name in LONG else ()) for name in NAMES if name not in ALONE]
)
def test_an_example_on_the_reference_model(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reference_model: tuple[Any, Any]
) -> None:
    load = loading.load_target
    shared = lambda target="reference", *a, **k: reference_model if target == "reference" else load(target, *a, **k)  # noqa: E731
    monkeypatch.setattr(loading, "load_target", shared)
    script = tmp_path / f"{name}.py"
    script.write_text(smaller(text(name)), encoding="utf-8")
    runpy.run_path(str(script), run_name="__main__")


@pytest.mark.full  # docs/train_a_drafter.md runs the same commands in make test
def test_the_example_that_trains(tmp_path: Path, tiny_target: str) -> None:
    script = tmp_path / "script.py"
    script.write_text(smaller(text("train_a_drafter"), TARGET=tiny_target, PHOTOS="3"), encoding="utf-8")
    done = subprocess.run([sys.executable, script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "drafter: " in done.stdout, done.stderr


def test_notebooks_are_the_scripts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert notebooks.stale() == [], "run: python -m tools.notebooks"
    monkeypatch.setattr(notebooks, "OUT", tmp_path)
    assert notebooks.stale() == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_the_constants_of_an_example_are_found(name: str) -> None:
    assert smaller(text(name)) != text(name)


def execute(name: str, folder: Path, **constants: str) -> None:
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    made = nbformat.read(notebooks.OUT / f"{name}.ipynb", as_version=4)
    for cell in made.cells if constants else ():
        cell.source = smaller(cell.source, **constants)
    client = nbclient.NotebookClient(made, timeout=1800, resources={"metadata": {"path": str(folder)}})
    client.execute()


def test_a_notebook_runs(tmp_path: Path, tiny_target: str) -> None:
    execute("client", tmp_path, TARGET=tiny_target)


@pytest.mark.full
@pytest.mark.parametrize("name", NAMES)
def test_every_notebook_runs_with_its_own_numbers(name: str, tmp_path: Path) -> None:
    execute(name, tmp_path)
