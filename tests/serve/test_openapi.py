"""The server answers whatever its own OpenAPI description allows, and whatever it does not, as described: never 5xx."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("fastapi")
schemathesis = pytest.importorskip("schemathesis")
from hypothesis import HealthCheck, Phase, given, settings  # noqa: E402
from schemathesis.specs.openapi.checks import positive_data_acceptance  # noqa: E402

from serve.server import NAME, asks, engine, running  # noqa: E402

EXAMPLES = 30
SETTINGS = settings(
    max_examples=EXAMPLES, deadline=None, derandomize=True, database=None, phases=(Phase.generate,),
    suppress_health_check=list(HealthCheck),
)  # fmt: skip
UNSTATED = [positive_data_acceptance]  # a schema does not state, for example, which texts are data URIs


@pytest.fixture(scope="module")
def described() -> Iterator[Any]:
    with running(engine(), rows=4, waiting=32) as (address, _, _):
        yield schemathesis.openapi.from_url(f"{address}/openapi.json")


def answers(operation: Any, mode: str) -> Counter[int]:
    """The statuses of the answers to cases of `mode`, each of which is checked against the description."""
    found: Counter[int] = Counter()

    @SETTINGS
    @given(operation.as_strategy(generation_mode=schemathesis.GenerationMode(mode)))
    def check(case: Any) -> None:
        body = case.body
        if mode == "positive" and isinstance(body, dict):
            body |= {"model": NAME, "max_tokens": 3, "max_completion_tokens": None}  # or only the name is ever refused
            if found.total() % 2:  # texts and settings alone
                body |= {"messages": asks("Hi"), "msd": None, "stream_options": None, "logprobs": True}
        answer = case.call()
        found[answer.status_code] += 1
        case.validate_response(answer, excluded_checks=UNSTATED)

    check()
    return found


def test_what_is_described(described: Any) -> None:
    operations = [found.ok() for found in described.get_all_operations()]
    assert len(operations) >= 7
    for operation in operations:
        found = answers(operation, "positive")
        assert max(found) < 500
        if operation.path == "/v1/chat/completions":
            assert found.total() >= EXAMPLES and found[200] > 0


def test_what_is_not_described(described: Any) -> None:
    found = answers(described["/v1/chat/completions"]["POST"], "negative")
    assert found.total() >= EXAMPLES
    assert all(400 <= status < 500 for status in found)
