"""Bad input is one clear line on stderr and exit code 2, and costs no model load; odd images have a defined meaning."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from PIL import Image

from clips import write_clip, write_sound
from msd.bench.data import BUNDLED
from msd.cli import main
from msd.drafters import registry

PUPPY = str(BUNDLED / "puppy.jpg")


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of an `msd` call."""
    with pytest.raises(SystemExit) as stop:
        main(list(arguments))
    captured = capsys.readouterr()
    return int(stop.value.code or 0), captured.out, captured.err


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line of a refused call."""
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("msd: ") and err.count("\n") == 1 and "Traceback" not in err
    return err


def picture(path: Path, size: tuple[int, int] = (8, 8), mode: str = "RGB", form: str = "JPEG") -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, size).save(buffer, form)
    path.write_bytes(buffer.getvalue())
    return buffer.getvalue()


def test_no_option_is_ignored(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """An option that has no effect together with others is refused."""
    head = str(registry.ROOTS[-1] / "eagle3")
    data = tmp_path / "data.jsonl"
    data.write_text('{"prompt": "Say something."}\n')
    captured = str(tmp_path / "captured.jsonl")
    train = ("train", "--captured", captured, "--out", str(tmp_path / "run"))
    line = {"image": [], "prompt": "a", "ids": [1, 2], "gain": [0.0, 0.0], "task": "text", "split": "trian"}
    Path(captured).write_text(json.dumps(line) + "\n")
    export = ("bench", "--data", str(data), "--export")
    refusals = (
        (("generate", PUPPY, "-p", "a", "--drafter", head, "--method", "dspark"), "head of method 'eagle3'"),
        (("verify", "--drafter", head, "--method", "ar"), "head of method 'eagle3'"),
        (("generate", PUPPY, "-p", "a", "--seed", "3"), "--seed has no effect"),
        (("verify", "--outputs", str(data), "--draws", "5000"), "leave out --draws"),
        (("verify", "--outputs", str(data), "--method", "msd"), "leave out --method"),
        ((*export, str(tmp_path / "out.jsonl"), "--batch", "2"), "'batch' is no option of --export"),
        ((*export, str(data)), "is the data file itself"),
        ((*export, PUPPY), "exists and holds no such data lines"),
        (("estimate", "--acceptance", "8=3.1,8=4"), "a tree size twice"),
        (("estimate", "--draft-model", "gemma-4-31b-assistant"), "reads the keys of its own target"),
        (train, "\"split\" of their lines is 'trian'"),
    )
    for arguments, message in refusals:
        assert message in refused(capsys, *arguments)
    assert Path(PUPPY).stat().st_size > 1000


def test_missing_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert "nowhere.jpg" in refused(capsys, "generate", "nowhere.jpg", "-p", "What is it?")


def test_text_named_jpg(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_text("not a picture")
    assert "a.jpg" in refused(capsys, "generate", str(tmp_path / "a.jpg"), "-p", "What is it?")


def test_truncated_jpeg(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    whole = picture(tmp_path / "b.jpg", (256, 256))
    (tmp_path / "b.jpg").write_bytes(whole[: len(whole) // 2])
    assert "b.jpg" in refused(capsys, "generate", str(tmp_path / "b.jpg"), "-p", "What is it?")


def test_broken_videos_and_sounds(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_text("not a video")
    for option in ("--video", "--audio"):
        assert "nowhere.mp4" in refused(capsys, "generate", option, "nowhere.mp4", "-p", "What is it?")
        assert "a.mp4" in refused(capsys, "generate", option, str(tmp_path / "a.mp4"), "-p", "What is it?")
    write_clip(tmp_path / "b.mp4", range(3))
    assert "no audio stream" in refused(capsys, "generate", "--audio", str(tmp_path / "b.mp4"), "-p", "What is it?")
    write_sound(tmp_path / "c.wav")
    assert "no video stream" in refused(capsys, "generate", "--video", str(tmp_path / "c.wav"), "-p", "What is it?")
    video = ["--video", str(tmp_path / "b.mp4"), "--frames", "9999"]
    assert "1 to 512" in refused(capsys, "generate", *video, "-p", "What is it?")


def test_oversized_image(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    picture(tmp_path / "c.png", (20_000, 20_000), "1", "PNG")
    assert "pixels" in refused(capsys, "generate", str(tmp_path / "c.png"), "-p", "What is it?")


def test_image_without_pixels(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    header = bytearray(picture(tmp_path / "d.png", (8, 8), "RGB", "PNG"))
    header[16:24] = bytes(8)  # width and height of the header chunk
    (tmp_path / "d.png").write_bytes(header)
    assert "d.png" in refused(capsys, "generate", str(tmp_path / "d.png"), "-p", "What is it?")


@pytest.mark.parametrize("prompt", ["", "   ", "\n"])
def test_empty_prompt(capsys: pytest.CaptureFixture[str], prompt: str) -> None:
    assert "empty" in refused(capsys, "generate", PUPPY, "-p", prompt)


def test_prompt_that_spells_the_placeholder(capsys: pytest.CaptureFixture[str]) -> None:
    assert "<image>" in refused(capsys, "generate", PUPPY, "-p", "what is <image> here?")


def test_more_tokens_than_the_context(capsys: pytest.CaptureFixture[str]) -> None:
    assert "context of 8192" in refused(capsys, "generate", PUPPY, "-p", "What is it?", "--max-new-tokens", "9000")


def test_unknown_method(capsys: pytest.CaptureFixture[str]) -> None:
    for command in (["generate", PUPPY, "-p", "Hi?"], ["verify"], ["bench"]):
        assert "prompt-lookup" in refused(capsys, *command, "--method", "magic")


def test_unknown_backend(capsys: pytest.CaptureFixture[str]) -> None:
    for command in (["generate", PUPPY, "-p", "Hi?"], ["verify"], ["bench"]):
        assert "choose one of measure, plain, fused" in refused(capsys, *command, "--backend", "magic")


def test_unknown_target(capsys: pytest.CaptureFixture[str]) -> None:
    assert "no/such/target" in refused(capsys, "generate", PUPPY, "-p", "What is it?", "--target", "no/such/target")


def test_unsupported_architecture(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "t5", "architectures": ["T5Model"]}))
    assert "t5" in refused(capsys, "generate", PUPPY, "-p", "What is it?", "--target", str(tmp_path))


@pytest.mark.parametrize(
    "arguments", [["frobnicate"], ["generate", "--bogus"], ["generate", PUPPY, "-p", "Hi", "--max-new-tokens", "0"]]
)
def test_wrong_usage(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    assert "--help" in refused(capsys, *arguments)


@pytest.mark.parametrize(
    ("line", "part"),
    [
        ("{", "not a JSON object"),
        ("[1]", "not a JSON object"),
        ('{"image": "x.jpg"}', "'prompt'"),
        ('{"image": 3, "prompt": "a"}', "'image'"),
        ('{"image": "x.jpg", "prompt": "a"}', "does not exist"),
        ('{"video": "x.mp4", "prompt": "a"}', "does not exist"),
        ('{"video": 3, "prompt": "a"}', "'video'"),
        ("", "no data lines"),
    ],
)
def test_broken_data(capsys: pytest.CaptureFixture[str], tmp_path: Path, line: str, part: str) -> None:
    (tmp_path / "data.jsonl").write_text(line)
    assert part in refused(capsys, "bench", "--data", str(tmp_path / "data.jsonl"))


def test_missing_data(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert "none.jsonl" in refused(capsys, "verify", "--data", str(tmp_path / "none.jsonl"))
    assert "not a folder" in refused(capsys, "bench", "--images", str(tmp_path / "none"))


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "--version")[0] == 0
    code, out, _ = run(capsys)
    assert code == 0 and "generate" in out


@pytest.mark.parametrize("device", ["gpu", "cuda:77"])
def test_a_device_that_is_not_there(capsys: pytest.CaptureFixture[str], device: str) -> None:
    assert f"'{device}'" in refused(capsys, "generate", PUPPY, "-p", "What is it?", "--device", device)
