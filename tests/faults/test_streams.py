"""Streams that are interrupted, unread, read twice or slowly, and interrupted commands never hang or abort."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tiny
import tiny_checkpoint
from msd.config import SpeculativeConfig
from msd.errors import UserError
from msd.model import SpeculativeVLM
from msd.streaming import Stream

INPUTS = tiny.llava_inputs(images=1)
SPACE = tiny_checkpoint.processor().tokenizer.convert_tokens_to_ids("Ġ")


def spaced(input_ids: Tensor, scores: Tensor) -> Tensor:
    """A logits processor that ends a word from time to time, so that the stream has several pieces."""
    if input_ids.shape[1] % 3 == 0:
        scores = scores.index_fill(1, torch.tensor([SPACE]), 1e4)
    return scores


LONG: dict[str, Any] = {
    "max_new_tokens": 60, "do_sample": False, "eos_token_id": None, "logits_processor": [spaced],
}  # fmt: skip
SLOWLY = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a test run in the background inherits that it is ignored
from msd.planning.plan import Plan
budget = Plan.budget
Plan.budget = lambda *given: (time.sleep(0.05), budget(*given))[1]
from msd.cli import main
main(sys.argv[1:])
"""


@pytest.fixture(scope="module")
def vlm() -> SpeculativeVLM:
    model = tiny.llava(len(tiny_checkpoint.SPECIAL) + 256, sharpness=10.0)
    return SpeculativeVLM(model, tiny_checkpoint.processor(), SpeculativeConfig(backend="plain"), "prompt-lookup")


def begun(vlm: SpeculativeVLM, **settings: Any) -> Stream:
    """A stream after its first piece."""
    stream = vlm.stream(**INPUTS, **LONG, **settings)
    next(iter(stream))
    return stream


def answers(vlm: SpeculativeVLM, seconds: float = 20) -> None:
    """A new request is answered without waiting."""
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(vlm.generate(**INPUTS, **LONG)), daemon=True)
    thread.start()
    thread.join(seconds)
    assert found and len(found[0].tokens) == 60


def test_a_loop_left_by_break_or_error_blocks_no_request(vlm: SpeculativeVLM) -> None:
    threads = threading.active_count()
    for _ in vlm.stream(**INPUTS, **LONG):
        break
    left = begun(vlm)
    with pytest.raises(ZeroDivisionError):
        for _ in vlm.stream(**INPUTS, **LONG):
            raise ZeroDivisionError
    vlm.stream(**INPUTS, **LONG)  # never read
    assert threading.active_count() == threads, "nothing runs in the background"
    answers(vlm)
    assert not left._over, "and it can still be gone on with"
    assert "".join(left) == vlm.generate(**INPUTS, **LONG).text == left.result.text


def test_reading_again_gives_the_pieces_again(vlm: SpeculativeVLM) -> None:
    stream = begun(vlm)
    pieces = list(stream)
    assert list(stream) == pieces == list(stream) and "".join(pieces) == stream.result.text


def test_a_result_before_the_end_is_refused(vlm: SpeculativeVLM) -> None:
    stream = begun(vlm)
    with pytest.raises(UserError, match="has not ended; read it to its end or close"):
        _ = stream.result
    stream.close()
    assert stream.result.finish == "criteria" and "".join(stream) == stream.result.text
    unread = vlm.stream(**INPUTS, **LONG)
    unread.close()
    assert len(unread.result.tokens) == 1
    unread.close()


def test_an_error_is_raised_once(vlm: SpeculativeVLM) -> None:
    calls = []

    def fails(ids: Any, scores: Any) -> Any:
        calls.append(1)
        if len(calls) == 9:
            raise ZeroDivisionError
        return scores

    stream = vlm.stream(**INPUTS, **{**LONG, "logits_processor": [spaced, fails]})
    with pytest.raises(ZeroDivisionError):
        list(stream)
    assert "".join(stream) == "".join(stream), "what was made before"
    stream.close()
    with pytest.raises(UserError, match="failed; it has no result"):
        _ = stream.result
    answers(vlm)


