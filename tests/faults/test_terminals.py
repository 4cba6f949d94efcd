"""Terminals, pipes and locales of any encoding: output degrades, files and their names do not depend on the locale."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import tiny_checkpoint
from msd.bench.report import markdown
from msd.cli import main, terminal

LOCALE = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A target, and a data line about a photo whose name is not ASCII."""
    folder = tiny_checkpoint.write(tmp_path_factory.mktemp("terminals"))
    tiny_checkpoint.photos(folder / "images", 1)
    (folder / "images" / "0.png").rename(folder / "images" / "höχ.png")
    line = {"image": "höχ.png", "prompt": "Wie groß ist τ?", "task": "größe"}
    (folder / "data.jsonl").write_text(json.dumps(line, ensure_ascii=False) + "\n", encoding="utf-8")
    return folder


def printed(monkeypatch: pytest.MonkeyPatch, encoding: str, *arguments: object) -> tuple[int, str, str]:
    """Runs a command on a terminal with a strict encoding; returns (exit code, stdout, stderr)."""
    streams = {name: io.TextIOWrapper(io.BytesIO(), encoding, errors="strict") for name in ("stdout", "stderr")}
    with monkeypatch.context() as patch:
        for name, stream in streams.items():
            patch.setattr(sys, name, stream)
        with pytest.raises(SystemExit) as stop:
            main([str(a) for a in arguments])
    texts = {name: stream.buffer.getvalue().decode(encoding, "replace") for name, stream in streams.items()}  # type: ignore[attr-defined]
    return int(stop.value.code or 0), texts["stdout"], texts["stderr"]


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "latin-1", "koi8-r"])
def test_reports_tables_and_answers_are_spelled_out(
    monkeypatch: pytest.MonkeyPatch, place: Path, tmp_path: Path, encoding: str
) -> None:
    monkeypatch.setattr("msd.bench.measure.outside_kernels", lambda target: None)
    about = ["--target", place, "--data", place / "data.jsonl", "--method", "ar", "--max-new-tokens", 2]
    code, out, err = printed(monkeypatch, encoding, "bench", *about, "--baselines", "transformers", "--out", tmp_path)
    assert code == 0, err
    assert "| tau |" in out and "±" not in out
    kept = (tmp_path / "report.md").read_bytes().decode("utf-8")
    assert "| τ |" in kept and "**größe**" in kept
    assert json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))["rows"][-1]["task"] == "größe"
    assert kept == markdown(json.loads((tmp_path / "results.json").read_text(encoding="utf-8")))
    code, out, err = printed(monkeypatch, encoding, "verify", *about)
    assert code == 0 and "|ar " in out and "+--" in out, err
    picture = place / "images" / "höχ.png"
    code, out, err = printed(
        monkeypatch, encoding, "generate", picture, "-p", "Was ist τ?", "--target", place, "--max-new-tokens", 20
    )
    assert code == 0 and "20 tokens" in err and "\\ufffd" in out, "a tiny model writes anything"
    code, _, err = printed(monkeypatch, encoding, "generate", picture.with_name("χ.png"), "-p", "Was?")
    assert code == 2 and "chi.png" in err
    assert printed(monkeypatch, encoding, "targets")[0] == 0
    for command in ("verify", "train"):
        code, out, _ = printed(monkeypatch, encoding, command, "--help")
        assert code == 0 and "--help" in out


def test_characters_of_the_encoding_are_unchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    signs = "τ–…×²χ≤’é日\udce9"
    for encoding, expected in (
        ("ascii", "tau-...x2chi<='\\xe9\\u65e5\\udce9"),
        ("cp1252", "tau–…×²chi<=’é\\u65e5\\udce9"),
        ("utf-8", "τ–…×²χ≤’é日\\udce9"),
    ):
        stream = io.TextIOWrapper(io.BytesIO(), encoding)
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", stream)
            patch.setattr(sys, "stderr", None)
            terminal.any_encoding()
            print(signs, end="", flush=True)
        assert stream.buffer.getvalue().decode(encoding) == expected  # type: ignore[attr-defined]


