"""Kernels: the fastest by measured times is selected, every kernel gives the same logits, and choices are stored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tiny
from msd import backends
from msd.backends import fused, kernels
from msd.backends.kernels import KERNELS, ROWS, Kernels, Product, for_rows, measure, remembered, select
from msd.config import SpeculativeConfig
from msd.model import SpeculativeVLM

NAMES = ("qkv", "out", "gate_up", "down", "output")
MIXED: Kernels = ("library", "packed", "packed", "library", "packed", "library")


def times(library: list[float], packed: list[float], transposed: list[float]) -> dict[str, list[float]]:
    return {"library": library, "packed": packed, "transposed": transposed}


def choose(monkeypatch: pytest.MonkeyPatch, choice: Kernels, passes: tuple[int, ...] = ROWS) -> None:
    """Every product gets these kernels; the fused pass is faster for `passes`."""
    monkeypatch.setattr(fused, "select", lambda seconds: choice)
    monkeypatch.setattr("msd.backends.comparison.faster", lambda model, calls: passes)


def test_the_model_weights_are_read_in_place_where_that_is_as_fast() -> None:
    best = [20.0, 23.0, 26.0, 40.0, 50.0, 90.0]
    slower = [1.02 * t for t in best]
    assert select(times(slower, best, best)) == ("library",) * 6
    assert select(times([*slower[:5], 1.04 * best[5]], best, [2 * t for t in best])) == ("packed",) * 6


def test_a_product_has_one_copy_and_the_faster_kernel_for_each_number_of_rows() -> None:
    # milliseconds of the reference model on a CPU with AMX
    library, packed, transposed = [20, 23, 30, 50, 52, 90], [25, 26, 28, 32, 38, 60], [18, 28, 33, 49, 42, 95]
    found = select(times([*map(float, library)], [*map(float, packed)], [*map(float, transposed)]))
    assert found == ("library", "library", "packed", "packed", "packed", "packed")
    found = select(times([2.0] * 6, [3.0] * 5 + [1.5], [1.0] * 5 + [2.5]))
    assert found == ("transposed",) * 5 + ("library",)


def test_a_number_of_rows_uses_the_kernel_measured_below_it() -> None:
    names = tuple(str(rows) for rows in ROWS)
    found = {rows: for_rows(names, torch.zeros(1, rows, 3)) for rows in (1, 2, 3, 4, 8, 9, 16, 17, 63, 64, 1000)}
    assert [int(name) for name in found.values()] == [1, 2, 2, 4, 4, 9, 9, 17, 17, 64, 64]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("kernel", KERNELS)
def test_every_kernel_computes_the_linear_layers(kernel: str, count: int, bias: bool) -> None:
    torch.manual_seed(0)
    linears = tuple(nn.Linear(24, 8 * (i + 1), bias=bias) for i in range(count))
    product = Product(linears, (kernel,) * len(ROWS))
    assert len(product.copied) == (0 if kernel == "library" else count * (1 + bias))
    with torch.no_grad():
        for rows in (1, 5, 70):
            x = torch.randn(2, rows, 24)
            expected = torch.cat([linear(x) for linear in linears], -1)
            torch.testing.assert_close(product(x), expected, atol=1e-5, rtol=1e-5)
            other = torch.randn_like(expected)
            torch.testing.assert_close(product.plus(x, other), expected + other, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("passes", [ROWS, (9, 17), (1,)])
@pytest.mark.parametrize("choice", [("library",) * 6, ("packed",) * 6, ("transposed",) * 6, MIXED])
def test_logits_states_and_tokens_are_the_models_own(
    choice: Kernels, passes: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """For each kernel, and where the model's own code runs for some numbers of rows."""
    choose(monkeypatch, choice, passes)
    model, inputs = tiny.llava(), tiny.llava_inputs()
    backend = backends.choose(model, "measure")
    assert backend.name == "fused"
    assert [backend.choice[name] for name in NAMES] == [choice] * 5
    for rows in (1, 3, 9, 20):
        states: dict[int, Tensor] = {}
        ids = torch.arange(rows)[None] + 4
        with torch.no_grad():
            own = model(input_ids=ids, output_hidden_states=True)
            with backend.running(states.__setitem__) as recorded:
                logits = model(input_ids=ids).logits
        assert recorded
        torch.testing.assert_close(logits, own.logits, atol=1e-4, rtol=1e-4)
        for index, expected in enumerate(own.hidden_states):
            torch.testing.assert_close(states[index], expected, atol=1e-4, rtol=1e-4)
    engine = SpeculativeVLM(model, None, SpeculativeConfig(adaptive=False), "prompt-lookup")
    expected = model.generate(**inputs, max_new_tokens=16, do_sample=False)[0, inputs["input_ids"].shape[1] :].tolist()
    assert engine.generate(**inputs, max_new_tokens=16, do_sample=False).tokens == expected


