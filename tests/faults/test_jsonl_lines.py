"""Data lines: what is JSON is read, whatever separators and marks come with it; the rest is one line with its place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import tiny_checkpoint
from msd.bench.data import data_lines, load_data, load_outputs
from msd.cli import main
from msd.errors import UserError
from msd.train.capture import Answer, Prompt, capture, pending, read_captured

SEPARATORS = "\u2028\u2029\u0085\x1c\x1d\x1e\x0b\x0c"  # where str.splitlines() breaks a line, beside \n and \r


@pytest.mark.parametrize("separator", SEPARATORS, ids=lambda c: f"U+{ord(c):04X}")
def test_separators_inside_texts_do_not_end_a_line(tmp_path: Path, separator: str) -> None:
    prompts = [f"one{separator}two", f"{separator}three"]
    path = tmp_path / "data.jsonl"
    raw = separator >= " "  # JSON wants control characters escaped; what is not, is told
    path.write_text("".join(json.dumps({"prompt": p}, ensure_ascii=not raw) + "\n" for p in prompts), encoding="utf-8")
    assert [sample.prompt for sample in load_data(path)] == prompts
    assert [sample.where for sample in load_data(path)] == [f"{path}:1", f"{path}:2"]


def test_what_capture_writes_is_read(tmp_path: Path) -> None:
    """Answers with separators raw in them: to train on, to go on with, and as the prompts of another run."""
    prompts = [Prompt(f"say {i}{c}", (), "text", "train") for i, c in enumerate("\u2028\u2029\u0085")]
    out = tmp_path / "captured.jsonl"

    def write(some: Any) -> list[Answer]:
        return [Answer(f"a{p.text[-1]}b", (5, 6), True, 2, (0.1, 0.2, 0.3)) for p in some]

    capture(prompts, write, out, 2)
    assert "\u2028".encode() in out.read_bytes()
    assert pending(prompts, out) == []
    assert [answer.prompt for answer in read_captured(out)] == [p.text for p in prompts]
    assert [sample.answer for sample in load_data(out)] == [f"a{p.text[-1]}b" for p in prompts]


@pytest.mark.parametrize("start", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\n\n", b"\n \t\r\n"])
def test_byte_order_marks_and_ends_of_lines(tmp_path: Path, start: bytes, end: bytes) -> None:
    path = tmp_path / "data.jsonl"
    lines = [json.dumps({"prompt": f"é {i} 😀"}, ensure_ascii=i == 1).encode() for i in range(3)]
    for last in (end, b""):
        path.write_bytes(start + end.join(lines) + last)
        assert [sample.prompt for sample in load_data(path)] == [f"é {i} 😀" for i in range(3)]
    numbers = [int(where.rsplit(":", 1)[1]) for where, _ in data_lines(path)]
    assert numbers == [1 + i * end.count(b"\n") for i in range(3)]


def test_nothing_named_is_nothing_shown(tmp_path: Path) -> None:
    """As tables written to JSON have it."""
    path = tmp_path / "data.jsonl"
    path.write_text('{"prompt": "a", "image": null, "video": null, "events": null, "answer": null, "task": null}')
    assert load_data(path)[0].images == () and load_data(path)[0].task == "default"


GOOD = b'{"prompt": "a"}\n'


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b'{"prompt": "a\\ud800b"}', r"half a character (\ud800)"),
        (b'{"prompt": "a", "\\udfff": 1}', r"half a character (\udfff)"),
        (b'{"prompt": "a", "x": [{"y": "\\uD83D"}]}', r"half a character (\ud83d)"),
        (b'{"prompt": "\xff"}', "byte 13 of the line is not UTF-8"),
        (b'{"prompt": "\xed\xa0\x80"}', "is not UTF-8"),
        ('{"prompt": "é"}'.encode("latin-1"), "is not UTF-8"),
        (b'{"prompt": "a", "prompt": "b"}', "'prompt' is there twice"),
        (b'{"prompt": "a", "x": {"y": 1, "y": 1}}', "'y' is there twice"),
        (b'{"prompt": "a", "x": NaN}', "NaN is not JSON"),
        (b'{"prompt": "a", "x": [-Infinity]}', "-Infinity is not JSON"),
        (b'{"prompt": "a", "x": ' + b"9" * 5000 + b"}", "not a JSON object"),
        (b"[" * 100_000, "not a JSON object"),
        (b'{"prompt": "a"} {"prompt": "b"}', "Extra data"),
        (b'{"prompt": "a', "Unterminated string"),
        (b'{"prompt": "a\x0bb"}', "Invalid control character"),
        (b"null", "NoneType"),
        (b"3", "int"),
        (b'"text"', "str"),
        (b"[]", "list"),
        (b"{}", "'prompt' must be text, got None"),
        (b'{"prompt": null}', "'prompt' must be text, got None"),
        (b'{"prompt": 3}', "'prompt' must be text, got 3"),
        (b'{"prompt": ["a"]}', "'prompt' must be text"),
        (b'{"prompt": "\\u2028"}', "'prompt' must be text"),
        (b'{"messages": [{"role": "system", "content": "a"}]}', "a message of role 'system'"),
        (b'{"prompt": "a", "answer": 3}', "'answer' must be text, got 3"),
        (b'{"prompt": "a", "task": ["b"]}', "'task' must be text"),
        (b'{"prompt": "a", "split": {}}', "'split' must be text"),
        (b'{"prompt": "a", "image": {"path": "a"}}', "'image' must be a file name"),
        (b'{"prompt": "a", "image": [1]}', "'image' must be a file name"),
        (b'{"prompt": "a", "image": ""}', "does not exist"),
        (b'{"prompt": "a", "image": "\\u0000"}', "does not exist"),
        (b'{"prompt": "a", "image": "' + b"x" * 5000 + b'"}', "does not exist"),
        (b'{"prompt": "a", "video": true}', "'video' must be a file name"),
        (b'{"turns": []}', "'turns' is a list of prompts"),
        (b'{"turns": ["a", 3]}', "'prompt' must be text, got 3"),
        (b'{"turns": "a"}', "'turns' is a list of prompts"),
    ],
    ids=lambda value: None if isinstance(value, str) else value[:40].decode("latin-1"),
)
def test_a_wrong_line_is_one_line_with_its_place(tmp_path: Path, line: bytes, said: str) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(GOOD + b"\n" + line + b"\n" + GOOD)
    with pytest.raises(UserError) as caught:
        load_data(path)
    assert str(caught.value).startswith(f"{path}:3: ") and said in str(caught.value)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 6000


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le"])
def test_other_encodings(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes('{"prompt": "é"}\n'.encode(encoding))
    with pytest.raises(UserError, match=r"UTF-16 text; save it as UTF-8|data\.jsonl:1: "):
        load_data(path)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"tokens": [1, True]}, "token ids"),
        ({"tokens": [-1]}, "token ids"),
        ({"tokens": [1.0]}, "token ids"),
        ({"tokens": "1"}, "token ids"),
        ({"text": 3}, "'text' must be text"),
    ],
)
def test_wrong_outputs_of_another_engine(tmp_path: Path, more: dict[str, Any], said: str) -> None:
    path = tmp_path / "outputs.jsonl"
    path.write_text(json.dumps({"prompt": "a", **more}))
    with pytest.raises(UserError, match=said):
        load_outputs(path)


@pytest.mark.parametrize("command", ["bench", "verify", "capture"])
def test_commands_name_the_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(GOOD + b'{"prompt": "a\\ud800"}\n')
    out = ["--out", str(tmp_path / "out")] if command != "verify" else []
    with pytest.raises(SystemExit) as stop:
        main([command, "--data", str(path), *out])
    told = capsys.readouterr().err
    assert stop.value.code == 2 and told.startswith(f"msd: {path}:2: half a character") and told.count("\n") == 1


def test_a_prompt_of_the_command_line_that_is_not_utf8(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["generate", "-p", "caf\udce9"])  # as Python reads the byte 0xe9 of an argument
    told = capsys.readouterr().err
    assert stop.value.code == 2 and "half a character (U+DCE9) at position 3" in told and told.count("\n") == 1


def test_capture_of_separators_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run that goes on where it was broken off reads what it wrote."""
    tiny_checkpoint.write(tmp_path)
    path = tmp_path / "data.jsonl"
    lines = [{"prompt": f"a{c}b"} for c in "\u2028\u0085"]
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    out = tmp_path / "out.jsonl"
    for limit in ("1", "2"):
        with pytest.raises(SystemExit) as stop:
            main([
                "capture", "--data", str(path), "--target", str(tmp_path), "--out", str(out), "--limit", limit,
                "--max-new-tokens", "3", "--json",
            ])  # fmt: skip
        assert not stop.value.code, capsys.readouterr().err
    assert [a.prompt for a in read_captured(out)] == [line["prompt"] for line in lines]
