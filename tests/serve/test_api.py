"""The server as OpenAI's own client and a plain HTTP client see it."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi")
openai = pytest.importorskip("openai")
import httpx2  # noqa: E402

from clips import write_clip, write_sound  # noqa: E402
from families import BY_NAME  # noqa: E402
from family_processor import FamilyProcessor, photos  # noqa: E402
from msd.config import SpeculativeConfig  # noqa: E402
from msd.model import SpeculativeVLM  # noqa: E402
from msd.serve.batch import Batch  # noqa: E402
from msd.serve.media import Decoder  # noqa: E402
from msd.serve.scheduler import Scheduler  # noqa: E402
from msd.streaming import request_lock  # noqa: E402
from serve.server import NAME, asks, data_uri, engine, picture, running  # noqa: E402

VLM = engine()
CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[str, Scheduler]]:
    with running(VLM, rows=4, waiting=32) as (address, _, scheduler):
        yield address, scheduler


@pytest.fixture
def client(served: tuple[str, Scheduler]) -> Any:
    return openai.OpenAI(base_url=f"{served[0]}/v1", api_key="none", max_retries=0).chat.completions


def wanted(messages: list[dict[str, Any]], seed: int = 0, **options: Any) -> Any:
    """The answer of `SpeculativeVLM.generate` alone."""
    return VLM.generate(messages=messages, seed=[seed], **options)


def test_an_answer_is_that_of_generate(client: Any) -> None:
    messages = asks("What is it?", data_uri(picture(1)), data_uri(picture(2)))
    answer = client.create(model=NAME, messages=messages, temperature=0, max_tokens=20)
    alone = wanted(messages, max_new_tokens=20)
    assert answer.choices[0].message.content == alone.text
    assert answer.choices[0].finish_reason == {"eos": "stop", "length": "length"}[alone.finish]
    assert answer.usage.completion_tokens == len(alone.tokens)
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + len(alone.tokens)
    counted, extra = answer.model_extra["metrics"]["speculative_decoding"], answer.model_extra["msd"]
    assert 0 <= counted["num_accepted_tokens"] <= counted["num_draft_tokens"]
    assert counted["mean_acceptance_length"] == pytest.approx(alone.statistics.mean_acceptance_length)
    assert extra["method"] == "prompt-lookup"
    kinds = extra["drafts_by_modality"]
    assert set(kinds) <= {"language"}  # this drafter has one subtree
    for name, total in (("drafted", "num_draft_tokens"), ("accepted", "num_accepted_tokens")):
        assert sum(of[name] for of in kinds.values()) == counted[total]


def test_a_video_is_read_as_generate_reads_it(client: Any, tmp_path: Path) -> None:
    """This model takes images only, so it sees the frames as images."""
    path = write_clip(tmp_path / "a.mp4", range(20))
    parts = [{"type": "video_url", "video_url": {"url": data_uri(path.read_bytes(), "video/mp4")}}]
    text = {"type": "text", "text": "What moves?"}
    answer = client.create(
        model=NAME, messages=[{"role": "user", "content": [*parts, text]}], temperature=0, max_tokens=12
    )
    alone = wanted([{"role": "user", "content": [{"type": "video", "video": str(path)}, text]}], max_new_tokens=12)
    assert answer.choices[0].message.content == alone.text
    with pytest.raises(openai.BadRequestError, match="video 1: it is not a readable video file"):
        parts[0]["video_url"]["url"] = data_uri(b"\x00\x00\x00\x18ftypmp42" + b"x" * 99)
        client.create(model=NAME, messages=[{"role": "user", "content": [*parts, text]}])


def test_sounds_reach_a_model_that_takes_them(client: Any, tmp_path: Path) -> None:
    family = BY_NAME["qwen2_5_omni_thinker"]
    processor = FamilyProcessor(family)
    processor.tokenizer.all_special_tokens = []  # type: ignore[attr-defined]
    vlm = SpeculativeVLM(family.make(), processor, SpeculativeConfig(adaptive=False), "prompt-lookup")
    image, sounds = photos(family, tmp_path, 1)[0], []
    for hertz, kind in ((440.0, "wav"), (1760.0, "mp3")):
        sounds.append(write_sound(tmp_path / f"{hertz}.{kind}", hertz=hertz))
    encoded = [data_uri(path.read_bytes()) for path in (image, *sounds)]

    def parts(order: tuple[int, int]) -> list[dict[str, Any]]:
        heard = [
            {"type": "input_audio", "input_audio": {"data": encoded[1 + i].split(",")[1], "format": ("wav", "mp3")[i]}}
            for i in order
        ]
        return [{"type": "image_url", "image_url": {"url": encoded[0]}}, *heard, {"type": "text", "text": "What?"}]

    texts = []
    with running(vlm) as (address, _, _):
        remote = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0).chat.completions
        for order in ((0, 1), (1, 0)):
            message = {"role": "user", "content": parts(order)}
            answer = remote.create(model=NAME, messages=[message], temperature=0, max_tokens=12)
            texts.append(answer.choices[0].message.content)
            local = [{"type": "audio", "path": str(sounds[i])} for i in order]
            shown = [{"type": "image", "path": str(image)}, *local, {"type": "text", "text": "What?"}]
            assert texts[-1] == vlm.generate(messages=[{"role": "user", "content": shown}], max_new_tokens=12).text
        wrong = parts((0, 1))
        wrong[1]["input_audio"]["format"] = "mp3"
        with pytest.raises(openai.BadRequestError, match="audio 2 is not in the format"):
            remote.create(model=NAME, messages=[{"role": "user", "content": wrong}])
    assert texts[0] != texts[1]
    with pytest.raises(openai.BadRequestError, match="takes no sounds"):
        client.create(model=NAME, messages=[{"role": "user", "content": parts((0, 1))}])


def test_a_stream_gives_the_same_text_and_the_usage(client: Any) -> None:
    settings = {"model": NAME, "messages": asks("Say it."), "seed": 7, "temperature": 0.8, "max_tokens": 24}
    whole = client.create(**settings)
    chunks = list(client.create(**settings, stream=True, stream_options={"include_usage": True}))
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == whole.choices[0].message.content
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert chunks[-1].choices == [] and all(chunk.usage is None for chunk in chunks[:-1])
    assert {"metrics", "msd"} <= chunks[-1].model_extra.keys()
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == whole.choices[0].finish_reason
    alone = wanted(settings["messages"], 7, max_new_tokens=24, do_sample=True, temperature=0.8, top_p=1.0, top_k=0)
    assert whole.choices[0].message.content == alone.text


def test_several_answers_turns_and_logprobs(client: Any) -> None:
    turns = [*asks("One"), {"role": "assistant", "content": "two"}, *asks("Three?")]
    answer = client.create(
        model=NAME, messages=turns, n=3, seed=5, temperature=1.2, max_completion_tokens=6, logprobs=True, top_logprobs=2
    )
    options = {"max_new_tokens": 6, "do_sample": True, "temperature": 1.2, "top_k": 0}
    assert [c.message.content for c in answer.choices] == [wanted(turns, 5 + i, **options).text for i in range(3)]
    for token in answer.choices[1].logprobs.content:
        assert token.logprob <= token.top_logprobs[0].logprob <= 0.0
        assert token.top_logprobs[0].logprob >= token.top_logprobs[1].logprob
    greedy = client.create(model=NAME, messages=turns, temperature=0, max_tokens=6, logprobs=True, top_logprobs=1)
    assert all(t.token == t.top_logprobs[0].token for t in greedy.choices[0].logprobs.content)


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_ends_the_text_before_it(client: Any, stream: bool) -> None:
    settings = {"model": NAME, "messages": asks("Go on"), "temperature": 0, "max_tokens": 24}
    text = client.create(**settings).choices[0].message.content
    stop = text[5:8]
    answer = client.create(**settings, stop=["\x00never", stop], stream=stream)
    if stream:
        choices = [c.choices[0] for c in answer]
        assert "".join(c.delta.content or "" for c in choices) == text[: text.index(stop)]
        assert choices[-1].finish_reason == "stop"
    else:
        assert answer.choices[0].message.content == text[: text.index(stop)]
        assert answer.choices[0].finish_reason == "stop"


def test_a_request_chooses_not_to_be_drafted(client: Any) -> None:
    """Beside one that is: the answers are the same, and only one has drafts."""
    messages, found = asks("la la la la la la"), {}

    def ask(method: str) -> None:
        answer = client.create(
            model=NAME, messages=messages, temperature=0, max_tokens=60, extra_body={"msd": {"method": method}}
        )
        found[method] = answer.choices[0].message.content, answer.model_extra

    with request_lock(VLM.model):  # both join before the first step
        threads = [threading.Thread(target=ask, args=(method,)) for method in ("ar", "prompt-lookup")]
        for thread in threads:
            thread.start()
    for thread in threads:
        thread.join(60)
    assert found["ar"][0] == found["prompt-lookup"][0] == wanted(messages, max_new_tokens=60).text
    drafted = {name: more["metrics"]["speculative_decoding"]["num_draft_tokens"] for name, (_, more) in found.items()}
    assert drafted["ar"] == 0 < drafted["prompt-lookup"]
    assert all(more["msd"]["method"] == name for name, (_, more) in found.items())
    assert "divergence" not in found["ar"][1]["msd"]


@pytest.mark.parametrize("policy, epsilon", [("budget", 0.3), ("threshold", None)])
def test_a_request_chooses_a_lossy_policy(
    served: tuple[str, Scheduler], client: Any, policy: str, epsilon: float | None
) -> None:
    """It gets the answer of an engine with that policy, although others run at the same time, which get theirs."""
    messages = asks("la la la la la la", data_uri(picture(1)))
    options = {"temperature": 0.3, "seed": 4, "max_tokens": 60}
    msd = {"policy": policy} if epsilon is None else {"policy": policy, "epsilon": epsilon}
    found: dict[str, Any] = {}

    def ask(name: str, more: dict[str, Any]) -> None:
        found[name] = client.create(model=NAME, messages=messages, **options, extra_body=more)

    work = [("lossless", {}), ("lossy", {"msd": msd}), ("other", {})]
    threads = [threading.Thread(target=ask, args=one) for one in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    sampled = {"do_sample": True, "temperature": 0.3, "top_p": 1.0, "top_k": 0, "max_new_tokens": 60}
    config = SpeculativeConfig(adaptive=False, verifier=policy, epsilon=epsilon or 0.0)
    alone = SpeculativeVLM(VLM.model, VLM.processor, config, "prompt-lookup").generate(
        messages=messages, seed=[4], **sampled
    )
    exact = wanted(messages, 4, **sampled)
    assert alone.tokens != exact.tokens  # the policy has spent something
    assert found["lossy"].choices[0].message.content == alone.text
    assert found["lossless"].choices[0].message.content == found["other"].choices[0].message.content == exact.text
    said = found["lossy"].model_extra["msd"]
    assert (said["policy"], said["epsilon"]) == (policy, epsilon or 0.0)
    assert said["divergence"]["by_modality"]["language"] == pytest.approx(
        alone.statistics.as_dict()["divergence"]["by_modality"]["language"]
    )
    assert 0 < said["divergence"]["per_token"] <= (epsilon or 1.0)
    greedy = client.create(model=NAME, messages=messages, temperature=0, max_tokens=9, extra_body={"msd": msd})
    assert greedy.model_extra["msd"]["divergence"]["total"] == 0.0
    assert greedy.choices[0].message.content == wanted(messages, max_new_tokens=9).text


def test_clients_at_once_get_the_answers_they_get_alone(served: tuple[str, Scheduler], client: Any) -> None:
    uris = [data_uri(picture(i % 3)) for i in range(8)]
    messages = [asks(f"Question {i}?" * (1 + i % 3), *uris[i : i + i % 2]) for i in range(8)]
    options = [{"temperature": 0.0} if i % 2 else {"temperature": 0.9, "seed": i} for i in range(8)]
    texts: dict[int, str] = {}

    def ask(i: int) -> None:
        answer = client.create(model=NAME, messages=messages[i], max_tokens=10 + i, **options[i])
        texts[i] = answer.choices[0].message.content

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    for i in range(8):
        sampled = {} if i % 2 else {"do_sample": True, "temperature": 0.9, "top_k": 0}
        assert texts[i] == wanted(messages[i], i, max_new_tokens=10 + i, **sampled).text


BODY: dict[str, Any] = {"model": NAME, "messages": asks("Hi"), "max_tokens": 4}


def test_null_is_the_default(client: Any) -> None:
    nothing = dict.fromkeys(("stop", "seed", "top_p", "n", "stream", "logprobs", "tools", "max_completion_tokens"))
    messages = asks("Hi")
    answer = client.create(model=NAME, messages=messages, temperature=0, max_tokens=8, extra_body=nothing)
    assert answer.choices[0].message.content == wanted(messages, max_new_tokens=8).text


@pytest.mark.parametrize(
    "change, status, said",
    [
        ({"model": "gpt-4"}, 404, "this server has the model 'tiny'"),
        ({"tools": []}, 400, "tools: is not supported"),
        ({"logit_bias": {"1": 2}}, 400, "logit_bias: is not supported"),
        ({"temperature": 3}, 400, "less than or equal to 2"),
        ({"temperature": 1e-45}, 400, "must be 0, or at least 1e-06"),
        ({"messages": [{"role": "user", "content": "x" * 9000}] * 2}, 400, "has 18000 characters; at most 8192"),
        ({"msd": {"policy": "\ud800"}}, 400, "msd.policy"),
        ({"model": "\ud800"}, 400, "model"),
        ({"n": 99}, 400, "n: "),
        ({"presence_penalty": 0.5}, 400, "presence_penalty"),
        ({"top_logprobs": 3}, 400, "top_logprobs needs logprobs"),
        ({"messages": []}, 400, "messages"),
        ({"messages": [{"role": "user", "content": " "}]}, 400, "is empty"),
        ({"messages": asks("a <image> b")}, 400, "'<image>'"),
        ({"messages": asks("a</s>b")}, 400, "'</s>'"),
        ({"max_tokens": 100_000}, 400, "do not fit the model's context"),
        ({"msd": {"method": "msd"}}, 400, "drafts with 'prompt-lookup', or with 'ar' not at all"),
        ({"msd": {"policy": "any"}}, 400, "unknown verifier 'any'; known: lossless"),
        ({"msd": {"epsilon": 0.1}}, 400, "verifier 'lossless' has no epsilon; choose 'budget'"),
        ({"msd": {"policy": "budget", "epsilon": 2}}, 400, "epsilon 2.0 is outside [0, 1]"),
        ({"msd": {"thresholds": {}}}, 400, "msd.thresholds: is not supported"),
        ({"stop": ["a"] * 5}, 400, "5 stop strings"),
    ],
)
def test_what_is_not_supported_is_refused(
    served: tuple[str, Scheduler], change: dict[str, Any], status: int, said: str
) -> None:
    body = json.dumps({**BODY, **change})  # httpx2 itself refuses half a character
    answer = httpx2.post(served[0] + CHAT, content=body, headers={"content-type": "application/json"})
    assert answer.status_code == status
    error = answer.json()["error"]
    assert said in error["message"]
    assert set(error) == {"message", "type", "param", "code"}


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"null", b'{"model": 1}', b"\xff\xfe", b"[" * 50_000])
def test_malformed_bodies_are_refused(served: tuple[str, Scheduler], body: bytes) -> None:
    answer = httpx2.post(served[0] + CHAT, content=body, headers={"content-type": "application/json"})
    assert 400 <= answer.status_code < 500
    assert answer.json()["error"]["message"]
    assert "Traceback" not in answer.text


def test_the_status_of_the_server(served: tuple[str, Scheduler]) -> None:
    address = served[0]
    assert httpx2.get(f"{address}/v1/models").json()["data"][0]["id"] == NAME
    assert httpx2.get(f"{address}/v1/models/other").json()["error"]["code"] == "model_not_found"
    assert httpx2.get(f"{address}/health/live").status_code == httpx2.get(f"{address}/health/ready").status_code == 200
    assert "version" in httpx2.get(f"{address}/version").json()
    before = metric(address, "generation_tokens_total")
    answer = httpx2.post(address + CHAT, json=BODY, timeout=60).json()
    assert metric(address, "generation_tokens_total") - before == answer["usage"]["completion_tokens"]
    shown = {**BODY, "messages": asks("Hi", data_uri(picture(77)))}
    names = ("mm_cache_queries_total", "mm_cache_hits_total", "prefix_cache_queries_total", "prefix_cache_hits_total")
    found = [[metric(address, name) for name in names]]
    for _ in range(2):
        prompt = httpx2.post(address + CHAT, json=shown, timeout=60).json()["usage"]["prompt_tokens"]
        found.append([metric(address, name) for name in names])
    first, second = ([b - a for a, b in zip(*pair, strict=True)] for pair in pairwise(found))
    assert first[:3] == [1, 0, prompt] and second[:3] == [1, 1, prompt]
    assert 0 <= first[3] < second[3] == prompt - 1
    accepted = metric(address, "spec_decode_num_accepted_tokens_total")
    assert sum(metrics(address, "spec_decode_num_accepted_tokens_per_pos_total")) == accepted
    assert metric(address, "request_queue_time_seconds_count") >= 3
    assert httpx2.get(f"{address}/nothing").json()["error"]["type"] == "not_found_error"
    assert httpx2.get(f"{address}/version").headers["x-content-type-options"] == "nosniff"


def metric(address: str, name: str) -> float:
    return metrics(address, name)[0]


def metrics(address: str, name: str) -> list[float]:
    lines = httpx2.get(f"{address}/metrics").text.splitlines()
    return [float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(f"vllm:{name}")]


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_ends_its_request(served: tuple[str, Scheduler], stream: bool) -> None:
    address, scheduler = served
    body = {**BODY, "max_tokens": 400, "stream": stream}
    steps = scheduler.steps
    with request_lock(VLM.model):  # no step is computed meanwhile
        if stream:
            with httpx2.stream("POST", address + CHAT, json=body) as answer:
                next(answer.iter_lines())
        else:
            with pytest.raises(httpx2.ReadTimeout):
                httpx2.post(address + CHAT, json=body, timeout=0.5)
        wait(lambda: all(job.cancelled for job in scheduler._waiting))
    wait(lambda: not scheduler.waiting)
    assert scheduler.steps == steps
    assert 'finished_reason="cancelled"' in httpx2.get(f"{address}/metrics").text


def test_a_client_that_leaves_before_its_stream_begins_ends_its_request(
    served: tuple[str, Scheduler], monkeypatch: pytest.MonkeyPatch
) -> None:
    address, scheduler = served
    host, port = address.removeprefix("http://").split(":")
    decoding, left, decode = threading.Event(), threading.Event(), Decoder.medium

    def waits(*arguments: Any) -> Any:
        decoding.set()
        left.wait(60)
        return decode(*arguments)

    monkeypatch.setattr(Decoder, "medium", waits)
    body = json.dumps({**BODY, "messages": asks("Hi", data_uri(picture(8))), "max_tokens": 400, "stream": True})
    with request_lock(VLM.model):  # no step is computed meanwhile
        with socket.create_connection((host, int(port))) as gone:
            head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
            gone.sendall(f"{head}\r\n\r\n{body}".encode())
            assert decoding.wait(60)
        httpx2.get(f"{address}/health/live")  # the server has seen the end of the connection before this one
        left.set()
        wait(lambda: bool(scheduler._waiting) and all(job.cancelled for job in scheduler._waiting))


def wait(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


def test_a_full_server_says_when_to_come_back() -> None:
    with running(VLM, rows=1, waiting=1) as (address, _, scheduler):
        first = threading.Thread(target=httpx2.post, args=(address + CHAT,), kwargs={"json": BODY, "timeout": 60})
        with request_lock(VLM.model):
            first.start()
            wait(lambda: scheduler.waiting == 1)
            second = httpx2.post(address + CHAT, json=BODY, timeout=60)
        first.join(60)
        assert second.status_code == 429
        assert int(second.headers["retry-after"]) >= 1
        assert second.json()["error"]["code"] == "queue_full"
        assert httpx2.post(address + CHAT, json=BODY, timeout=60).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_that_waits_too_long_gets_an_error(served: tuple[str, Scheduler], stream: bool) -> None:
    address, scheduler = served
    found: list[Any] = []
    body = {**BODY, "stream": stream}
    asking = threading.Thread(target=lambda: found.append(httpx2.post(address + CHAT, json=body, timeout=60)))
    with request_lock(VLM.model):  # no step is computed meanwhile
        asking.start()
        wait(lambda: scheduler.waiting == 1)
        scheduler._waiting[0].arrival -= 1e6
    asking.join(60)
    assert found[0].status_code == (200 if stream else 504)  # a stream has begun by then
    assert '"code":"deadline"' in found[0].text.replace(" ", "")
    assert "[DONE]" not in found[0].text


def test_a_late_answer_ends_with_what_it_has(client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    step = Batch.step

    def makes_late(batch: Batch[Any]) -> Any:
        emitted = step(batch)
        for job in batch.members:
            job.arrival -= 1e6
        return emitted

    monkeypatch.setattr(Batch, "step", makes_late)
    answer = client.create(model=NAME, messages=BODY["messages"], temperature=0, max_tokens=400)
    assert answer.choices[0].finish_reason == "length"
    assert 2 <= answer.usage.completion_tokens <= 2 * (1 + VLM.config.depth)
    assert wanted(BODY["messages"], max_new_tokens=400).text.startswith(answer.choices[0].message.content)


def test_keys_are_needed_everywhere_but_for_health() -> None:
    with running(VLM, keys=("sesame", "open")) as (address, _, _):
        for headers, status in (
            ({}, 401), ({"Authorization": "Bearer sesam"}, 401), ({"Authorization": "Basic sesame"}, 401),
            ({"Authorization": "Bearer open"}, 200),
        ):  # fmt: skip
            assert httpx2.get(f"{address}/v1/models", headers=headers).status_code == status
        assert httpx2.get(f"{address}/health/live").status_code == 200