def test_a_model_whose_own_code_is_faster_runs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    choose(monkeypatch, MIXED, ())
    model = tiny.llava()
    backend = backends.choose(model, "measure")
    assert backend.name == "plain" and backend.choice["pass"] == ("plain",) * 6
    with backend.running() as recorded:
        assert not recorded


def test_weights_read_in_place_need_no_comparison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Changes that no version counter shows take effect at once; only copied weights are read in each request."""
    choose(monkeypatch, ("library",) * 6)
    read: list[Any] = []
    content = backends.revision._content  # type: ignore[attr-defined]
    monkeypatch.setattr("msd.backends.revision._content", lambda tensor: read.append(tensor) or content(tensor))
    model, inputs = tiny.llava(), tiny.llava_inputs(images=0)
    engine = SpeculativeVLM(model, None, drafter="ar")
    before = engine.generate(**inputs, max_new_tokens=12, do_sample=False).tokens
    model.lm_head.weight.data.copy_(model.lm_head.weight.data.roll(3, 0))
    after = engine.generate(**inputs, max_new_tokens=12, do_sample=False).tokens
    assert (
        after
        == model.generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs["input_ids"].shape[1] :].tolist()
    )
    assert after != before and not read


def test_measured_times_are_the_smallest_of_all_rounds() -> None:
    now = iter(range(10**6))
    seconds = measure([(nn.Linear(8, 8),)] * 2, clock=lambda: float(next(now)))
    assert seconds == {kernel: [1.0] * len(ROWS) for kernel in KERNELS}


def test_a_choice_is_measured_once_per_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "FOLDER", tmp_path)
    monkeypatch.setattr(kernels.machine, "quietly", lambda measure: (True, measure()))
    choice, calls = {"qkv": MIXED}, []

    def found(key: str = "llama", process: bool = False) -> Any:
        if not process:
            kernels._measured.clear()
        return remembered((key,), lambda: calls.append(1) or choice)  # type: ignore[func-returns-value]

    assert found() == found() == choice and len(calls) == 1
    assert found("other sizes") == choice and len(calls) == 2
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        assert found() == choice and len(calls) == 3, "another number of threads"
    finally:
        torch.set_num_threads(threads)
    monkeypatch.setattr(kernels.machine, "quietly", lambda measure: (False, measure()))
    found("busy"), found("busy", process=True)
    assert len(calls) == 4, "the process remembers it"
    assert found("busy") == choice and len(calls) == 5, "the disk does not"


@pytest.mark.parametrize(
    "damage", ['{"qkv": ["library"]}', '{"qkv": ["a", "b", "c", "d", "e", "f"]}', "{", "{}", "[1]"]
)
def test_a_damaged_choice_is_measured_again(damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "FOLDER", tmp_path)
    monkeypatch.setattr(kernels.machine, "quietly", lambda measure: (True, measure()))
    for _ in range(2):
        kernels._measured.clear()
        assert remembered(("llama",), lambda: {"qkv": MIXED}) == {"qkv": MIXED}
        (path,) = tmp_path.iterdir()
        path.write_text(damage)
