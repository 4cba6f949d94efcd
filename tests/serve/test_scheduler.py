"""The scheduler: order, limits, cancellation, deadlines, failures, shared prefixes, and the end."""

from __future__ import annotations

import queue
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import tiny
from msd.config import SpeculativeConfig
from msd.errors import UserError
from msd.model import SpeculativeVLM
from msd.serve.batch import Emission
from msd.serve.scheduler import Job, Limits, QueueFullError, Scheduler

MODEL = tiny.llava(sharpness=10.0)
WAIT = 60.0


class Client:
    """A request that collects what it receives."""

    def __init__(self, number: int, new: int = 12, prepare: Any = None, **options: Any) -> None:
        self.received: queue.Queue[Emission | Exception | None] = queue.Queue()
        self.inputs = tiny.llava_inputs(number, images=1, words=6 + number % 3)
        self.options = {"max_new_tokens": new, "eos_token_id": None, **options}
        self.job = Job(prepare or (lambda: dict(self.inputs)), self.options, self.received.put, seed=number)

    def first(self) -> Any:
        return self.received.get(timeout=WAIT)

    def answer(self) -> tuple[list[int], str | None]:
        """(tokens, why it ended). Raises what the request got as an error."""
        tokens: list[int] = []
        finish = None
        while (outcome := self.received.get(timeout=WAIT)) is not None:
            if isinstance(outcome, Exception):
                raise outcome
            tokens += outcome.tokens
            finish = outcome.finish or finish
        return tokens, finish

    def wanted(self) -> list[int]:
        torch.manual_seed(self.job.seed or 0)
        return MODEL.generate(**self.inputs, **self.options)[0, self.inputs["input_ids"].shape[1] :].tolist()


def scheduler(method: str = "prompt-lookup", **limits: Any) -> Scheduler:
    vlm = SpeculativeVLM(MODEL, None, SpeculativeConfig(adaptive=False), method)
    return Scheduler(vlm, Limits(**limits))


@pytest.fixture
def stopped() -> Iterator[list[Scheduler]]:
    """Schedulers that are drained after the test."""
    made: list[Scheduler] = []
    yield made
    for one in made:
        one.drain(0.0)


def test_answers_are_those_of_generate(stopped: list[Scheduler]) -> None:
    served = scheduler(rows=3, waiting=12)
    stopped.append(served)
    clients = [Client(i, 5 + i, do_sample=i % 2 == 1) for i in range(9)]
    served.submit(*(client.job for client in clients[:4]))
    served.start()
    served.submit(*(client.job for client in clients[4:]))
    assert [client.answer() for client in clients] == [(client.wanted(), "length") for client in clients]
    assert served.steps < sum(5 + i for i in range(9)) / 2  # several rows in one step


def test_changed_weights_answer_the_next_request(stopped: list[Scheduler]) -> None:
    model = tiny.llava(sharpness=10.0)
    served = Scheduler(
        SpeculativeVLM(model, None, SpeculativeConfig(adaptive=False, backend="fused"), "ar"), Limits(prefixes=0)
    )
    stopped.append(served)
    first, later = Client(1, 80), Client(1, 80)
    served.submit(first.job)
    served.start()
    before = first.answer()[0]
    model.get_input_embeddings().weight.data.mul_(1.5)  # no version counter sees it
    model.model.language_model.layers[0].mlp.up_proj.weight.data[0, 0] += 3.0
    served.submit(later.job)
    torch.manual_seed(1)
    wanted = model.generate(**later.inputs, **later.options)[0, later.inputs["input_ids"].shape[1] :].tolist()
    assert later.answer()[0] == wanted != before


def test_a_full_queue_refuses_and_says_when_to_come_back() -> None:
    served = scheduler(waiting=2)  # its thread does not run
    served.submit(Client(0).job, Client(1).job)
    with pytest.raises(QueueFullError) as refused:
        served.submit(Client(2).job)
    assert refused.value.retry_after >= 1
    assert served.waiting == 2


def test_a_cancelled_request_leaves_within_one_step(stopped: list[Scheduler]) -> None:
    served = scheduler(prefixes=0)
    stopped.append(served)
    long, other = Client(1, 400), Client(2, 40)
    served.submit(long.job, other.job)
    seen: list[int] = []
    receive = long.job.receive

    def cancels(outcome: Any) -> None:
        receive(outcome)
        if len(seen) < 5:
            seen.append(served.steps)
            if len(seen) == 5:
                long.job.cancel()

    long.job.receive = cancels
    served.start()
    tokens, finish = long.answer()
    assert finish == "cancelled"
    assert served.steps >= seen[-1]
    assert long.job.done
    assert tokens == long.wanted()[: len(tokens)]
    assert len(tokens) <= 5 * 9
    assert other.answer() == (other.wanted(), "length")