def test_every_command_runs_in_a_locale_without_an_encoding(place: Path, tmp_path: Path) -> None:
    """One process for all commands, since the start takes longest."""
    answers, run = tmp_path / "größe.jsonl", tmp_path / "läuft"
    common = ["--target", place, "--max-new-tokens", 3]
    data = [*common, "--data", place / "data.jsonl"]
    commands = [
        ["generate", place / "images" / "höχ.png", "-p", "Was ist τ?", *common],
        ["verify", *data, "--method", "ar"],
        ["bench", *data, "--method", "ar", "--baselines", "transformers", "--out", tmp_path / "χ"],
        ["capture", *data, "--out", answers],
        ["inspect", place / "images" / "höχ.png", "-p", "Was ist τ?", *common, "-o", tmp_path / "χ.html"],
        ["train", "--captured", answers, "--images", place / "images", "--target", place, "--held-out", answers,
         "--out", run, "--steps", 1, "--draft-vocabulary", 50, "--precision", "float32"],
        ["targets"],
        ["--help"],
    ]  # fmt: skip
    text = "import json, os, sys\nfrom msd.cli import main\nfor a in json.loads(os.environb[b'COMMANDS']):\n"
    text += "    try:\n        main([os.fsdecode(os.fsencode(x) if x.isascii() else x.encode()) for x in a])\n"
    text += "    except SystemExit as stop:\n        print('ended', a[0], stop.code or 0, flush=True)\n"
    environment = {**os.environ, **LOCALE, "COMMANDS": json.dumps([[str(x) for x in a] for a in commands])}
    done = subprocess.run([sys.executable, "-c", text], env=environment, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr
    ended = [line for line in done.stdout.decode("ascii", "replace").splitlines() if line.startswith("ended")]
    assert ended == [f"ended {a[0]} 0" for a in commands], done.stderr.decode("ascii", "replace")[-2000:]
    assert json.loads(answers.read_text(encoding="utf-8"))["image"] == ["höχ.png"]
    assert "Was ist τ?" in (tmp_path / "χ.html").read_text(encoding="utf-8")
    assert "| τ |" in (tmp_path / "χ" / "report.md").read_text(encoding="utf-8")
    assert (run / "drafter" / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("command", "full", "code"), [("--version", False, 1), ("--help", False, 1), ("--version", True, 2)]
)
def test_a_reader_that_leaves_and_a_full_disk_are_no_errors_of_ours(command: str, full: bool, code: int) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with Path("/dev/full").open("w") as disk:
        done = subprocess.run(
            [sys.executable, "-m", "msd", command], stdout=disk if full else writing, stderr=subprocess.PIPE, timeout=60
        )
    os.close(writing)
    said = b"msd: cannot write the output: No space left on device; free some space\n"
    assert (done.returncode, done.stderr) == (code, said if full else b"")


def test_an_internal_error_is_reported_where_nothing_can_be_written(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("τ\nis wrong")

    monkeypatch.setattr("msd.targets.families", broken)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    code, _, err = printed(monkeypatch, "ascii", "targets")
    assert code == 1 and "internal error: RuntimeError: tau is wrong; please report it with" in err
    (log,) = tmp_path.iterdir()
    assert "τ" in log.read_text(encoding="utf-8")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "none"))
    code, _, err = printed(monkeypatch, "ascii", "targets")
    assert code == 1 and err == "msd: internal error: RuntimeError: tau is wrong; please report it\n"


def test_words_of_the_command_line_are_utf_8() -> None:
    from msd.system.files import as_text, named_in

    assert as_text(os.fsdecode("Was ist τ?".encode())) == "Was ist τ?"
    assert as_text(os.fsdecode(b"\xff?")) == "\udcff?"
    assert os.fsencode(named_in(Path("x"), "höχ.png")) == "x/höχ.png".encode()
    assert not named_in(Path("x"), "\ud800.png").exists()
