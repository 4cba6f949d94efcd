"""The frames shown are those that decoding a whole file and choosing evenly in time gives, however odd the file is."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from clips import LEVELS, write_clip
from msd.errors import UserError
from msd.inputs.media import Clip, Video, evenly

COUNTS = (1, 2, 5, 8, 40)
RATE = 10


def levels(frames: Sequence[Any]) -> list[int]:
    return [round(float(np.asarray(frame).mean()) / LEVELS) for frame in frames]


def encoded(path: Path, times: Sequence[int] | None = None, codec: str = "libx264", **options: str) -> Path:
    """25 grey frames, each brighter than the one before, with B-frames and short groups of pictures by default."""
    options = options or {"g": "12", "bf": "3", "b_strategy": "0"}
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=RATE, options=options)
        stream.width, stream.height, stream.pix_fmt = 64, 32, "yuv420p"
        stream.time_base = stream.codec_context.time_base = Fraction(1, RATE)
        for i, at in enumerate(times or range(25)):
            frame = av.VideoFrame.from_ndarray(np.full((32, 64, 3), LEVELS * i, np.uint8), format="rgb24")
            frame.pts, frame.time_base = at, Fraction(1, RATE)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def copied(source: Path, path: Path, start: int = 0, shift: int = 0, skip: int = 0, one_time: bool = False) -> Path:
    """The packets of `source`, not encoded again: from the key frame before frame `start` on, times from `start` on.

    shift: added to all times, in frames. skip: packets left out at the start. one_time: all are shown at one time.
    """
    with av.open(str(source)) as old, av.open(str(path), "w") as new:
        stream = old.streams.video[0]
        frame = int(Fraction(1, RATE) / stream.time_base)
        out = new.add_stream_from_template(stream)
        old.seek(start * frame, stream=stream)
        packets = [packet for packet in old.demux(stream) if packet.size]
        for i, packet in enumerate(packets[skip:]):
            packet.pts += (shift - start) * frame
            packet.dts += (shift - start) * frame
            if one_time:
                packet.pts, packet.dts = 5 * frame, 5 * frame + i - len(packets)
            packet.stream = out
            new.mux(packet)
    return path


def decoded(path: Path) -> tuple[list[Any], list[int | None]]:
    """Every frame of a file and when it is shown; packets that cannot be decoded give none."""
    frames = []
    with av.open(str(path)) as container:
        for packet in container.demux(container.streams.video[0]):
            with suppress(av.error.InvalidDataError):
                frames += [(frame.to_image(), frame.pts) for frame in packet.decode()]
    return [image for image, _ in frames], [time for _, time in frames]


def assert_exact(path: Path) -> Clip:
    """For several counts of frames; the last clip."""
    frames, times = decoded(path)
    known = [time for time in times if time is not None]
    assert len(known) == len(frames) and known == sorted(known) and known[-1] > known[0]
    for count in COUNTS:
        clip = Video(path, count).load()
        wanted = evenly(known, count)
        assert list(clip.indices) == wanted and clip.total == len(frames)
        for image, index in zip(clip.frames, wanted, strict=True):
            np.testing.assert_array_equal(np.asarray(image), np.asarray(frames[index]))
    return clip


@pytest.mark.parametrize("container", ["mp4", "mov", "mkv", "ts"])
@pytest.mark.parametrize("start", [1, 9, 17])
def test_a_clip_cut_without_encoding_it_again(tmp_path: Path, container: str, start: int) -> None:
    """An edit list hides what the decoder needs before the cut; other containers show it."""
    whole = encoded(tmp_path / "whole.mp4")
    path = copied(whole, tmp_path / f"cut.{container}", start)
    clip = assert_exact(path)
    if container in ("mp4", "mov"):
        assert levels(clip.frames)[0] == start and clip.total == 25 - start
    assert clip.fps == pytest.approx(RATE, rel=0.01)


def test_a_clip_whose_key_frame_was_cut_off(tmp_path: Path) -> None:
    """The decoder shows nothing before the next key frame, though its packets are there."""
    for codec in ("libx264", "mpeg4"):
        whole = encoded(tmp_path / f"{codec}.mp4", codec=codec, g="12", bf="2")
        for skip in (1, 4):
            assert_exact(copied(whole, tmp_path / f"{codec}{skip}.mkv", skip=skip))


def test_groups_of_pictures_that_lean_on_the_one_before(tmp_path: Path) -> None:
    options = {"x264-params": "keyint=8:min-keyint=8:open-gop=1:bframes=3:b-adapt=0:scenecut=0"}
    whole = encoded(tmp_path / "whole.mp4", **options)
    for start in (8, 14, 20):
        for container in ("mp4", "mkv"):
            assert_exact(copied(whole, tmp_path / f"{start}.{container}", start))


@pytest.mark.parametrize("container", ["mp4", "mkv", "ts"])
@pytest.mark.parametrize("shift", [-3, 40])
def test_times_that_begin_before_or_after_zero(tmp_path: Path, container: str, shift: int) -> None:
    assert_exact(copied(encoded(tmp_path / "whole.mp4"), tmp_path / f"a.{container}", shift=shift))


def test_frames_at_uneven_times(tmp_path: Path) -> None:
    times = np.cumsum(np.random.default_rng(0).choice([1, 1, 2, 9], 25)).tolist()
    for container in ("mp4", "mkv"):
        assert_exact(encoded(tmp_path / f"a.{container}", times))
    assert_exact(encoded(tmp_path / "b.webm", times, "libvpx", **{"auto-alt-ref": "1", "lag-in-frames": "16"}))


def test_frames_that_all_have_one_time_are_counted(tmp_path: Path) -> None:
    path = copied(write_clip(tmp_path / "whole.mkv", range(9)), tmp_path / "a.mkv", one_time=True)
    assert len(set(decoded(path)[1])) == 1, "the file is not what this test is about"
    clip = Video(path, 3).load()
    assert levels(clip.frames) == [0, 4, 8] and clip.total == 9 and 0 < clip.fps < float("inf")


def test_a_truncated_clip_shows_what_can_be_decoded(tmp_path: Path) -> None:
    whole = encoded(tmp_path / "whole.mkv").read_bytes()
    for part in (0.8, 0.9, 0.95):
        (tmp_path / "a.mkv").write_bytes(whole[: int(len(whole) * part)])
        assert_exact(tmp_path / "a.mkv")


def test_damaged_clips_are_shown_or_refused_in_one_line(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for container in ("mp4", "mkv", "avi"):
        whole = np.frombuffer(encoded(tmp_path / f"a.{container}", codec="mpeg4").read_bytes(), np.uint8)
        for _ in range(12):
            data = whole.copy()
            data[rng.integers(200, len(data), 20)] = rng.integers(0, 256, 20)
            (tmp_path / f"b.{container}").write_bytes(data.tobytes())
            try:
                assert len(Video(tmp_path / f"b.{container}", 4).load().frames) == 4
            except UserError as error:
                assert "\n" not in str(error)


def test_a_cover_picture_is_no_video(tmp_path: Path) -> None:
    """Though it is the first video stream of the file."""
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as container:
        cover = container.add_stream("mjpeg", rate=1)
        cover.width, cover.height, cover.pix_fmt = 32, 32, "yuvj420p"
        cover.disposition = av.stream.Disposition.attached_pic
        video = container.add_stream("mpeg4", rate=RATE)
        video.width, video.height, video.pix_fmt = 64, 32, "yuv420p"
        picture = av.VideoFrame.from_ndarray(np.full((32, 32, 3), 255, np.uint8), format="rgb24")
        picture.pts = 0
        container.mux(cover.encode(picture))
        container.mux(cover.encode(None))
        for i in range(9):
            frame = av.VideoFrame.from_ndarray(np.full((32, 64, 3), LEVELS * i, np.uint8), format="rgb24")
            frame.pts, frame.time_base = i, Fraction(1, RATE)
            container.mux(video.encode(frame))
        container.mux(video.encode(None))
    clip = Video(path, 3).load()
    assert levels(clip.frames) == [0, 4, 8] and clip.frames[0].size == (64, 32)


@pytest.mark.parametrize(("form", "count"), [("GIF", 1), ("GIF", 3), ("PNG", 3)])
def test_still_and_moving_pictures(tmp_path: Path, form: str, count: int) -> None:
    """A GIF or animated PNG of `count` pictures."""
    pictures = [Image.new("RGB", (64, 32), (LEVELS * n,) * 3) for n in range(2, 2 + count)]
    path = tmp_path / f"a.{form.lower()}"
    pictures[0].save(path, form, save_all=True, append_images=pictures[1:], duration=100)
    clip = Video(path, count).load()
    assert levels(clip.frames) == list(range(2, 2 + count)) and clip.fps > 0


def test_a_webp_is_refused_in_one_line(tmp_path: Path) -> None:
    Image.new("RGB", (64, 32)).save(tmp_path / "a.webp")
    with pytest.raises(UserError, match="not a readable video file"):
        Video(tmp_path / "a.webp").load()