def test_late_requests_end_with_what_they_have(stopped: list[Scheduler]) -> None:
    served = scheduler(seconds=1000.0)
    stopped.append(served)
    waiting, running = Client(1), Client(2, 400)
    waiting.job.arrival -= 2000.0
    served.submit(waiting.job, running.job)
    served.start()
    assert waiting.answer() == ([], "deadline")
    running.first()
    running.job.arrival -= 2000.0
    assert running.answer()[1] == "deadline"


def test_a_bad_request_fails_alone(stopped: list[Scheduler]) -> None:
    def broken() -> Any:
        raise UserError("no such image")

    served = scheduler()
    stopped.append(served)
    good, bad, wrong = Client(1), Client(2, prepare=broken), Client(3, num_beams=2)
    served.submit(bad.job, wrong.job, good.job)
    served.start()
    with pytest.raises(UserError, match="no such image"):
        bad.answer()
    with pytest.raises(UserError, match="num_beams"):
        wrong.answer()
    assert good.answer()[0] == good.wanted()


def test_a_failed_step_ends_its_requests_and_the_next_are_served(
    stopped: list[Scheduler], monkeypatch: pytest.MonkeyPatch
) -> None:
    served = scheduler()
    stopped.append(served)
    step, failures = served.vlm.drafter.propose, [RuntimeError("out of memory")]

    def fails_once(*arguments: Any) -> Any:
        if failures:
            raise failures.pop()
        return step(*arguments)

    monkeypatch.setattr(served.vlm.drafter, "propose", fails_once)
    first, second = Client(1), Client(2)
    served.submit(first.job)
    served.start()
    with pytest.raises(RuntimeError, match="out of memory"):
        first.answer()
    served.submit(second.job)
    assert second.answer()[0] == second.wanted()


def test_memory_decides_how_many_run_together(stopped: list[Scheduler]) -> None:
    served = scheduler(prefixes=0)
    slots = tiny.llava_inputs(8, images=1, words=8)["input_ids"].shape[1] + 40 + 9
    served.limits = Limits(cache_bytes=2 * slots * served.slot_bytes(), prefixes=0)
    stopped.append(served)
    clients, huge, peak = [Client(3 * i + 2, 40) for i in range(4)], Client(5, 300), list[int]()
    for client in clients:
        client.job.receive = lambda outcome, put=client.received.put: (peak.append(served.running), put(outcome))[1]
    served.submit(*(client.job for client in clients), huge.job)
    served.start()
    assert [client.answer()[0] for client in clients] == [client.wanted() for client in clients]
    assert max(peak) == 2
    with pytest.raises(UserError, match="for keys and values"):
        huge.answer()


def test_a_prompt_reuses_the_prompt_that_it_continues(stopped: list[Scheduler]) -> None:
    served = scheduler(prefixes=2)
    stopped.append(served)
    first, other, second = Client(1), Client(2), Client(1)
    more = torch.tensor([[9, 8, 7, 6]])
    second.inputs = {
        **first.inputs,
        "input_ids": torch.cat([first.inputs["input_ids"], more], 1),
        "attention_mask": torch.ones(1, first.inputs["input_ids"].shape[1] + 4, dtype=torch.long),
    }
    served.start()
    for client in (first, other, second):
        served.submit(client.job)
        assert client.answer()[0] == client.wanted()
    assert [c.job.cached_tokens for c in (first, second)] == [0, first.inputs["input_ids"].shape[1]]
    assert 0 < served.prefixes.held <= served.limits.prefix_bytes


def test_draining_ends_what_runs_and_takes_nothing_new() -> None:
    served = scheduler()
    client = Client(1, 30)
    served.submit(client.job)
    served.start()
    client.first()
    served.drain(WAIT)
    assert client.answer()[1] == "length"
    assert not served.accepting
    with pytest.raises(QueueFullError):
        served.submit(Client(2).job)
    late = scheduler()
    running = Client(3, 400)
    late.submit(running.job)
    late.start()
    running.first()
    begin = time.monotonic()
    late.drain(0.0)
    assert running.answer()[1] == "cancelled"
    assert time.monotonic() - begin < WAIT
