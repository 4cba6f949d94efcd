"""`msd inspect`: the page shows the recorded steps, and these are the decoded ones."""

from __future__ import annotations

import io
import json
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console

import tiny
from msd.cli.trace_text import trace_text
from msd.config import SpeculativeConfig
from msd.inspect import Trace, page
from msd.model import SpeculativeVLM
from random_drafter import RandomDrafter
from training_command import run

MODEL = tiny.llava()
INPUTS = tiny.llava_inputs(seed=1)


def engine(tokens: int) -> SpeculativeVLM:
    """Returns an engine whose drafter is often correct."""
    plain = SpeculativeVLM(MODEL, None, drafter="ar").generate(**INPUTS, max_new_tokens=tokens, do_sample=False)
    drafter = RandomDrafter(3, 64, [plain.tokens])
    return SpeculativeVLM(MODEL, None, SpeculativeConfig(adaptive=False), drafter)


def test_the_record_is_what_was_decoded() -> None:
    vlm = engine(24)
    trace = Trace()
    answer = vlm.generate(**INPUTS, max_new_tokens=24, do_sample=False, on_step=trace)
    steps = trace.passes
    count = len(steps)
    assert count == answer.statistics.num_spec_steps
    emitted = [answer.tokens[0], *(token for step in steps for token in step.emitted)]
    assert emitted == answer.tokens
    assert sum(len(step.nodes) for step in steps) == answer.statistics.num_draft_tokens
    at = 0
    for step in steps:
        assert step.root == answer.tokens[at]
        path = [node for node in step.nodes if node.accepted]
        assert [node.token for node in path] == list(step.emitted[:-1])
        assert [node.depth for node in path] == list(range(1, len(path) + 1))
        for node in step.nodes:
            assert node.depth == 1 if node.parent == 0 else step.nodes[node.parent - 1].depth == node.depth - 1
        at += len(step.emitted)
    assert any(len(step.emitted) > 1 for step in steps) and any(not n.accepted for s in steps for n in s.nodes)
    again = vlm.generate(**INPUTS, max_new_tokens=24, do_sample=False)
    assert again.tokens == answer.tokens and len(steps) == count  # nothing is recorded of another answer


class Tags(HTMLParser):
    """Refuses a page whose tags do not close in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_shows_every_step_and_escapes_tokens() -> None:
    vlm = engine(16)
    trace = Trace()
    answer = vlm.generate(**INPUTS, max_new_tokens=16, do_sample=False, on_step=trace)
    steps = trace.passes
    text = page("<what> & why", answer, steps, lambda token: f"<{token}>")
    reader = Tags()
    reader.feed(text)
    assert reader.open == [] and "<what>" not in text.replace("&lt;what&gt;", "")
    assert text.count('class="step"') == len(steps)
    accepted = sum(n.accepted for s in steps for n in s.nodes)
    assert text.count('class="yes"') == accepted and text.count('class="token drafted"') == accepted
    for token in answer.tokens:
        assert f"<{token}>" in reader.text


def test_the_text_shows_every_node_of_every_step() -> None:
    vlm = engine(16)
    trace = Trace()
    answer = vlm.generate(**INPUTS, max_new_tokens=16, do_sample=False, on_step=trace)
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(trace_text(answer, trace.passes, lambda token: f"<{token}>"))
    text = console.export_text()
    nodes = [node for step in trace.passes for node in step.nodes]
    assert text.count("+ '<") == sum(node.accepted for node in nodes) > 0
    assert text.count("- '<") == sum(not node.accepted for node in nodes) > 0
    assert text.count("the target's token") == len(trace.passes)
    assert f"+ '<{next(n.token for n in nodes if n.accepted)}>'" in text
    assert text.startswith("".join(f"<{token}>" for token in answer.tokens[:2]))


def test_inspect_needs_something_to_write(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, _, err = run(capsys, "inspect", "photo.jpg", "-p", "What?")
    assert code == 2 and "--out" in err and "--text" in err
    code, _, err = run(capsys, "inspect", "photo.jpg", "-p", "What?", "--text", "--json")
    assert code == 2 and "leave out one" in err


@pytest.mark.slow
def test_the_command_writes_a_page(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    from msd.reference import sample_photos

    out = tmp_path / "trace.html"
    ask = ("inspect", sample_photos()[0], "-p", "Describe the image.", "--max-new-tokens", 24)
    code, output, err = run(capsys, *ask, "--out", out, "--json")
    assert code == 0, err
    answer, text = json.loads(output), out.read_text(encoding="utf-8")
    assert text.count('class="step"') == answer["steps"] and text.count("data:image/jpeg") == 1
    assert ">vision</i>" in text and answer["method"] == "msd+prompt-lookup"
    code, printed, err = run(capsys, *ask, "--text")
    assert code == 0, err
    assert printed.count("the target's token") == answer["steps"] and "vision" in printed
    code, _, err = run(capsys, *ask, "--out", tmp_path / "none" / "trace.html")
    assert code == 2 and "folder that exists" in err