def test_a_stream_as_a_context(vlm: SpeculativeVLM) -> None:
    with vlm.stream(**INPUTS, **LONG) as stream:
        next(iter(stream))
    assert 0 < len(stream.result.tokens) < 60
    with pytest.raises(KeyboardInterrupt), vlm.stream(**INPUTS, **LONG) as stream:
        next(iter(stream))
        raise KeyboardInterrupt
    assert list(stream), "what was made before, and no more"
    with pytest.raises(UserError, match="no result"):
        _ = stream.result
    answers(vlm)


def test_two_streams_in_turn_and_a_request_between_their_steps(vlm: SpeculativeVLM) -> None:
    one, other = iter(vlm.stream(**INPUTS, **LONG)), iter(vlm.stream(**INPUTS, **LONG))
    texts = ["", ""]
    for a, b in zip(one, other, strict=True):
        if not texts[0]:
            answers(vlm)
        texts[0] += a
        texts[1] += b
    assert texts == [vlm.generate(**INPUTS, **LONG).text] * 2


def test_closing_from_another_thread_ends_a_slow_reader(vlm: SpeculativeVLM) -> None:
    stream, read = vlm.stream(**INPUTS, **LONG), []
    thread = threading.Thread(target=lambda: read.extend(p for p in stream if not time.sleep(0.05)), daemon=True)
    thread.start()
    while not read:
        time.sleep(0.01)
    stream.close()
    thread.join(20)
    assert not thread.is_alive() and "".join(read) == stream.result.text
    assert len(stream.result.tokens) < 60


def test_two_readers_read_the_same(vlm: SpeculativeVLM) -> None:
    stream = vlm.stream(**INPUTS, **LONG)
    read: list[list[str]] = [[], []]
    threads = [threading.Thread(target=lambda r=r: r.extend(stream), daemon=True) for r in read]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert read[0] == read[1] and "".join(read[0]) == stream.result.text


def test_the_time_of_a_slow_reader_is_not_that_of_the_answer(vlm: SpeculativeVLM) -> None:
    stream = vlm.stream(**INPUTS, **{**LONG, "max_new_tokens": 4})
    slept = 0
    for _ in stream:
        time.sleep(2)
        slept += 2
    assert stream.result.seconds < slept


def test_a_closed_turn_is_added_and_an_unfinished_one_is_not(vlm: SpeculativeVLM) -> None:
    vlm.processor.chat_template = (
        "{% for m in messages %}{% for p in m['content'] %}{{ p['text'] }}{% endfor %}|{% endfor %}"
    )
    chat = vlm.chat()
    for _ in chat.stream("what", **LONG):
        break
    assert not chat.messages
    closed = chat.stream("what", **LONG)
    next(iter(closed))
    closed.close()
    assert len(chat.messages) == 2
    assert chat.say("why", **LONG).text


def test_interrupted_commands_end_cleanly(tmp_path: Path) -> None:
    target = tiny_checkpoint.write(tmp_path / "target")
    photo = tiny_checkpoint.photos(tmp_path, 1)[0]
    command = [
        sys.executable, "-c", SLOWLY, "generate", str(tmp_path / photo), "-p", "Say.", "--target", str(target),
        "--method", "prompt-lookup", "--max-new-tokens", "450", "--temperature", "3", "--seed", "147",
    ]  # fmt: skip

    def broken_off(how: signal.Signals | None) -> tuple[int, str]:
        """(exit code, stderr) of a command that gets a signal after its first output, or whose output is closed."""
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        assert process.stdout is not None and process.stderr is not None
        os.read(process.stdout.fileno(), 1)
        if how is None:
            process.stdout.close()
        else:
            process.send_signal(how)
        return process.wait(60), process.stderr.read().decode()

    ways = {signal.SIGINT: 130, None: 1}
    with ThreadPoolExecutor() as pool:
        for (way, code), (ended, said) in zip(ways.items(), pool.map(broken_off, ways), strict=True):
            assert ended == code, (way, said)
            assert said.count("\n") <= 1 and "Traceback" not in said, way
