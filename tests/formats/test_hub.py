"""Draft heads on the hub: written with a card, uploaded by the official client, and loaded by id, also offline."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
import torch
from huggingface_hub import ModelCard, constants

import rivals
import tiny
from msd import SpeculativeVLM, formats
from msd.drafters.toolkit import checkpoint
from msd.errors import UserError
from published_layouts import LAYOUTS
from training_command import run

COMMIT = "1" * 40
LAYOUT = {layout.name: layout for layout in LAYOUTS}
RECORD: dict[str, Any] = {
    "settings": {"batch": 4, "engine": "vllm", "start": "/home/someone/runs/first/drafter"}, "steps": 120,
    "answers": 900, "cuts": {"target": "llava-0123456789ab"}, "calibration": {"log_odds": 1.5, "bias": 0.25},
    "held_out": {"language": 0.8742, "vision": 0.6851, "acceptance": 0.8082},
}  # fmt: skip


class Hub(ThreadingHTTPServer):
    """The part of the hub's interface that the client uses here. files: what was committed. requests: all paths."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.created: dict[str, Any] = {}

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_: object) -> None:
        pass

    def do_POST(self) -> None:
        path, body = urlsplit(self.path).path, self.rfile.read(int(self.headers["Content-Length"]))
        self.server.requests.append(path)
        if path == "/api/repos/create":
            self.server.created = json.loads(body)
            self.reply({"url": f"{self.server.address}/some/head", "name": "some/head"})
        elif path == "/api/validate-yaml":
            self.reply({"errors": [], "warnings": []})
        elif "/preupload/" in path:
            kept = {"uploadMode": "regular", "shouldIgnore": False, "oid": None}
            self.reply({"files": [{"path": file["path"], **kept} for file in json.loads(body)["files"]]})
        else:
            assert path == "/api/models/some/head/commit/main"
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.server.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            self.reply({"commitUrl": f"{self.server.address}/some/head/commit/{COMMIT}", "commitOid": COMMIT})

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.requests.append(path)
        if path.startswith("/api/models/some/head/tree/"):
            self.reply([
                {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                for name, content in self.server.files.items()
            ])  # fmt: skip
            return
        if path.startswith("/api/models/some/head"):
            files = [{"rfilename": name} for name in self.server.files]
            self.reply({"id": "some/head", "sha": COMMIT, "siblings": files})
            return
        content = self.server.files.get(path.removeprefix(f"/some/head/resolve/{COMMIT}/"))
        if content is None:
            self.send_error(404)
            return
        self.send_response(200)
        for name, value in {
            "ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": COMMIT, "Content-Length": len(content)
        }.items():  # fmt: skip
            self.send_header(name, str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    do_HEAD = do_GET  # noqa: N815

    def reply(self, value: Any) -> None:
        content = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    served = Hub()
    threading.Thread(target=served.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", served.address)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", served.address + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "a token of nobody")
    yield served
    served.shutdown()


def trained(folder: Path, record: dict[str, Any] = RECORD) -> Path:
    checkpoint.save(rivals.network(tiny.llava(), "eagle3"), folder, record)
    return folder


def test_a_head_is_pushed_and_loaded_by_its_id(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    own = trained(tmp_path / "own")
    code, out, err = run(capsys, "push", own, "some/head", "--target", "llava-hf/some-7b", "--private")
    assert code == 0 and out.strip() == f"{hub.address}/some/head/commit/{COMMIT}", err
    assert hub.created["name"] == "head" and hub.created["visibility"] == "private"
    assert sorted(hub.files) == ["README.md", "config.json", "model.safetensors", "training.json"]
    for name in ("config.json", "model.safetensors"):
        assert hub.files[name] == (own / name).read_bytes()
    assert b"someone" not in hub.files["training.json"], "folders of a machine stay there"
    one, two = formats.load(own), formats.load("some/head")
    assert all(torch.equal(t, two.state_dict()[n]) for n, t in one.state_dict().items())
    assert two.calibration == RECORD["calibration"], "the training record came along"
    # offline, the same id is taken from the cache, for the library and the command; another one is refused
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.requests.clear()
    vlm = SpeculativeVLM(tiny.llava(), None, drafter="some/head")
    assert vlm.drafter.name == "eagle3" and vlm.drafter.taps == one.config.taps
    code, out, _ = run(capsys, "check", "some/head", "--json")
    assert code == 0 and json.loads(out)["method"] == "eagle3"
    with pytest.raises(UserError, match="no head could be fetched from the hub"):
        formats.load("some/other")
    with pytest.raises(UserError, match=r"the hub did not take 'some/head' .*offline mode is enabled"):
        formats.push_to_hub(own, "some/head")
    assert hub.requests == []


def test_the_card_has_the_measured_acceptance(tmp_path: Path) -> None:
    folder = formats.save_pretrained(trained(tmp_path / "own"), tmp_path / "out", "llava-hf/some-7b", "some/head")
    card = ModelCard.load(folder / "README.md")
    assert card.data.base_model == "llava-hf/some-7b" and card.data.library_name == "msd"
    assert {"speculative-decoding", "eagle3"} <= set(card.data.tags)
    for line in (
        "| language | 0.874 |", "| vision | 0.685 |", "| all | 0.808 |", "- 120 steps of 4 answers each, out of 900",
        "`llava-0123456789ab`", "msd train --for vllm", 'from_pretrained("llava-hf/some-7b", "some/head")',
    ):  # fmt: skip
        assert line in card.text
    unmeasured = formats.save_pretrained(trained(tmp_path / "new", {}), tmp_path / "second")
    text = (unmeasured / "README.md").read_text()
    assert "Its acceptance was not measured." in text and "| language |" not in text
    (folder / "README.md").write_text("written by hand")
    again = formats.save_pretrained(folder, tmp_path / "third")
    assert (again / "README.md").read_text() == "written by hand"


def test_other_projects_heads_keep_their_files(tmp_path: Path) -> None:
    head = LAYOUT["speculators-llama"].write(tmp_path / "head")
    folder = formats.save_pretrained(head, tmp_path / "out")
    for file in ("config.json", "model.safetensors"):
        assert (folder / file).read_bytes() == (head / file).read_bytes()
    assert "format `speculators`" in (folder / "README.md").read_text()
    assert formats.check(folder).faults == []


def test_what_cannot_be_pushed_is_refused(hub: Hub, tmp_path: Path) -> None:
    own = trained(tmp_path / "own")
    with pytest.raises(UserError, match="'head' is no hub id; give USER/NAME"):
        formats.push_to_hub(own, "head")
    broken = LAYOUT["eagle3"].write(tmp_path / "broken", lambda t: t.pop("fc.weight"))
    with pytest.raises(UserError, match=r"has faults: tensor 'fc\.weight' is missing"):
        formats.push_to_hub(broken, "some/head")
    assert hub.requests == []
    hub.shutdown()
    hub.server_close()
    with pytest.raises(UserError, match="the hub did not take 'some/head'"):
        formats.push_to_hub(own, "some/head")
