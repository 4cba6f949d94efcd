"""One test for each class of what serving systems got wrong with media (GHSA and CVE numbers in the names below)."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("fastapi")
httpx2 = pytest.importorskip("httpx2")
from PIL import Image  # noqa: E402

from msd.errors import UserError  # noqa: E402
from msd.serve.errors import HTTPError  # noqa: E402
from msd.serve.media import Decoder  # noqa: E402
from msd.serve.schema import Completion  # noqa: E402
from msd.serve.sources import Sources, data_of  # noqa: E402
from serve.server import NAME, asks, data_uri, engine, picture, running  # noqa: E402

VLM = engine()
CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def images() -> Iterator[Decoder]:
    made = Decoder()
    yield made
    made.close()


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with running(VLM) as (address, app, _):
        object.__setattr__(app, "seconds", 0.5)
        object.__setattr__(app, "most", 3_000_000)
        yield address


def ask(address: str, *uris: str, **more: Any) -> Any:
    return httpx2.post(address + CHAT, json={"model": NAME, "messages": asks("Hi", *uris), "max_tokens": 3, **more})


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1:{port}/a.png", "https://localhost:{port}/", "http://169.254.169.254/latest", "ftp://x/y",
        "http:\\\\127.0.0.1:{port}\\a.png", "//127.0.0.1:{port}/", "http://example.com@127.0.0.1:{port}/",
        "file:///etc/passwd", "/etc/passwd", "FILE:/etc/passwd", "data:@http://127.0.0.1:{port}/",
    ],
)  # fmt: skip
def test_nothing_is_fetched_and_no_file_is_opened(address: str, url: str) -> None:
    """GHSA-3f6c-7fw2-ppm4, CVE-2026-24779, CVE-2026-34753, CVE-2026-0599."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(0.05)
        answer = ask(address, url.format(port=listener.getsockname()[1]))
        assert answer.status_code == 400
        assert "data URI" in answer.json()["error"]["message"]
        assert "passwd" not in answer.text
        with pytest.raises(TimeoutError):
            listener.accept()


