"""Media from allowed hosts and folders. The web is a server on this machine, which public addresses are led to."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("fastapi")
httpx2 = pytest.importorskip("httpx2")

from msd.errors import UserError  # noqa: E402
from msd.serve import remote  # noqa: E402
from msd.serve.remote import Remote, public  # noqa: E402
from msd.serve.sources import Sources  # noqa: E402
from serve.server import NAME, asks, data_uri, engine, picture, running  # noqa: E402

HOST, OTHER, PUBLIC = "images.example", "cdn.example", "203.0.114.7"
PICTURE = picture(3)
Answer = Callable[[BaseHTTPRequestHandler], None]


def send(status: int = 200, body: bytes = b"", **headers: str) -> Answer:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(status)
        for name, value in {"Content_Length": str(len(body)), **headers}.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()
        handler.wfile.write(body)

    return answer


@pytest.fixture
def web(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """pages: path -> answer. dns: host -> the answers to the next questions, of which the last stays.

    connected: the IP addresses and ports that were connected to. asked: (host, path) of the requests.
    """
    found = SimpleNamespace(pages={}, dns={HOST: [[PUBLIC]], OTHER: [[PUBLIC]]}, connected=[], asked=[])

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            found.asked.append((self.headers["Host"], self.path))
            found.pages[self.path](self)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()

    def resolve(host: str, port: int) -> list[str]:
        answers = found.dns[host]
        return answers.pop(0) if len(answers) > 1 else answers[0]

    def connect(address: str, port: int, seconds: float) -> socket.socket:
        found.connected.append((address, port))
        return socket.create_connection(server.server_address[:2], timeout=seconds)

    monkeypatch.setattr(remote, "resolve", resolve)
    monkeypatch.setattr(remote, "connect", connect)
    yield found
    server.shutdown()
    server.server_close()
    thread.join(60)


def fetch(address: str, most: int = 1 << 20, seconds: float = 60.0) -> bytes:
    return Remote([HOST, f"{OTHER}:8080"]).fetch(address, "image 1", most, time.monotonic() + seconds)


def test_an_allowed_host_is_fetched_once_resolved_from_its_pinned_address(web: SimpleNamespace) -> None:
    """The second answer of the name server, a private address, is never asked for."""
    web.dns[HOST] = [[PUBLIC], ["127.0.0.1"]]
    web.pages["/a.png?b=c"] = send(body=PICTURE)
    assert fetch(f"HTTP://{HOST.upper()}/a.png?b=c#top") == PICTURE
    assert web.connected == [(PUBLIC, 80)]
    assert web.asked == [(HOST, "/a.png?b=c")]


def test_the_server_answers_about_a_fetched_image_as_about_the_same_data(web: SimpleNamespace, tmp_path: Path) -> None:
    web.pages["/a.png"] = send(body=PICTURE)
    (tmp_path / "b.png").write_bytes(PICTURE)
    uris = (f"http://{HOST}/a.png", (tmp_path / "b.png").as_uri(), data_uri(PICTURE), f"http://{OTHER}/a.png")
    with running(engine(), sources=Sources([HOST], tmp_path)) as (address, _, _):
        answers = [
            httpx2.post(
                f"{address}/v1/chat/completions",
                json={"model": NAME, "messages": asks("Hi", uri), "max_tokens": 8, "temperature": 0},
                timeout=60,
            )
            for uri in uris
        ]
    texts = [answer.json()["choices"][0]["message"]["content"] for answer in answers[:3]]
    assert texts[0] == texts[1] == texts[2]
    assert answers[3].status_code == 400
    assert "image 1: this server does not fetch from that host" in answers[3].json()["error"]["message"]


@pytest.mark.parametrize(
    "address",
    [
        "http://localhost/", f"http://{OTHER}/", f"https://{HOST}:8443/", f"http://{HOST}.evil.example/",
        f"http://evil-{HOST}/", f"http://{HOST}@127.0.0.1/", f"http://127.0.0.1\\@{HOST}/", f"http:\\\\{HOST}/a",
        f"http://{HOST}\\.evil.example/", f"http://{HOST}:80@127.0.0.1/", f"http://{HOST}%00.evil.example/",
        f"http://{HOST}/a b", f"http://{HOST}/\r\nX: y", f"http://{HOST}./", "http://[::1]/", "http://0177.0.0.1/",
        "http://2130706433/", "http://0x7f.1/", f"http:///{HOST}/", f"http://{HOST}#@127.0.0.1/..", "http://ⓔxample.com/",
        f"http://{HOST}:99999999/",
    ],
)  # fmt: skip
def test_what_is_not_plainly_an_allowed_host_is_not_connected_to(web: SimpleNamespace, address: str) -> None:
    """GHSA-3f6c-7fw2-ppm4, CVE-2026-34753: one parser, exact names. The part behind # is not part of an address."""
    web.pages["/"] = send(body=b"x")
    if "#" in address:
        assert fetch(address) == b"x"
        assert web.connected == [(PUBLIC, 80)]
        return
    with pytest.raises(UserError) as refused:
        fetch(address)
    assert web.connected == []
    assert "127.0.0.1" not in str(refused.value)


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1", "10.0.0.1", "169.254.169.254", "100.64.0.1", "0.0.0.0", "192.168.1.1", "172.16.0.1", "224.0.0.1",
        "255.255.255.255", "198.18.0.1", "::1", "::", "fe80::1", "fe80::1%eth0", "fd00::1", "ff02::1",
        "::ffff:127.0.0.1", "::ffff:8.8.8.8", "::7f00:1", "64:ff9b::7f00:1", "64:ff9b:1::a00:1", "2002:7f00:1::",
        "2001:0:1::1", "2001:db8::1",
    ],
)  # fmt: skip
def test_a_host_with_an_address_that_is_not_public_is_refused(web: SimpleNamespace, address: str) -> None:
    """CVE-2026-24779. One such address among public ones is enough."""
    assert not public(address)
    for answer in ([address], [PUBLIC, address]):
        web.dns[HOST] = [answer]
        with pytest.raises(UserError, match="not public"):
            fetch(f"http://{HOST}/")
    assert web.connected == []


