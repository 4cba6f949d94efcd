"""`msd events`: its output, and the frames that it writes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from writers import SIZE, scene, write

from msd.cli import main
from msd.events import frames
from msd.events.frames import snippet


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stop:
        main(["events", *map(str, arguments)])
    captured = capsys.readouterr()
    return int(stop.value.code or 0), captured.out, captured.err


def test_the_command_prints_a_summary(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stream = scene()
    code, out, _ = run(capsys, write(tmp_path, "es", stream), "--json")
    told = json.loads(out)
    begin, end = stream.span
    assert code == 0 and (told["events"], told["begin_us"], told["end_us"]) == (len(stream), begin, end)
    assert (told["width"], told["height"], told["size_from"], told["format"]) == (*SIZE, "header", "es")
    assert told["events_per_second"] == pytest.approx(len(stream) * 1e6 / (end - begin))
    code, out, _ = run(capsys, tmp_path / "a.es")
    assert code == 0 and "500 events" in out and "48x34" in out


def test_the_command_writes_frames(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stream = scene()
    path = write(tmp_path, "evt3", stream)
    run(capsys, path, "--out", tmp_path / "view.gif", "--frames", 3)
    with Image.open(tmp_path / "view.gif") as animation:
        assert (animation.n_frames, animation.size) == (3, SIZE)  # type: ignore[attr-defined]
    run(capsys, path, "--out", tmp_path / "frames", "--by", "time")
    wanted = frames(stream, 5, "time")
    for number, image in enumerate(wanted):
        np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "frames" / f"frame-{number:03d}.png")), image)
    _, out, _ = run(capsys, path, "--out", tmp_path / "view.html", "--json")
    page = (tmp_path / "view.html").read_text()
    assert page.count("data:image/png") == 5 and json.loads(out)["written"] == [str(tmp_path / "view.html")]


def test_html_is_escaped() -> None:
    assert "<script>" not in snippet(frames(scene(), 1), ["<script>"], "<script>")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--out", "x.mp4"], ".gif"),
        (["--by", "size"], "'time'"),
        (["--size", "big"], "WIDTHxHEIGHT"),
        (["--size", "0x4"], "0x4"),
        (["--size", "8x8"], "outside the sensor"),
        (["--recording", "2"], "number 0"),
        (["--out", "/proc/none/x.gif"], "cannot write"),
        (["--frames", "0"], "--help"),
    ],
)
def test_bad_input_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], said: str
) -> None:
    code, out, err = run(capsys, write(tmp_path, "es", scene()), *options)
    assert (code, out) == (2, "") and said in err and err.count("\n") == 1
