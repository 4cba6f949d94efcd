"""`--events` alone selects the video target, its drafter and frames drawn from the events; failures are UserErrors."""

from __future__ import annotations

import importlib.util
import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import tiny_checkpoint
from msd import drafters, events, reference
from msd.cli import main, options
from msd.drafters import registry
from msd.drafters.toolkit import checkpoint
from msd.errors import UserError
from msd.model import SpeculativeVLM
from msd.reference import folder
from training_command import run

BEST = "msd:video+prompt-lookup"
WRITERS = Path(__file__).parents[1] / "events" / "writers.py"
PROMPT = "Describe the video in detail."


def writers() -> Any:
    """The module that writes files of every format."""
    spec = importlib.util.spec_from_file_location("event_writers", WRITERS)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


W = writers()


def recording(path: Path, count: int = 400) -> Path:
    stream = W.scene(count)
    np.savez(path, **W.arrays(stream), size=W.SIZE)
    return path


def look(file: Path, target: str | None = None, **given: Any) -> options.LoadedInputs:
    """The scene of `msd generate --events file`, with other options."""
    return options.load_inputs(options.PromptInputs(events=file, prompt=PROMPT, **given), target)


@pytest.mark.parametrize("name", W.FORMATS)
def test_a_file_of_each_format_is_shown(name: str, tmp_path: Path) -> None:
    if name in W.NEEDS:
        pytest.importorskip(W.NEEDS[name])
    stream = W.scene()
    seen = look(W.write(tmp_path, name, stream))
    assert seen.target == "reference-video" and seen.from_events
    (clip,) = seen.media
    wanted = events.frames(stream, 4)
    assert len(clip.frames) == 4 and clip.fps > 0
    for got, right in zip(clip.frames, wanted, strict=True):
        np.testing.assert_array_equal(np.asarray(got)[: right.height, : right.width], np.asarray(right))


def test_what_is_given_is_what_is_used(tmp_path: Path) -> None:
    file = recording(tmp_path / "a.npz")
    (name,) = tiny_checkpoint.photos(tmp_path, 1)
    beside = look(file, images=[str(tmp_path / name)])
    assert not beside.from_events and len(beside.media) == 1 and beside.recording is not None
    other = look(file, target="some/folder")
    assert other.target == "some/folder" and other.from_events and len(other.media[0].frames) == 8
    assert len(look(file, frames=3).media[0].frames) == 3
    assert options.load_inputs(options.PromptInputs(prompt=PROMPT), None).target == "reference"
    # who sees events is given them, drawn or not; who sees none is where they would be lost without a word
    plain, sighted = drafters.create("ar"), _Sighted()
    assert look(file).arguments(plain) == {} and "events" in beside.arguments(plain)
    assert "events" in look(file).arguments(sighted) and "events" in beside.arguments(sighted)


class _Sighted:
    name = "sighted"

    auxiliary_source = "events"

    def encode(self, item: Any) -> None: ...


def test_a_recording_without_events_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, "generate", "--events", recording(tmp_path / "none.npz", 0), "-p", PROMPT)
    assert code == 2 and err.count("\n") == 1 and "none.npz' holds no events" in err


def test_an_installed_package_says_where_the_target_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folder, "VIDEO_WEIGHTS", tmp_path / "not there")
    code, out, err = run(capsys, "generate", "--events", recording(tmp_path / "a.npz"), "-p", PROMPT)
    assert code == 2 and out == "" and err.count("\n") == 1
    assert "source checkout" in err and "--target" in err


def test_broken_weights_name_what_brings_them_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = json.loads((folder.VIDEO_WEIGHTS / "checksums.json").read_text(encoding="utf-8"))
    shipped = folder.VIDEO_WEIGHTS / folder.VIDEO_PARTS
    folder.verify(shipped, record)
    broken = tmp_path / folder.VIDEO_PARTS
    broken.write_bytes(shipped.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"bytes instead of .* git checkout -- weights/video"):
        folder.verify(broken, record)
    assert reference.location(video=True) != reference.location()
    monkeypatch.setattr(folder, "VIDEO_WEIGHTS", tmp_path)
    with pytest.raises(UserError, match=r"checksums\.json .*git checkout -- weights/video"):
        reference.location(video=True)


