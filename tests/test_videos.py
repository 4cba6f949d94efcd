"""Frames of video files: their selection, odd files, and errors in one line."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from clips import LEVELS, write_clip, write_sound
from msd.errors import UserError
from msd.inputs.media import Clip, Video, evenly
from msd.inputs.prompts import kind, load


def levels(clip: Clip) -> list[int]:
    """Returns the number of each frame, which its brightness encodes."""
    return [round(float(np.asarray(frame).mean()) / LEVELS) for frame in clip.frames]


@pytest.mark.parametrize("container", ["mp4", "mkv", "avi"])
def test_frames_are_those_of_evenly_spaced_times(tmp_path: Path, container: str) -> None:
    path = write_clip(tmp_path / f"a.{container}", range(20))
    for count in (1, 2, 8, 20):
        clip = Video(path, count).load()
        wanted = np.linspace(0, 19, count).astype(int).tolist()
        assert levels(clip) == list(clip.indices) == wanted
        assert clip.total == 20 and clip.fps == pytest.approx(10, rel=0.01)
        assert all(frame.size == (64, 32) and frame.mode == "RGB" for frame in clip.frames)


def test_a_short_video_shows_frames_twice(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "a.mp4", range(3))
    assert levels(Video(path).load()) == [0, 0, 0, 0, 1, 1, 1, 2]
    one = Video(write_clip(tmp_path / "b.mp4", [5])).load()
    assert levels(one) == [5] * 8 and one.fps > 0


def test_time_counts_not_frames(tmp_path: Path) -> None:
    """A frame that is shown for a long time is selected at most of the times."""
    path = write_clip(tmp_path / "a.mkv", range(5), at=[0, 1, 2, 3, 43])
    assert levels(Video(path, 5).load()) == [0, 3, 3, 3, 4]
    assert evenly([0, 1, 2, 3, 43], 5) == [0, 3, 3, 3, 4]


def test_a_rotated_video_becomes_upright(tmp_path: Path) -> None:
    """As phones write them: the left half is dark; after a quarter turn it is the lower or upper half."""
    halves = np.zeros((32, 64, 3), np.uint8)
    halves[:, 32:] = 200
    for degrees, top in ((0, None), (90, 200), (-90, 0)):
        path = write_clip(tmp_path / f"{degrees}.mp4", [halves] * 3, degrees=degrees)
        frame = Video(path, 1).load().frames[0]
        assert frame.size == ((64, 32) if top is None else (32, 64))
        if top is not None:
            assert abs(float(np.asarray(frame)[:16].mean()) - top) < 20


def test_a_video_with_a_broken_end_repeats_its_last_frame(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "a.mkv", range(20))
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 2 // 3])
    clip = Video(path, 4).load()
    assert len(clip.frames) == 4 and 0 < max(clip.indices) < 19
    noise = np.random.default_rng(0).integers(0, 256, len(data) // 2, dtype=np.uint8).tobytes()
    path.write_bytes(data[: len(data) // 2] + noise)
    assert len(Video(path, 4).load().frames) == 4


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("none.mp4", "there is no file"),
        (".", "is a folder"),
        ("https://example.com/a.mp4", "is a URL"),
        ("text.mp4", "not a readable video"),
        ("list.m3u8", "not a readable video"),
        ("empty.mp4", "not a readable video"),
        ("sound.wav", "no video stream"),
        ("cut.mp4", "not a readable video"),
    ],
)
def test_what_is_refused(tmp_path: Path, name: str, said: str) -> None:
    write_clip(tmp_path / "cut.mp4", range(9))
    (tmp_path / "cut.mp4").write_bytes((tmp_path / "cut.mp4").read_bytes()[:200])
    write_sound(tmp_path / "sound.wav")
    (tmp_path / "text.mp4").write_text("not a video")
    (tmp_path / "empty.mp4").touch()
    inner = write_clip(tmp_path / "inner.mp4", range(9))
    (tmp_path / "list.m3u8").write_text(f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{inner}\n#EXT-X-ENDLIST\n")
    path = name if "://" in name else tmp_path / name
    with pytest.raises(UserError, match=said):
        Video(path).load()


def test_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_clip(tmp_path / "a.mp4", range(9))
    for frames in (0, 513):
        with pytest.raises(UserError, match="ask for 1 to 512"):
            Video(path, frames).load()
    with monkeypatch.context() as patch:
        patch.setattr("msd.inputs.media.MOST_PIXELS", 4 * 64 * 32)
        assert len(Video(path, 4).load().frames) == 4
        with pytest.raises(UserError, match="64x32 pixels, too large for 5 frames"):
            Video(path, 5).load()
    monkeypatch.setattr("msd.inputs.media.MOST_PACKETS", 8)
    with pytest.raises(UserError, match="more than 8 frames"):
        Video(path).load()


def test_without_pyav(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_clip(tmp_path / "a.mp4", range(3))
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(UserError, match=r"needs PyAV, which is not installed; pip install 'msd-decoding\[video\]'"):
        Video(path).load()


def test_kinds(tmp_path: Path) -> None:
    video = Video(write_clip(tmp_path / "a.mp4", range(3)), 2)
    clip = load(video)
    assert kind(video) == kind(clip) == "video" and load(clip) is clip
