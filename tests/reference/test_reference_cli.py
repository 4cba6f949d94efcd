"""`msd reference` prints to stdout, with --json one JSON object."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from msd import reference
from msd.cli.reference import app
from msd.errors import UserError
from msd.reference import folder

runner = CliRunner()


def write_something(destination: Path) -> None:
    (destination / "x").write_text("x")


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """A cache with a placeholder as its model, so nothing is assembled."""
    place = reference.location(tmp_path)
    folder.ensure(place, write_something, needed_bytes=1)
    return tmp_path


@pytest.mark.parametrize("command", ["install", "path"])
def test_the_folder_is_printed(cache: Path, command: str) -> None:
    plain = runner.invoke(app, [command, "--cache", str(cache)])
    as_json = runner.invoke(app, [command, "--cache", str(cache), "--json"])
    assert plain.exit_code == as_json.exit_code == 0
    assert plain.stdout.startswith(str(reference.location(cache)))
    assert json.loads(as_json.stdout)["path"] == str(reference.location(cache))


def test_install_reports_size_and_time(cache: Path) -> None:
    answer = json.loads(runner.invoke(app, ["install", "--cache", str(cache), "--json"]).stdout)
    assert answer["bytes"] > 0
    assert answer["seconds"] >= 0


def test_force_assembles_again(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder, "GGUF_PACKAGE", "no_such_package_anywhere")
    result = runner.invoke(app, ["install", "--force", "--cache", str(cache)])
    assert isinstance(result.exception, UserError)
    assert result.stdout == ""
