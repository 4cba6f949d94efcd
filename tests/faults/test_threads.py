"""Several threads at one model: every answer is the one that a request gets alone, and none waits for ever."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

import tiny
import tiny_checkpoint
from msd import drafters
from msd.config import SpeculativeConfig
from msd.errors import UserError
from msd.model import SpeculativeVLM
from msd.targets import adapt
from msd.targets.vision import VisionCache

pytestmark = pytest.mark.alone

NEW = 12
GREEDY: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False}
TEMPLATE = (
    "{% for m in messages %}{% for p in m['content'] %}{% if p['type'] == 'image' %}<image>{% else %}{{ p['text'] }}"
    "{% endif %}{% endfor %}|{% endfor %}"
)
PROMPTS = [tiny.llava_inputs(seed, images=seed % 2, words=6 + seed) for seed in range(8)]


def at_once(*work: Callable[[], Any]) -> list[Any]:
    """What the pieces of work give, all done at the same time; their errors are raised, and a wait for ever is one."""
    results: list[Any] = [None] * len(work)
    errors: list[BaseException] = []
    begin = threading.Barrier(len(work))

    def run(index: int) -> None:
        try:
            begin.wait()
            results[index] = work[index]()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(i,), daemon=True) for i in range(len(work))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive(), "waits for ever"
    if errors:
        raise errors[0]
    return results


@cache
def own_answers() -> list[list[int]]:
    model = tiny.llava()
    return [model.generate(**p, **GREEDY)[0, p["input_ids"].shape[1] :].tolist() for p in PROMPTS]


def engine(model: Any, backend: str = "fused", method: str = "prompt-lookup", taps: Sequence[int] = ()) -> Any:
    drafter = drafters.create(method)
    drafter.taps = tuple(taps)
    return SpeculativeVLM(model, None, SpeculativeConfig(backend=backend), drafter)


def answers(vlm: Any, prompts: Sequence[dict[str, Tensor]] = PROMPTS) -> list[list[int]]:
    return [vlm.generate(**p, **GREEDY).tokens for p in prompts]


@pytest.mark.parametrize("backend", ["plain", "fused"])
def test_engines_of_one_model_and_the_library_beside_them(backend: str) -> None:
    model = tiny.llava()
    first = engine(model, backend, taps=(1, 3))
    second = engine(model, backend, "ar", taps=(0, 2))
    second.target.vision = first.target.vision

    def library() -> list[list[int]]:
        return [model.generate(**p, **GREEDY)[0, p["input_ids"].shape[1] :].tolist() for p in PROMPTS]

    found = at_once(*(lambda e=e: answers(e) for e in (first, second, first.with_method("ar"))), library, library)
    assert found == [own_answers()] * 5
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.get_decoder().modules())
    assert all("forward" not in vars(m) for m in model.modules())


def test_requests_and_streams_at_once_on_one_engine(tmp_path: Path) -> None:
    processor = tiny_checkpoint.processor()
    names = tiny_checkpoint.photos(tmp_path, 4)
    vlm = SpeculativeVLM(
        tiny.llava(len(tiny_checkpoint.SPECIAL) + 256, sharpness=10.0), processor, drafter="prompt-lookup"
    )
    asked = [(str(tmp_path / names[i % 4]), "Say " + "more " * i) for i in range(8)]

    def ask(shown: str, prompt: str) -> list[str]:
        texts = [vlm.generate(shown, prompt, max_new_tokens=NEW).text for _ in range(3)]
        both = vlm.generate([[shown], [shown]], [prompt, "Why?"], max_new_tokens=NEW)  # padded by the tokenizer
        return [*texts, *(r.text for r in both), "".join(vlm.stream(shown, prompt, max_new_tokens=NEW))]

    alone = [ask(*one) for one in asked]
    assert at_once(*(lambda one=one: ask(*one) for one in asked)) == alone


def test_chats_at_once(tmp_path: Path) -> None:
    processor = tiny_checkpoint.processor()
    processor.chat_template = TEMPLATE
    photo = str(tmp_path / tiny_checkpoint.photos(tmp_path, 1)[0])
    vlm = SpeculativeVLM(
        tiny.llava(len(tiny_checkpoint.SPECIAL) + 256, sharpness=10.0), processor, drafter="prompt-lookup"
    )

    def talk(word: str) -> list[str]:
        chat = vlm.chat()
        first = chat.say(word, photo, max_new_tokens=NEW).text
        return [first, "".join(chat.stream(word * 2, max_new_tokens=NEW)), chat.say(word, max_new_tokens=NEW).text]

    alone = [talk(word) for word in ("a", "be", "see", "dee")]
    assert at_once(*(lambda word=word: talk(word) for word in ("a", "be", "see", "dee"))) == alone


@pytest.mark.parametrize("backend", ["plain", "fused"])
def test_taps_record_nobody_elses_pass(backend: str) -> None:
    target = adapt(tiny.llava(), (0, 2, 3), backend=backend)
    ids, others = torch.arange(4, 9)[None], torch.arange(9, 20)[None]

    def elsewhere() -> None:
        target.model(input_ids=others)
        with target.recording() as theirs:
            target.model(input_ids=others)
        assert theirs.take() is not None

    with torch.no_grad(), target.recording() as recorded:
        target.model(input_ids=ids)
        expected = recorded.take()
        target.model(input_ids=ids)
        at_once(elsewhere)
        found = recorded.take()
    assert found is not None and expected is not None and torch.equal(found, expected)


def test_pictures_at_once_are_encoded_as_alone() -> None:
    model, cache = tiny.llava(), VisionCache(limit=2)
    pictures = [{"pixel_values": torch.randn(2, 3, 16, 16)} for _ in range(4)]

    def features() -> list[Tensor]:
        with torch.no_grad():
            return [
                cache.encode(model, p)["mm_encoder_outputs"]["image"].pooler_output for _ in range(4) for p in pictures
            ]

    alone = features()
    for found in at_once(*[features] * 6):
        for ours, theirs in zip(found, alone, strict=True):
            torch.testing.assert_close(ours, theirs)


class Asks(BaseStreamer):
    """A processor, a criterion and a streamer that asks a question at its third call."""

    def __init__(self, ask: Callable[[], Any], stops: bool = False) -> None:
        self.ask, self.stops, self.calls, self.answers = ask, stops, 0, []

    def _call(self) -> None:
        self.calls += 1
        if self.calls == 3:
            self.answers.append(self.ask())

    def __call__(self, input_ids: Tensor, scores: Any) -> Any:
        self._call()
        return torch.zeros(len(input_ids), dtype=torch.bool) if self.stops else scores

    def put(self, value: Tensor) -> None:
        self._call()

    def end(self) -> None:
        pass


@pytest.mark.parametrize("backend", ["plain", "fused"])
@pytest.mark.parametrize("place", ["logits_processor", "stopping_criteria", "streamer", "hook"])
@pytest.mark.parametrize("way", ["generate", "stream", "library", "other engine"])
def test_a_request_inside_a_request(backend: str, place: str, way: str) -> None:
    processor = tiny_checkpoint.processor()
    model = tiny.llava()
    vlm = engine(model, backend, taps=(1, 3))
    vlm.processor = processor
    other = vlm.with_method("ar")

    def ask() -> list[int]:
        if way == "library":
            return model.generate(**PROMPTS[3], **GREEDY)[0, PROMPTS[3]["input_ids"].shape[1] :].tolist()
        if way == "stream":
            stream = vlm.stream(**PROMPTS[3], **GREEDY)
            list(stream)
            return stream.result.tokens
        return (vlm if way == "generate" else other).generate(**PROMPTS[3], **GREEDY).tokens

    asks = Asks(ask, place == "stopping_criteria")
    if place == "hook":
        model.get_decoder().layers[1].register_forward_hook(lambda *_: asks._call())
        settings: dict[str, Any] = {}
    else:
        settings = {place: asks if place == "streamer" else [asks]}
    (found,) = at_once(lambda: vlm.generate(**PROMPTS[5], **GREEDY, **settings))
    assert found.tokens == own_answers()[5]
    assert asks.answers == [own_answers()[3]]


def test_a_stream_read_by_its_own_generation_is_refused() -> None:
    vlm = engine(tiny.llava())
    vlm.processor = tiny_checkpoint.processor()
    streams: list[Any] = []

    def read() -> None:
        with pytest.raises(UserError, match="its own stream"):
            list(streams[0])
        streams[0].close()

    streams.append(vlm.stream(**PROMPTS[1], max_new_tokens=40, do_sample=False, logits_processor=[Asks(read)]))
    (texts,) = at_once(lambda: list(streams[0]))
    assert texts and streams[0].result.finish == "criteria"
