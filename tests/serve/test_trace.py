"""What the page asks of the server: steps with their trees, answers without drafts, and the gain of an image."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("fastapi")
import httpx2

import tiny_checkpoint
from msd.inputs.prompts import prepare
from msd.inspect import Trace
from msd.labels.gain import gain_of_blocks, image_gain
from msd.result import Result
from msd.serve.scheduler import Scheduler
from msd.serve.trace import TokenTexts
from msd.serve.work import WAITING
from msd.streaming import request_lock
from serve.routed import routed
from serve.server import NAME, asks, data_uri, picture, running

VLM = routed()
CHAT, GAIN = "/v1/chat/completions", "/v1/msd/gain"
METHOD = "msd+prompt-lookup"
PHOTO = asks("What is it?", data_uri(picture(1)))


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[str, Scheduler]]:
    with running(VLM, rows=4, waiting=32) as (address, _, scheduler):
        yield address, scheduler


def post(address: str, path: str, **body: Any) -> Any:
    return httpx2.post(address + path, json={"model": NAME, **body}, timeout=60)


def streamed(address: str, **body: Any) -> tuple[str, list[dict[str, Any]], list[dict[str, Any]]]:
    """(text, the steps, all events)."""
    answer = post(address, CHAT, messages=PHOTO, stream=True, max_tokens=48, temperature=0, **body)
    events = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]
    text = "".join(e["choices"][0]["delta"].get("content", "") for e in events if e["choices"])
    return text, [e["msd"]["step"] for e in events if "step" in e.get("msd", {})], events


def alone() -> tuple[Result, Trace]:
    trace = Trace()
    return VLM.generate(messages=PHOTO, max_new_tokens=48, on_step=trace), trace


def test_the_steps_are_those_that_inspect_records(served: tuple[str, Scheduler]) -> None:
    text, steps, _ = streamed(served[0], msd={"trace": True})
    answer, trace = alone()
    assert text == answer.text
    tokens = [token for step in steps for token in step["tokens"]]
    assert [token["id"] for token in tokens] == answer.tokens
    assert [token["modality"] for token in tokens] == answer.predicted_modality
    assert steps[0]["tree"] is None and len(steps) == len(trace.passes) + 1
    assert any(token["accepted"] for token in tokens) and not all(token["accepted"] for token in tokens)
    for step, recorded in zip(steps[1:], trace.passes, strict=True):
        nodes = step["tree"]["nodes"]
        assert [(n["parent"], n["modality"], n["accepted"]) for n in nodes] == [
            (n.parent, n.modality, n.accepted) for n in recorded.nodes
        ]
        assert [n["p"] for n in nodes] == pytest.approx([n.p for n in recorded.nodes], abs=1e-4)
        own = [n["text"] for n in nodes if n["accepted"]]
        assert [VLM.processor.tokenizer.decode([t["id"]]) for t in step["tokens"] if t["accepted"]] == own


def test_without_the_field_nothing_is_added(served: tuple[str, Scheduler]) -> None:
    text, steps, events = streamed(served[0])
    assert text == alone()[0].text and steps == []
    assert all(set(event) == {"id", "created", "model", "object", "choices"} for event in events)
    refused = post(served[0], CHAT, messages=PHOTO, msd={"trace": True})
    assert refused.status_code == 400 and "stream=true" in refused.json()["error"]["message"]


def test_token_texts_join_to_the_text() -> None:
    tokenizer = tiny_checkpoint.processor().tokenizer  # a token per byte
    for text in ("a plain text", "é 日本 🙂!", " x\n\ty"):
        texts, read = TokenTexts(tokenizer), []
        for token in tokenizer.encode(text, add_special_tokens=False):
            read.append(texts.read(token))
        assert "".join(read) == text


@pytest.mark.parametrize("settings", [{"temperature": 0}, {"temperature": 0.9, "seed": 3}])
def test_answers_with_and_without_drafts_at_once(served: tuple[str, Scheduler], settings: dict[str, Any]) -> None:
    address, scheduler = served
    answers: dict[int, Any] = {}

    def ask(number: int) -> None:
        method = {"method": "ar"} if number % 2 else {}
        answers[number] = post(address, CHAT, messages=PHOTO, max_tokens=20, msd=method, **settings).json()

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(4)]
    with request_lock(VLM.model):  # all are waiting when the first step begins
        for thread in threads:
            thread.start()
        wait(lambda: scheduler.waiting == 4)
    for thread in threads:
        thread.join(60)
    assert len({answer["choices"][0]["message"]["content"] for answer in answers.values()}) == 1
    for number, answer in answers.items():
        counted = answer["metrics"]["speculative_decoding"]
        assert (counted["num_draft_tokens"] == 0) == (number % 2 == 1)
        assert answer["msd"]["method"] == ("ar" if number % 2 else METHOD)


def wait(condition: Any) -> None:
    until = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


def test_the_gain_is_that_of_the_labels(served: tuple[str, Scheduler]) -> None:
    answer, _ = alone()
    measured = post(served[0], GAIN, messages=PHOTO, tokens=answer.tokens).json()
    inputs = prepare(VLM.processor, [[picture(1)]], ["What is it?"])
    assert measured["gain"] == pytest.approx(image_gain(VLM.target, inputs, [answer.tokens])[0].tolist(), abs=1e-4)
    assert max(measured["gain"]) > 0.01
    blocks = gain_of_blocks(VLM.target, inputs, answer.tokens, measured["side"])
    assert blocks is not None
    for row, wanted in zip(measured["blocks"], blocks.flatten(1).tolist(), strict=True):
        assert row == pytest.approx(wanted, abs=1e-4)


@pytest.mark.parametrize(
    "change, status, said",
    [
        ({"model": "other"}, 404, "this server has the model"),
        ({"messages": asks("no image")}, 400, "there is no image"),
        ({"tokens": [5, 9999]}, 400, "9999 is not an id"),
        ({"tokens": [-1]}, 400, "greater than or equal to 0"),
        ({"tokens": []}, 400, "tokens"),
        ({"tokens": [5] * 1025}, 400, "tokens"),
        ({"tokens": [5] * 600}, 400, "do not fit the model's context"),
        ({"tokens": [3]}, 400, "placeholder"),
        ({"messages": []}, 400, "messages"),
        ({"messages": asks("x", *[data_uri(picture())] * 17)}, 400, "at most 16"),
        ({"messages": asks("x", data_uri(b"no image"))}, 400, "image 1"),
        ({"seed": 1}, 400, "seed: is not supported"),
    ],
)
def test_a_gain_that_cannot_be_measured_is_refused(
    served: tuple[str, Scheduler], change: dict[str, Any], status: int, said: str
) -> None:
    answer = post(served[0], GAIN, **{"messages": PHOTO, "tokens": [5, 6], **change})
    assert answer.status_code == status
    assert said in answer.json()["error"]["message"]


def test_few_gains_wait_and_those_of_clients_that_left_are_not_measured(served: tuple[str, Scheduler]) -> None:
    address, scheduler = served
    answers: list[int] = []

    def measure() -> None:
        answers.append(post(address, GAIN, messages=PHOTO, tokens=[5, 6]).status_code)

    threads = [threading.Thread(target=measure) for _ in range(WAITING - 1)]
    with request_lock(VLM.model):  # nothing is computed meanwhile
        for thread in threads:
            thread.start()
        wait(lambda: len(scheduler._work) == WAITING - 1)
        with pytest.raises(httpx2.ReadTimeout):
            httpx2.post(address + GAIN, json={"model": NAME, "messages": PHOTO, "tokens": [5]}, timeout=0.5)
        wait(lambda: len(scheduler._work) == WAITING and scheduler._work[-1].cancelled)
        gone = scheduler._work[-1]
        assert post(address, GAIN, messages=PHOTO, tokens=[5]).status_code == 429
    for thread in threads:
        thread.join(60)
    wait(lambda: not scheduler._work)
    assert answers == [200] * (WAITING - 1)
    assert gone.passes.gi_frame is None  # closed before its first pass


def test_a_gain_is_measured_between_the_steps_of_an_answer(served: tuple[str, Scheduler]) -> None:
    """One pass after each step: 18 passes do not hold back an answer."""
    address, scheduler = served
    ended_at: list[int] = []
    clients = [
        threading.Thread(target=post, args=(address, GAIN), kwargs={"messages": PHOTO, "tokens": [5, 6]}),
        threading.Thread(target=streamed, args=(address,)),
    ]
    with request_lock(VLM.model):
        for client in clients:
            client.start()
        wait(lambda: len(scheduler._work) == scheduler.waiting == 1)
        steps, work = scheduler.steps, scheduler._work[0]
        receive = work.receive
        work.receive = lambda outcome: (ended_at.append(scheduler.steps), receive(outcome))
    for client in clients:
        client.join(60)
    assert ended_at[0] - steps >= 16  # the blocks


def test_the_settings_name_colours_for_every_label(served: tuple[str, Scheduler]) -> None:
    settings = httpx2.get(f"{served[0]}/v1/msd").json()
    assert settings["method"] == METHOD and settings["model"] == NAME
    assert {"language", "vision", "fusion"} <= set(settings["colours"])
    assert settings["events"] is False and settings["crop"] is False
