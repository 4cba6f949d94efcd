"""`msd doctor` names what is missing and the command that mends it; shell completion; the typed package marker."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from torch import nn

import msd
import tiny
import tiny_checkpoint
from msd import backends, doctor
from training_command import run

BLOCKED = """
import sys
from importlib import metadata

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "transformers"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

found = metadata.version
def version(name):
    if name in ("torch", "transformers"):
        raise metadata.PackageNotFoundError(name)
    return found(name)

import importlib.util
spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name in ("torch", "transformers") else spec(name, *a)
metadata.version = version
sys.meta_path.insert(0, Blocked())
from msd.cli import main
main(["doctor", "--json"])
"""


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "neighbours", lambda: 0.0)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)


def report(capsys: pytest.CaptureFixture[str], *more: object, code: int = 0) -> dict[str, Any]:
    found, out, err = run(capsys, "doctor", "--json", *more)
    assert found == code, err
    loaded: dict[str, Any] = json.loads(out)
    return loaded


def absent(monkeypatch: pytest.MonkeyPatch, versions: dict[str, str | None]) -> None:
    """Has some packages look missing (None) or of another version."""
    real = metadata.version

    def version(name: str) -> str:
        if name in versions:
            if (given := versions[name]) is None:
                raise metadata.PackageNotFoundError(name)
            return given
        return real(name)

    monkeypatch.setattr(metadata, "version", version)


def test_what_is_installed(capsys: pytest.CaptureFixture[str]) -> None:
    found = report(capsys, "--quick")
    versions = {row["name"]: row["version"] for row in found["packages"]}
    assert versions["torch"] == metadata.version("torch") and versions["typer"] == metadata.version("typer")
    assert {"train", "video", "serve", "events"} <= found["extras"].keys()
    assert found["msd"]["version"] == msd.__version__ and "msd" in found["drafters"]
    assert not [row for row in found["missing"] if row["needed"]]
    assert found["backend"]["name"] is None and "--quick" in found["backend"]["reason"]


def test_a_missing_extra_is_named_with_its_command(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    absent(monkeypatch, {"h5py": None})
    found = report(capsys, "--quick")
    assert not found["extras"]["events"]["installed"] and found["extras"]["video"]["installed"]
    (row,) = (row for row in found["missing"] if "h5py" in row["what"])
    assert row["command"] == "pip install 'msd-decoding[events]'" and not row["needed"]
    code, out, _ = run(capsys, "doctor", "--quick")
    assert code == 0 and "[events]     lacks h5py" in out and row["command"] in out


def test_a_package_that_is_too_old_is_an_error(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    absent(monkeypatch, {"safetensors": "0.3.0"})
    found = report(capsys, code=1)
    (row,) = (row for row in found["missing"] if row["needed"])
    assert "safetensors 0.3.0" in row["what"] and row["command"].startswith("pip install 'safetensors>=")
    assert found["backend"]["name"] is None  # nothing is loaded with wrong packages


def test_it_answers_without_torch() -> None:
    done = subprocess.run([sys.executable, "-c", BLOCKED], capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    needed = [row["what"] for row in json.loads(done.stdout)["missing"] if row["needed"]]
    assert len(needed) == 2 and "torch is missing" in needed[0] and "transformers is missing" in needed[1]


def test_a_reference_model_that_is_not_there(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("platformdirs.user_cache_dir", lambda *_, **__: str(tmp_path))
    found = report(capsys)
    assert found["reference"]["state"] == "not assembled yet" and "not assembled" in found["backend"]["reason"]
    assert {"msd reference install"} <= {row["command"] for row in found["missing"]}
    (tmp_path / "costs").mkdir()
    (tmp_path / "costs" / "x.json").write_text("12345")
    assert {"path": str(tmp_path / "costs"), "bytes": 5} in report(capsys)["caches"]


def test_the_backend_of_a_target_and_why(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    found = report(capsys, "--target", tiny_checkpoint.write(tmp_path))["backend"]
    assert found["name"] in ("fused", "plain") and found["reason"].startswith("measured: ")
    model = tiny.llava()
    assert backends.choose(model, "plain").explanation == "requested"
    model.get_decoder().config.hidden_act = "gelu"
    model.get_decoder().layers[0].mlp.act_fn = nn.GELU()
    unsupported = backends.choose(model)
    assert unsupported.name == "plain" and unsupported.explanation == unsupported.reason != ""


def test_threads_and_neighbours_are_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = {"cores": 8, "usable_cores": 8, "busy_cores": 3.2, "threads": 8, "OMP_NUM_THREADS": None}
    (row,) = doctor._advice(machine)
    assert "3.2 of 8 cores" in row["what"] and row["command"].endswith("OMP_NUM_THREADS=4")
    (row,) = doctor._advice({**machine, "busy_cores": 0.1, "threads": 2, "OMP_NUM_THREADS": "2"})
    assert "2 of 8 cores" in row["what"] and row["command"] == "unset OMP_NUM_THREADS"
    assert doctor._advice({**machine, "busy_cores": None}) == []


def test_the_shell_completes_commands() -> None:
    environment = {**os.environ, "_MSD_COMPLETE": "complete_bash", "COMP_WORDS": "msd do", "COMP_CWORD": "1"}
    code = "import sys; sys.argv = ['msd']; from msd.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["doctor"]


def test_types_are_declared() -> None:
    assert (Path(msd.__file__).parent / "py.typed").is_file()
