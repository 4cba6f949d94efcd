"""A library's error about options or the machine is one line and exit code 2; our bugs stay internal errors."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import tiny_checkpoint
from msd.cli import main
from msd.model import SpeculativeVLM


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint.write(tmp_path_factory.mktemp("target"))


def generate(capsys: pytest.CaptureFixture[str], target: Path, *options: str) -> tuple[int, str]:
    """(exit code, stderr) of `msd generate`."""
    with pytest.raises(SystemExit) as stop:
        main(["generate", "-p", "what", "--target", str(target), "--method", "ar", "--max-new-tokens", "2", *options])
    err = capsys.readouterr().err
    assert "Traceback" not in err
    return int(stop.value.code or 0), err


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (["--temperature", "-1"], "--temperature"),
        (["--temperature", "nan"], "--temperature"),
        (["--temperature", "1e-320"], "raise the temperature"),
        (["--top-p", "2"], "--top-p"),
        (["--top-p", "-1"], "--top-p"),
        (["--top-k", "0"], "--top-k"),
        (["--max-new-tokens", "0"], "--max-new-tokens"),
        (["--max-new-tokens", str(10**30)], "context of 512"),
        (["--temperature", "1", "--seed", str(2**70)], "does not fit 64 bits"),
        (["--seed", "1.5"], "--seed"),
        (["--device", "meta"], "device 'meta'"),
        (["--threshold", "vision=nan", "--verifier", "threshold"], "nan"),
        (["--threshold", "vision=0.1", "--threshold", "vision=0.2", "--verifier", "threshold"], "given twice"),
        (["--top-p", "0.5"], "--top-p has no effect on greedy decoding"),
        (["--top-k", "5"], "--top-k has no effect on greedy decoding"),
        (["--seed", "5"], "--seed has no effect on greedy decoding"),
        (["--frames", "3"], "--frames is for a --video"),
        (["--method", ""], "unknown method ''"),
        (["--target", ""], "unknown target ''"),
    ],
)
def test_bad_options(capsys: pytest.CaptureFixture[str], target: Path, options: list[str], part: str) -> None:
    code, err = generate(capsys, target, *options)
    assert code == 2 and err.startswith("msd: ") and err.count("\n") == 1 and part in err


@pytest.mark.parametrize(
    "setting",
    [{"bad_words_ids": []}, {"repetition_penalty": -1.0}, {"eos_token_id": "x"}, {"sequence_bias": {"a": 1}}],
    ids=str,
)
@pytest.mark.parametrize("more", [[], ["--json"]])
def test_bad_settings_of_a_model(
    capsys: pytest.CaptureFixture[str], target: Path, tmp_path: Path, setting: dict[str, Any], more: list[str]
) -> None:
    """The library's ValueError or TypeError, also from a stream."""
    folder = Path(shutil.copytree(target, tmp_path / "target"))
    path = folder / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | setting))
    code, err = generate(capsys, folder, *more)
    assert code == 2 and err.startswith("msd: ") and err.count("\n") == 1 and "internal error" not in err


@pytest.mark.parametrize(
    ("error", "code", "part"),
    [
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."),
            2,
            "smaller batch",
        ),
        (MemoryError("Unable to allocate 9 TiB"), 2, "not enough memory"),
        (ValueError("of our own"), 1, "internal error: ValueError: of our own"),
        (TypeError("of our own"), 1, "internal error: TypeError: of our own"),
    ],
)
def test_other_errors(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    target: Path,
    error: Exception,
    code: int,
    part: str,
) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(SpeculativeVLM, "generate", fails)
    found, err = generate(capsys, target, "--json")
    assert found == code and part in err and err.count("\n") == 1
