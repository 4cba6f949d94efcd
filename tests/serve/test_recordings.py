"""Recordings of event cameras in requests: answers are those of `generate`, and hostile files end in one clear line."""

from __future__ import annotations

import base64
import io
import json
import os
import pickle
import struct
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("fastapi")
httpx2 = pytest.importorskip("httpx2")

from events.writers import FORMATS, NEEDS, SIZE, arrays, npy_dict, npy_table, npz, scene  # noqa: E402
from msd.config import SpeculativeConfig  # noqa: E402
from msd.drafters.algorithms.msd import MSD, MSDConfig, MSDNetwork  # noqa: E402
from msd.drafters.algorithms.prompt_lookup import Repeats  # noqa: E402
from msd.errors import UserError  # noqa: E402
from msd.events import EventStream, event_frames, open_chunks  # noqa: E402
from msd.events.clip import event_clip  # noqa: E402
from msd.labels.gain import answer_logits, image_frames, masking_cost  # noqa: E402
from msd.model import SpeculativeVLM  # noqa: E402
from msd.serve import recordings  # noqa: E402
from msd.serve.media import Decoder, Recorded  # noqa: E402
from msd.serve.schema import EventsUrl  # noqa: E402
from msd.streaming import request_lock  # noqa: E402
from serve.server import NAME, asks, data_uri, engine, picture, running  # noqa: E402

BLIND = engine()  # sees the frames; its drafter reads no events
CHAT = "/v1/chat/completions"
TEXT = {"type": "text", "text": "What happens?"}


def sighted() -> SpeculativeVLM:
    """The same target with a drafter that reads events: tokens of 5 frames, and of the 4 patches of a frame."""
    torch.manual_seed(1)
    config = MSDConfig.for_target(
        BLIND.model.config.get_text_config(), 200, rank=4, parent_rank=8, auxiliary=((5, 2), (4, 1))
    )
    network = MSDNetwork(config)
    for parameter in network.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.3)
    drafter = Repeats(MSD(network.attach(BLIND.model).eval()), 2)
    return SpeculativeVLM(BLIND.model, BLIND.processor, SpeculativeConfig(adaptive=False), drafter)


SIGHTED = sighted()


@pytest.fixture(scope="module")
def blind() -> Iterator[str]:
    with running(BLIND, rows=4) as (address, _, _):
        yield address


@pytest.fixture(scope="module")
def seeing() -> Iterator[str]:
    with running(SIGHTED, rows=4) as (address, _, _):
        yield address


@pytest.fixture(scope="module")
def decoder() -> Iterator[Decoder]:
    made = Decoder()
    yield made
    made.close()


def events_part(data: bytes, format: str | None = None, **more: Any) -> dict[str, Any]:
    url = data_uri(data, "application/octet-stream")
    return {"type": "events_url", "events_url": {"url": url, "format": format, **more}}


def post(address: str, parts: list[dict[str, Any]], path: str = CHAT, **more: Any) -> Any:
    greedy = {"max_tokens": 16, "temperature": 0} if path == CHAT else {}
    body = {"model": NAME, "messages": [{"role": "user", "content": parts}], **greedy, **more}
    return httpx2.post(address + path, json=body, timeout=120)


def text(answer: Any) -> str:
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["message"]["content"]


def refusal(answer: Any) -> str:
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["type"] == "invalid_request_error" and "\n" not in error["message"]
    return error["message"]


# answers


@pytest.mark.parametrize("name", ["npz", "nmnist", "csv"])
def test_an_answer_is_that_of_generate_about_the_same_frames(blind: str, name: str, tmp_path: Path) -> None:
    file, writer = FORMATS[name]
    path = tmp_path / file
    path.write_bytes(writer(scene()))
    asked = events_part(path.read_bytes(), path.suffix[1:])
    for frames, more in ((8, {}), (3, {"frames": 3})):
        clip = event_clip(open_chunks(path), frames)
        asked["events_url"] |= more
        alone = BLIND.generate([clip], TEXT["text"], max_new_tokens=16)
        assert text(post(blind, [asked, TEXT])) == alone.text
    streamed = post(blind, [asked, TEXT], stream=True)
    pieces = [json.loads(line[6:]) for line in streamed.text.splitlines() if line.startswith("data: {")]
    assert "".join(piece["choices"][0]["delta"].get("content", "") for piece in pieces) == alone.text