def test_what_ships_for_the_video_target_is_its_default() -> None:
    trained = checkpoint.training(registry.folders()["msd:video"])
    assert drafters.default(trained["cuts"]["target"]) == BEST
    here, there, elsewhere = (drafters.methods(name) for name in ("reference", "reference-video", "other/target"))
    assert {"msd:video", BEST} <= set(there) and not {"msd:video", BEST} & {*here, *elsewhere}
    assert "msd" in here and "msd" not in there
    made = drafters.create(BEST)
    assert made.name == BEST


def test_a_target_of_ones_own_sees_the_frames(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target, file = tiny_checkpoint.write(tmp_path / "target"), recording(tmp_path / "a.npz")
    ask = ("generate", "--events", file, "-p", "What?", "--target", target, "--max-new-tokens", 8, "--frames", 2)
    code, out, err = run(capsys, *ask, "--method", "ar", "--json")
    assert code == 0, err
    engine = SpeculativeVLM.from_pretrained(target, "ar")
    wanted = engine.generate(events.frames(events.read(file), 2), "What?", max_new_tokens=8, do_sample=False)
    assert json.loads(out)["tokens"] == wanted.tokens
    code, _, err = run(capsys, *ask, "--method", "ar")
    assert code == 0 and "the target saw 2 frames drawn from the events; 'ar' sees no events" in err


def test_msd_events_tells_how_to_ask(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "events", recording(tmp_path / "a recording.npz"))
    assert code == 0 and f"msd generate --events '{tmp_path}/a recording.npz' -p " in out
    assert "msd generate" not in run(capsys, "events", recording(tmp_path / "none.npz", 0))[1]


class _Images(HTMLParser):
    """Counts the pictures of a page."""

    shown = 0

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.shown += tag == "img"


@pytest.mark.slow
def test_one_option_is_enough(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The target is assembled if it was not; the answer is that of `generate()` about the frames."""
    file, page = tmp_path / "dog.npz", tmp_path / "page.html"
    photo = Image.open(next(p for p in reference.sample_photos() if p.name == "dog.jpg"))
    stream = events.events_of_photo(photo, (96, 96), 500_000, 100)
    np.savez(file, t=stream.t, x=stream.x, y=stream.y, p=stream.p, size=stream.size)
    code, out, err = run(capsys, "generate", "--events", file, "-p", PROMPT, "--max-new-tokens", 24, "--json")
    assert code == 0, err
    given = json.loads(out)
    assert given["method"] == BEST and given["time"]["beside"] > 0 and given["mean_acceptance_length"] > 1.3
    plain = SpeculativeVLM.from_pretrained("reference-video", "ar")
    frames = events.frames(stream, 4)
    wanted = plain.generate(frames, PROMPT, max_new_tokens=24, do_sample=False)
    assert given["tokens"] == wanted.tokens
    code, _, err = run(capsys, "inspect", "--events", file, "-p", PROMPT, "--max-new-tokens", 16, "-o", page)
    assert code == 0, err
    text, reader = page.read_text(encoding="utf-8"), _Images()
    reader.feed(text)
    assert reader.shown == 4 + 5 and text.count('class="yes"') > 3 and "seen by the drafter only" in text


@pytest.mark.slow
def test_the_demo_shows_it(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["demo", "--events", "--runs", "1", "--max-new-tokens", "16", "--json"])
    told = capfd.readouterr()
    assert not stop.value.code, told.err
    rows = {row["method"]: row for row in json.loads(told.out)["rows"] if row["task"] == "all"}
    assert list(rows) == ["transformers", "ar", BEST]
    assert all(row["identical"] == 1.0 for row in rows.values()) and rows[BEST]["mean_acceptance_length"] > 1.5
    assert "simulated events" in told.err and "USDT" not in told.err