def test_public_addresses() -> None:
    assert all(map(public, (PUBLIC, "8.8.8.8", "2606:4700::1111")))


def test_octal_and_decimal_addresses_are_what_the_resolver_makes_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even an operator who allows such a name allows no private address."""
    monkeypatch.setattr(remote, "connect", lambda *_: pytest.fail("connected"))
    for host in ("0177.0.0.1", "2130706433", "0x7f.1", "127.1", "localhost"):
        with pytest.raises(UserError, match=r"not public|could not be fetched"):
            Remote([host]).fetch(f"http://{host}/", "image 1", 10, time.monotonic() + 60)


def test_redirects_are_checked_like_first_addresses(web: SimpleNamespace) -> None:
    """GHSA-3f6c-7fw2-ppm4: names, addresses, and their number, at every hop."""
    web.pages |= {
        "/": send(302, Location="/next"), "/next": send(307, Location=f"http://{OTHER}:8080/end"),
        "/end": send(body=PICTURE), "/loop": send(301, Location="/loop"),
        "/inside": send(302, Location="http://127.0.0.1/"), "/scheme": send(302, Location="file:///etc/passwd"),
        "/slash": send(302, Location=f"http:\\\\{HOST}\\"), "/nowhere": send(302),
    }  # fmt: skip
    assert fetch(f"http://{HOST}/") == PICTURE
    assert web.connected == [(PUBLIC, 80), (PUBLIC, 80), (PUBLIC, 8080)]
    for path in ("loop", "inside", "scheme", "slash", "nowhere"):
        with pytest.raises(UserError):
            fetch(f"http://{HOST}/{path}")
    web.dns[HOST] = [[PUBLIC], ["127.0.0.1"]]  # the second hop is resolved again, and refused
    before = len(web.connected)
    with pytest.raises(UserError, match="not public"):
        fetch(f"http://{HOST}/")
    assert len(web.connected) == before + 1


@pytest.mark.parametrize("told", [True, False])
def test_a_file_is_counted_as_it_arrives(web: SimpleNamespace, told: bool) -> None:
    """CVE-2026-0599, CVE-2026-100650: neither a stated nor an actual size beyond the limit is read to its end."""
    sent: list[int] = []

    def endless(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        if told:
            handler.send_header("Content-Length", str(1 << 40))
        handler.end_headers()
        try:
            while sum(sent) < 1 << 28:
                handler.wfile.write(b"x" * 65536)
                sent.append(65536)
        except OSError:
            pass

    web.pages["/"] = endless
    with pytest.raises(UserError, match="image 1 is larger"):
        fetch(f"http://{HOST}/", most=100_000)
    assert sum(sent) < 1 << 28


@pytest.mark.parametrize("slow", ["head", "body"])
def test_one_deadline_covers_a_server_that_sends_byte_by_byte(web: SimpleNamespace, slow: str) -> None:
    ended = threading.Event()

    def drips(handler: BaseHTTPRequestHandler) -> None:
        head = b"HTTP/1.0 200 OK\r\n" + (b"" if slow == "head" else b"\r\n")
        try:
            handler.wfile.write(head)
            while True:
                handler.wfile.write(b"X: y\r\n")
                time.sleep(0.02)
        except OSError:
            ended.set()

    web.pages["/"] = drips
    with pytest.raises(UserError, match="could not be fetched"):
        fetch(f"http://{HOST}/", seconds=1.0)
    assert ended.wait(60)


def test_answers_that_are_no_files_are_refused_alike(web: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """CVE-2026-22778: a message tells nothing of what a server answered, or whether there is one."""

    def short(handler: BaseHTTPRequestHandler) -> None:
        handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nsecret")

    web.pages |= {
        "/missing": send(404, b"secret"), "/broken": send(500, b"secret"), "/short": short,
        "/packed": send(body=b"secret", Content_Encoding="gzip"),
        "/garbage": lambda h: h.wfile.write(b"secret\r\n\r\n"),
    }  # fmt: skip
    said = set()
    for address in [*(f"http://{HOST}{path}" for path in web.pages), f"https://{HOST}/no-tls"]:
        with pytest.raises(UserError) as refused:
            fetch(address)
        said.add(str(refused.value))
    monkeypatch.setattr(remote, "connect", lambda *_: (_ for _ in ()).throw(ConnectionRefusedError("secret")))
    with pytest.raises(UserError) as refused:
        fetch(f"http://{HOST}/missing")
    assert {*said, str(refused.value)} == {"image 1 could not be fetched; check its address, or send data:…;base64,…"}
    assert web.connected[-1] == (PUBLIC, 443)


def test_only_files_of_the_folder_are_opened(tmp_path: Path) -> None:
    folder, outside = tmp_path / "media", tmp_path / "media-of-others"
    for made in (folder, outside):
        made.mkdir()
        (made / "a b.png").write_bytes(PICTURE)
    (folder / "link.png").symlink_to(outside / "a b.png")
    (folder / "inner.png").symlink_to(folder / "a b.png")
    os.mkfifo(folder / "pipe")
    sources = Sources(folder=folder)
    for name in ("a%20b.png", "inner.png", "../media/a%20b.png"):
        assert sources.files([("image", f"file://{folder}/{name}")]) == [PICTURE]
    said = set()
    for address in (
        f"file://{outside}/a%20b.png", f"file://{folder}/link.png", f"file://{folder}/../media-of-others/a%20b.png",
        f"file://{folder}/%2e%2e/media-of-others/a%20b.png", f"file://{folder}/pipe", f"file://{folder}",
        f"file://{folder}/none.png", f"file://{folder}/a%00.png", f"file://localhost{folder}/a%20b.png", "file:a.png",
        f"FILE://{folder}/a\\b.png",
    ):  # fmt: skip
        with pytest.raises(UserError) as refused:
            sources.files([("image", address)])
        said.add(str(refused.value))
    assert said == {"image 1 is no file of this server's media folder; send data:…;base64,…"}
    with pytest.raises(UserError, match="not a data URI"):
        Sources().files([("image", f"file://{folder}/inner.png")])
    with pytest.raises(UserError, match="no folder"):
        Sources(folder=tmp_path / "none")


def test_the_sizes_of_all_files_count_together(web: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    web.pages["/"] = send(body=b"x" * 60)
    monkeypatch.setattr("msd.serve.sources.TOTAL", 100)
    with pytest.raises(UserError, match="image 2 is larger"):
        Sources([HOST]).files([("image", f"http://{HOST}/")] * 3)
    assert len(web.connected) == 2


@pytest.mark.parametrize("host", ["", "*", "a/b", "http://a.example", "a.example:port", "user@a.example", "a.example?"])
def test_what_is_no_host_cannot_be_allowed(host: str) -> None:
    with pytest.raises(UserError, match="no name of a host"):
        Remote([host])