@pytest.mark.parametrize("photo", [False, True])
def test_the_drafter_reads_the_events(seeing: str, photo: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Alone, the target sees frames of the recording; beside a photo, only the drafter has it."""
    stream, read = scene(), list[EventStream]()
    encode = SIGHTED.drafter.encode  # type: ignore[attr-defined]
    monkeypatch.setattr(type(SIGHTED.drafter), "encode", lambda _, events: read.append(events) or encode(events))
    shown = [{"type": "image_url", "image_url": {"url": data_uri(picture(1))}}] if photo else []
    media = [picture(1)] if photo else [event_clip(stream, 8)]
    alone = SIGHTED.generate(media, TEXT["text"], events=stream, max_new_tokens=16)
    without = SIGHTED.generate(media, TEXT["text"], max_new_tokens=16)
    answer = post(seeing, [*shown, events_part(npz(stream), "npz"), TEXT])
    assert text(answer) == alone.text == without.text
    assert len(read) == 2 and all((getattr(read[1], n) == getattr(stream, n)).all() for n in "txyp")
    drafts = answer.json()["metrics"]["speculative_decoding"]
    assert drafts["num_draft_tokens"] == alone.statistics.num_draft_tokens > 0
    assert text(post(seeing, [events_part(npz(stream), "npz"), TEXT], msd={"method": "ar"})) is not None
    assert len(read) == 2  # a request without drafts encodes nothing


def test_requests_with_and_without_events_share_a_batch(seeing: str) -> None:
    asked = [
        [events_part(npz(scene(seed=1)), "npz"), TEXT],
        [{"type": "image_url", "image_url": {"url": data_uri(picture(2))}}, TEXT],
        [{"type": "image_url", "image_url": {"url": data_uri(picture(3))}}, events_part(npz(scene(seed=2))), TEXT],
        [TEXT],
    ]
    media: list[Any] = [[event_clip(scene(seed=1), 8)], [picture(2)], [picture(3)], []]
    found: dict[int, str] = {}
    threads = [
        threading.Thread(target=lambda i=i: found.update({i: text(post(seeing, asked[i], max_tokens=40))}))
        for i in range(len(asked))
    ]
    with request_lock(SIGHTED.model):  # none of them begins before all have been sent
        for thread in threads:
            thread.start()
    for thread in threads:
        thread.join()
    for i, shown in enumerate(media):
        assert found[i] == BLIND.generate(shown, TEXT["text"], max_new_tokens=40).text


def test_what_cannot_be_used_is_refused(blind: str, seeing: str) -> None:
    recording, photo = events_part(npz(scene()), "npz"), asks("", data_uri(picture(1)))[0]["content"][0]
    assert "method 'prompt-lookup' reads no events" in refusal(post(blind, [photo, recording, TEXT]))
    assert "method 'ar' reads no events" in refusal(post(seeing, [photo, recording, TEXT], msd={"method": "ar"}))
    assert "at most 1 in a request" in refusal(post(blind, [recording, recording, TEXT]))
    framed = events_part(npz(scene()), "npz", frames=2)
    assert "frames is for a recording without other media" in refusal(post(seeing, [photo, framed, TEXT]))
    assert "frames" in refusal(post(blind, [events_part(b"", frames=17), TEXT]))
    assert "format" in refusal(post(blind, [events_part(b"", "pickle"), TEXT]))
    assert "does not fetch" in refusal(
        post(blind, [{"type": "events_url", "events_url": {"url": "file:///etc/passwd", "format": "csv"}}, TEXT])
    )
    assert "there is no recording" in refusal(post(blind, [photo, TEXT], "/v1/msd/frames"))


def test_the_formats_are_those_of_the_readers() -> None:
    (literal, _) = get_args(EventsUrl.model_fields["format"].annotation)
    assert [f".{name}" for name in get_args(literal)] == list(recordings.FORMATS[1:])


# frames


def test_the_frames_are_those_that_the_target_sees(blind: str) -> None:
    stream = scene()
    answer = post(blind, [events_part(npz(stream), "npz", frames=5)], "/v1/msd/frames").json()
    assert answer["size"] == list(stream.size) and answer["events"] == len(stream)
    drawn = event_frames(stream, 5)
    for frame, image, count, span in zip(answer["frames"], drawn.images(), drawn.counts, drawn.spans, strict=True):
        assert (frame["events"], frame["begin"], frame["end"]) == (count, *span)
        kind, data = frame["image"].split(",")
        assert kind == "data:image/png;base64"
        shown = Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB")
        assert shown.tobytes() == image.tobytes()


def test_the_gain_of_each_frame_is_the_cost_of_masking_it(blind: str) -> None:
    clip = event_clip(scene(), 3)
    alone = BLIND.generate([clip], TEXT["text"], max_new_tokens=6)
    asked = [events_part(npz(scene()), "npz", frames=3), TEXT]
    measured = post(blind, asked, "/v1/msd/gain", tokens=alone.tokens).json()
    assert measured["blocks"] is None and measured["side"] is None
    target = BLIND.target
    with torch.inference_mode():
        request = BLIND._request([clip], TEXT["text"], None)
        inputs = target.encode_images(request.inputs())
        logits = answer_logits(target, inputs, [alone.tokens])
        masks = image_frames(target, inputs["input_ids"], 3)
        costs = [masking_cost(target, inputs, [alone.tokens], mask, logits)[0] for mask in masks]
    assert sum(int(mask.sum()) for mask in masks) == 3 * 4 and not (masks[0] & masks[1]).any()
    assert np.allclose(measured["frames"], torch.stack(costs, 1).numpy(), atol=1e-4)
    assert max(map(max, measured["frames"])) > 0


# hostile files


def refused(decoder: Decoder, data: bytes, extension: str) -> str:
    """The message of a refusal; the helper process has survived it."""
    with pytest.raises(UserError) as caught:
        decoder.medium("recording", data, "recording 1", extension, 8)
    message = str(caught.value)
    assert message.startswith("recording 1: ")
    inside = [word for word in ("0x", "/proc", "site-packages", "object at", "Traceback") if word in message]
    assert inside == [], message
    assert decoder._process is not None and decoder._process.poll() is None
    return message


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_is_read_whole_or_refused_when_cut(decoder: Decoder, name: str) -> None:
    if name in NEEDS:
        pytest.importorskip(NEEDS[name])
    file, writer = FORMATS[name]
    extension, data = f".{file.split('.')[1]}", writer(scene())
    if name in ("npy dict", "npy list"):
        assert "it is a pickle" in refused(decoder, data, extension)
        return
    medium = decoder.medium("recording", data, "recording 1", extension, 8)
    assert isinstance(medium, Recorded) and len(medium.frames) == 8
    for column in "xyp":
        np.testing.assert_array_equal(getattr(medium.events, column), getattr(scene(), column))
    for length in (1, len(data) // 3):
        try:  # a format without a count is a shorter recording
            cut = decoder.medium("recording", data[:length], "recording 1", extension, 8)
            assert isinstance(cut, Recorded) and 0 < len(cut.events) < len(scene())
        except UserError:
            refused(decoder, data[:length], extension)


def test_a_pickle_is_not_run(decoder: Decoder, tmp_path: Path) -> None:
    marker = tmp_path / "ran"

    class Harmful:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(marker),)

    head = io.BytesIO()
    np.lib.format.write_array_header_1_0(head, {"descr": "|O", "fortran_order": False, "shape": ()})
    program = pickle.dumps([Harmful()])
    assert "it is a pickle" in refused(decoder, head.getvalue() + program, ".npy")
    for extension in ("", ".npy", ".npz", ".h5", ".csv", ".bin", ".dat"):
        refused(decoder, program, extension)
    packed = io.BytesIO()
    np.savez(packed, t=np.array([Harmful()], object), x=np.zeros(1), y=np.zeros(1), p=np.zeros(1))
    refused(decoder, packed.getvalue(), ".npz")
    assert not marker.exists()


def npz_of(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(f"{name}.npy", data)
    return buffer.getvalue()


def npy_of(count: int, kind: str = "<i8", data: bytes = b"") -> bytes:
    """An array whose header states `count` elements, whatever follows."""
    head = io.BytesIO()
    np.lib.format.write_array_header_1_0(head, {"descr": kind, "fortran_order": False, "shape": (count,)})
    return head.getvalue() + data


def test_counts_that_a_header_only_states(decoder: Decoder) -> None:
    stated = npz_of({name: npy_of(10**15) for name in "txyp"})
    assert refused(decoder, stated, ".npz")
    sizes = npz_of({**{name: npy_of(1, data=bytes(8)) for name in "txyp"}, "size": npy_of(10**12)})
    assert refused(decoder, sizes, ".npz")
    table = bytearray(npy_table(scene()))
    at = table.index(b"(500,)")
    table[at : at + 6] = b"(9999,"
    assert refused(decoder, bytes(table), ".npy")
    h5py = pytest.importorskip("h5py")
    buffer = io.BytesIO()
    with h5py.File(buffer, "w") as root:
        for name in "txyp":  # never written, so the file is small
            root.create_dataset(f"events/{name}", (10**12,), "u1", chunks=(10**6,))
        root.attrs["width"], root.attrs["height"] = 10, 10
    assert len(buffer.getvalue()) < 20_000
    assert "more than 8 million events" in refused(decoder, buffer.getvalue(), ".h5")


def test_bombs_end_at_the_limit_of_events(decoder: Decoder) -> None:
    many = recordings.MOST + 1
    zeros = {name: npy_of(many, "|u1", bytes(many)) for name in "txyp"}
    bomb = npz_of({**zeros, "size": npy_of(2, data=struct.pack("<qq", 10, 10))})
    assert len(bomb) < 100_000
    assert "more than 8 million events" in refused(decoder, bomb, ".npz")
    h5py = pytest.importorskip("h5py")
    buffer = io.BytesIO()
    with h5py.File(buffer, "w") as root:
        for name in "txyp":
            root.create_dataset(f"events/{name}", data=np.zeros(many, np.uint8), chunks=(10**6,), compression="gzip")
        root.attrs["width"], root.attrs["height"] = 10, 10
    assert len(buffer.getvalue()) < 200_000
    assert "more than 8 million events" in refused(decoder, buffer.getvalue(), ".hdf5")


def test_sensors_times_and_columns_that_are_no_recording(decoder: Decoder) -> None:
    stream = scene()
    whole = arrays(stream)

    def saved(**changed: Any) -> bytes:
        buffer = io.BytesIO()
        np.savez(buffer, **{**whole, "size": np.array(SIZE), **changed})
        return buffer.getvalue()

    assert "65535x65535 pixels are too many" in refused(decoder, saved(size=np.array([65535, 65535])), ".npz")
    assert "recording 1: it is longer than 600 s" in refused(decoder, saved(t=stream.t * 10**6), ".npz")
    assert "recording 1: an event has x = " in refused(decoder, saved(x=stream.x + 100), ".npz")
    assert "times go back" in refused(decoder, saved(t=stream.t[::-1]), ".npz")
    assert "no events" in refused(decoder, saved(**{name: whole[name][:0] for name in whole}), ".npz")
    assert refused(decoder, picture(1), ".npz") and refused(decoder, b"\x00" * 1000, "") and refused(decoder, b"", "")
    assert refused(decoder, b"t,x,y,p\n1,2,3,<object at 0x7f00>\n", ".csv") == f"recording 1: {recordings.DAMAGED}"


def test_an_hdf5_file_reads_no_other_file(decoder: Decoder, tmp_path: Path) -> None:
    """An external link, external storage and a virtual dataset, each to a file of the server."""
    h5py = pytest.importorskip("h5py")
    secret = tmp_path / "secret.h5"
    with h5py.File(secret, "w") as root:
        for name, values in arrays(scene()).items():
            root[f"events/{name}"] = values

    def file(build: Any) -> bytes:
        buffer = io.BytesIO()
        with h5py.File(buffer, "w") as root:
            build(root)
        return buffer.getvalue()

    def linked(root: Any) -> None:
        root["events"] = h5py.ExternalLink(str(secret), "/events")

    def stored(root: Any) -> None:
        for name in "xyp":
            root[f"events/{name}"] = np.zeros(64, np.uint8)
        root.create_dataset("events/t", (64,), "u1", external=[(str(secret), 0, 64)])

    def offset(root: Any) -> None:
        for name, values in arrays(scene()).items():
            root[f"events/{name}"] = values
        root.create_dataset("t_offset", (1,), "u8", external=[(str(secret), 0, 8)])

    def virtual(root: Any) -> None:
        for name in "txyp":
            layout = h5py.VirtualLayout(shape=(500,), dtype="i8")
            layout[:] = h5py.VirtualSource(str(secret), f"events/{name}", shape=(500,))
            root.create_virtual_dataset(f"events/{name}", layout)

    for build in (linked, stored, offset, virtual):
        assert "it refers to other files" in refused(decoder, file(build), ".h5")
    assert decoder.medium("recording", secret.read_bytes(), "recording 1", ".h5", 8)


def test_a_request_with_a_pickle_gets_400(blind: str) -> None:
    assert "recording 1: it is a pickle" in refusal(post(blind, [events_part(npy_dict(scene()), "npy"), TEXT]))