def test_errors_tell_nothing_of_the_inside(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """CVE-2026-22778."""
    broken = ask(address, data_uri(b"\x89PNG\r\n\x1a\n" + b"x" * 50))
    assert broken.status_code == 400

    def fails(*_: Any) -> None:
        raise RuntimeError("<secret at 0x7f3a00> /home/me")

    monkeypatch.setattr(VLM.drafter, "propose", fails)
    failed = ask(address)
    assert failed.status_code == 500
    for text in (broken.text, failed.text):
        assert not any(word in text for word in ("0x", "/home", "Traceback", "site-packages", "secret", "io.Bytes"))


def test_pictures_of_the_same_bytes_and_another_shape_are_not_confused(images: Decoder) -> None:
    """CVE-2025-46722."""
    wide, tall = (images.medium("image", picture(size=size, kind="BMP")) for size in ((40, 10), (10, 40)))
    assert (wide.size, tall.size) == ((40, 10), (10, 40))
    assert images.medium("image", picture(size=(40, 10), kind="BMP")).size == (40, 10)


@pytest.mark.parametrize("size", [(1, 1), (300, 1), (1, 300)])
def test_odd_dimensions_are_answered(address: str, size: tuple[int, int]) -> None:
    """CVE-2026-22773."""
    assert ask(address, data_uri(picture(size=size))).status_code == 200


def test_text_cannot_spell_a_placeholder(address: str) -> None:
    """CVE-2026-44222."""
    for role in ("user", "system", "assistant"):
        messages = [*asks("Hi"), {"role": role, "content": "see <image> here"}]
        assert ask(address, messages=messages).status_code == 400


def test_counts_and_sizes_are_checked_before_anything_is_decoded(monkeypatch: Any) -> None:
    """CVE-2026-5497, CVE-2026-100650."""
    with pytest.raises(ValueError, match="17 images"):
        Completion.model_validate({"model": NAME, "messages": asks("Hi", *["data:,"] * 17)})
    for kind, most in (("video", 4), ("audio", 4)):
        sound = {"type": "input_audio", "input_audio": {"data": "", "format": "wav"}}
        part = sound if kind == "audio" else {"type": "video_url", "video_url": {"url": "data:,"}}
        with pytest.raises(ValueError, match=f"{most + 1} .*; at most {most}"):
            Completion.model_validate({"model": NAME, "messages": [{"role": "user", "content": [part] * (most + 1)}]})
    with pytest.raises(UserError, match="image 1 is larger than 20 MB"):
        Sources().files([("image", f"data:;base64,{'A' * 28_000_000}")])
    monkeypatch.setattr("msd.serve.sources.TOTAL", 100)
    with pytest.raises(UserError, match="together"):
        Sources().files([("image", data_uri(b"x" * 60)), ("image", data_uri(b"y" * 60))])


def test_pixels_of_all_images_are_limited_together(images: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of one colour are small, however many pixels they have."""
    monkeypatch.setattr("msd.serve.media.MOST", 3 * 20 * 16 * 2)
    files = [picture(i) for i in range(3)]
    assert len(images.media([("image", "")] * 2, files[:2])) == 2
    with pytest.raises(UserError, match="of pixels together"):
        images.media([("image", "")] * 3, files)


def test_a_cold_request_does_not_end_the_others(address: str) -> None:
    """The smallest temperature that is taken has finite logits."""
    assert ask(address, temperature=1e-6, seed=1).status_code == 200


def test_an_error_that_repeats_half_a_character_is_still_an_error() -> None:
    assert HTTPError(400, "\ud800").body()["error"]["message"] == "?"


def test_a_bomb_is_refused_by_its_header(images: Decoder) -> None:
    bomb = bytearray(picture(size=(8, 8), kind="BMP"))
    bomb[18:26] = (100_000).to_bytes(4, "little") * 2
    with pytest.raises(UserError, match=r"image 1: .*pixels"):
        images.medium("image", bytes(bomb))
    assert images.medium("image", picture(5)).size == (20, 16)


def test_tensors_pickles_and_templates_are_no_inputs(address: str) -> None:
    """CVE-2026-56340, CVE-2026-5760, CVE-2026-3059."""
    part = {"type": "image_embeds", "image_embeds": "gASVAAAA"}
    for change in ({"messages": [{"role": "user", "content": [part]}]}, {"chat_template": "{{ 1 }}"}):
        assert ask(address, **change).status_code == 400
    assert ask(address, data_uri(b"\x80\x04\x95cos\nsystem\n(S'true'\ntR.")).status_code == 400


def test_the_body_is_limited_while_it_arrives(address: str) -> None:
    assert httpx2.post(address + CHAT, content=(b"x" * 100_000 for _ in range(40))).status_code == 413
    assert httpx2.post(address + CHAT, content=b"x" * 3_100_000).status_code == 413


def test_a_slow_body_ends(address: str) -> None:
    host, port = address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as slow:
        slow.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n{")
        assert b" 408 " in slow.recv(4096)


def test_a_decoder_that_hangs_or_dies_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    made = Decoder(seconds=0.4)
    hangs = [sys.executable, "-c", "import time; time.sleep(60)"]
    start = subprocess.Popen
    monkeypatch.setattr("msd.serve.media.subprocess.Popen", lambda _, **pipes: start(hangs, **pipes))
    begin = time.monotonic()
    with pytest.raises(UserError, match="could not be decoded within the limits"):
        made.medium("image", picture(1))
    assert time.monotonic() - begin < 20
    monkeypatch.undo()
    made.seconds = 30.0
    assert made.medium("image", picture(1)).size == (20, 16)
    made.close()


def test_a_child_that_wants_too_much_ends_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The limits are those of the operating system."""
    code = (
        "import msd.serve.decoder as d\n"
        "def load(data):\n"
        "    if data == b'memory': bytearray(3_000_000_000)\n"
        "    if data == b'time':\n"
        "        while True: pass\n"
        "    if data == b'crash': __import__('ctypes').string_at(0)\n"
        "    return real(data)\n"
        "real, d.load_image, d.CPU_SECONDS = d.load_image, load, 1\n"
        "d.main()"
    )
    start = subprocess.Popen
    command = [sys.executable, "-c", code]
    monkeypatch.setattr("msd.serve.media.subprocess.Popen", lambda _, **pipes: start(command, **pipes))
    made = Decoder(seconds=60.0)
    for data in (b"memory", b"time", b"crash"):
        with pytest.raises(UserError, match="could not be decoded within the limits"):
            made.medium("image", data)
    helper = made._process
    assert made.medium("image", picture(2)).size == (20, 16)
    assert made._process is helper  # none of them ended the helper itself
    made.close()


def test_images_arrive_as_they_were_sent(images: Decoder) -> None:
    found: dict[int, Image.Image] = {}
    threads = [
        threading.Thread(target=lambda i=i: found.update({i: images.medium("image", picture(i, (30 + i, 20)))}))
        for i in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for i, image in found.items():
        assert (
            image.tobytes()
            == Image.effect_mandelbrot((30 + i, 20), (-2.0, -1.5 - i / 10, 1.0, 1.5), 50).convert("RGB").tobytes()
        )
    assert len(found) == 6


def test_addresses_that_are_no_data_uris_are_not_repeated() -> None:
    for uri in ("data:image/png,abc", "data:;base64,@@@", "data:;base64", os.fspath("/etc/shadow")):
        with pytest.raises(UserError) as refused:
            data_of(uri, "image 3")
        assert "image 3" in str(refused.value)
        assert "shadow" not in str(refused.value)
