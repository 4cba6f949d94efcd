"""Kernels: the fastest by measured times is selected, every kernel gives the same logits, and choices are stored."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tiny
from msd import backends
from msd.backends import comparison, compiled, fused, kernels
from msd.backends.kernels import (
    IN_PLACE,
    KERNELS,
    PACKED,
    ROWS,
    Choice,
    Kernels,
    Product,
    Weights,
    for_rows,
    measure,
    select,
)
from msd.backends.packed import Rounded, exact_exponent, rounds
from msd.bench.report import by_rows
from msd.config import SpeculativeConfig
from msd.model import SpeculativeVLM
from msd.system import measurements
from msd.system.measurements import cached

pytestmark = pytest.mark.alone

FASTER = comparison.faster  # tests run with a fixed result
NAMES = ("qkv", "out", "gate_up", "down", "output")
half = pytest.mark.skipif(not rounds(), reason="this CPU has no products with weights of 16 bits")
MIXED: Kernels = ("library", "packed", "packed", "library", "packed", "library", "packed")


def times(library: list[float], packed: list[float], transposed: list[float]) -> dict[str, list[float]]:
    return {"library": library, "packed": packed, "transposed": transposed}


def weights(*linears: nn.Linear) -> Weights:
    return [(linear.weight, linear.bias) for linear in linears]


def choose(monkeypatch: pytest.MonkeyPatch, choice: Kernels, passes: tuple[int, ...] = ROWS) -> None:
    """Every product gets these kernels; the fused pass is faster for `passes`."""
    monkeypatch.setattr(fused, "select", lambda seconds: choice)
    monkeypatch.setattr("msd.backends.comparison.faster", lambda own, other: passes)


def test_the_model_weights_are_read_in_place_where_that_is_as_fast() -> None:
    best = [20.0, 23.0, 26.0, 40.0, 50.0, 90.0, 300.0]
    slower = [1.04 * t for t in best]
    assert select(times(slower, best, best)) == ("library",) * 7
    assert select(times([*slower[:6], 1.15 * best[6]], best, [2 * t for t in best])) == ("packed",) * 7


def test_a_product_has_one_copy_and_the_faster_kernel_for_each_number_of_rows() -> None:
    # milliseconds of the reference model on a CPU with AMX
    library, packed, transposed = (
        [20, 23, 30, 50, 52, 90, 200],
        [25, 26, 28, 32, 38, 60, 210],
        [18, 28, 33, 49, 42, 95, 250],
    )
    found = select(times([*map(float, library)], [*map(float, packed)], [*map(float, transposed)]))
    assert found == ("library", "library", "packed", "packed", "packed", "packed", "library")
    found = select(times([2.0] * 7, [3.0] * 5 + [1.5, 1.5], [1.0] * 5 + [2.5, 2.5]))
    assert found == ("transposed",) * 5 + ("library",) * 2


def test_kernels_that_read_in_place_are_combined_without_a_copy() -> None:
    seconds = {"library": [1.0] * 5 + [2.0, 2.0], "packed": [0.9] * 7, "compiled": [0.9] * 5 + [3.0, 3.0]}
    assert select(seconds) == ("compiled",) * 5 + ("packed",) * 2
    seconds["packed"][5:] = [1.8, 1.8]
    assert select(seconds) == ("compiled",) * 5 + ("library",) * 2
    assert select({"library": [1.0] * 7, "compiled": [1.0] * 7}) == ("library",) * 7


def test_a_number_of_rows_uses_the_kernel_measured_below_it() -> None:
    names = tuple(str(rows) for rows in ROWS)
    found = {
        rows: for_rows(names, torch.zeros(1, rows, 3)) for rows in (1, 2, 3, 4, 8, 9, 16, 17, 63, 64, 255, 256, 1000)
    }
    assert [int(name) for name in found.values()] == [1, 2, 2, 4, 4, 9, 9, 17, 17, 64, 64, 256, 256]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("kernel", KERNELS)
def test_every_kernel_computes_the_linear_layers(kernel: str, count: int, bias: bool) -> None:
    torch.manual_seed(0)
    linears = tuple(nn.Linear(48, 8 * (i + 1), bias=bias) for i in range(count))
    product = Product(weights(*linears), (kernel,) * len(ROWS))
    assert len(product.copied) == (0 if kernel in IN_PLACE else count * (1 + bias))
    with torch.no_grad():
        for rows in (1, 5, 70, 150):
            x = torch.randn(2, rows, 48)
            expected = torch.cat([linear(x) for linear in linears], -1)
            torch.testing.assert_close(product(x), expected, atol=1e-5, rtol=1e-5)
            other = torch.randn_like(expected)
            torch.testing.assert_close(product.plus(x, other), expected + other, atol=1e-5, rtol=1e-5)


@half
@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scale", [1e-4, 0.02, 30.0])
def test_weights_of_16_bits_are_copied_without_rounding(kind: torch.dtype, scale: float) -> None:
    """The product with single inputs is the weights themselves, whatever their size; that of others is float32's."""
    torch.manual_seed(0)
    linear = nn.Linear(24, 150)
    with torch.no_grad():
        linear.weight.copy_((torch.randn(150, 24) * scale).to(kind).float())
        exponent = exact_exponent([linear.weight])
        assert exponent is not None
        assert (exponent == 0) if kind == torch.float16 else (exponent > 0 or scale > 1e-4)
        product = Product(weights(linear), ("half",) * len(ROWS))
        assert isinstance(product._packed, Rounded)
        assert torch.equal(Product([(linear.weight, None)], ("half",) * len(ROWS))(torch.eye(24)), linear.weight.T)
        for rows in (1, 5, 70):
            x = torch.randn(rows, 24)
            torch.testing.assert_close(product(x), linear(x), atol=1e-5 * max(1.0, scale), rtol=1e-5)


@half
def test_weights_that_need_more_bits_keep_them() -> None:
    """Trained float32 weights, one that is not, weights of all sizes, and weights that are no numbers."""
    torch.manual_seed(0)
    rounded = torch.randn(150, 24).half().float()
    one = rounded.clone()
    one[149, 23] += 1e-5
    wide = torch.logspace(-30, 30, 24).bfloat16().float().repeat(150, 1)
    for weight in (torch.randn(150, 24), one, wide, rounded * float("nan"), torch.zeros(150, 24)):
        assert exact_exponent([weight]) is None
        assert not weight.any() or exact_exponent([rounded, weight]) is None
        assert not isinstance(Product([(weight, None)], ("half",) * len(ROWS))._packed, Rounded)
    assert exact_exponent([rounded]) == 0


@half
def test_a_checkpoint_of_16_bits_may_have_the_half_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is measured where it is exact, and gives way once a weight changes; tokens are those of `generate()`."""
    seen: list[set[str]] = []

    def chosen(seconds: dict[str, list[float]]) -> Kernels:
        seen.append(set(seconds))
        return ("half",) * len(ROWS) if "half" in seconds else PACKED

    monkeypatch.setattr(fused, "measure", measure)
    monkeypatch.setattr(fused, "select", chosen)
    monkeypatch.setattr("msd.backends.comparison.faster", lambda own, other: ROWS)
    model, inputs = tiny.llava().bfloat16().float(), tiny.llava_inputs()
    backend = backends.choose(model)
    assert seen == [set(KERNELS)] * len(NAMES) and backend.choice["qkv"] == ("half",) * len(ROWS)
    engine = SpeculativeVLM(model, None, SpeculativeConfig(adaptive=False), "prompt-lookup")
    for step in range(2):
        whole = model.generate(**inputs, max_new_tokens=16, do_sample=False)
        own = whole[0, inputs["input_ids"].shape[1] :].tolist()
        assert engine.generate(**inputs, max_new_tokens=16, do_sample=False).tokens == own
        assert backend._pass is not None
        assert isinstance(backend._pass._fused.layers[0].down._packed, Rounded) == (step == 0)
        with torch.no_grad():
            for layer in model.get_decoder().layers:
                layer.mlp.down_proj.weight.mul_(1.0001)
    seen.clear()
    backends.choose(tiny.llava())
    assert seen == [set(KERNELS) - {"half"}] * len(NAMES)


@pytest.mark.parametrize("passes", [ROWS, (9, 17), (1,)])
@pytest.mark.parametrize("choice", [("library",) * 7, ("packed",) * 7, ("transposed",) * 7, MIXED])
def test_logits_states_and_tokens_are_the_models_own(
    choice: Kernels, passes: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """For each kernel, and where the model's own code runs for some numbers of rows."""
    choose(monkeypatch, choice, passes)
    model, inputs = tiny.llava(), tiny.llava_inputs()
    backend = backends.choose(model, "measure")
    assert backend.name == "fused"
    used = tuple(kernel if rows in passes else "library" for rows, kernel in zip(ROWS, choice, strict=True))
    assert [backend.choice[name] for name in NAMES] == [used] * 4 + [choice]
    for rows in (1, 3, 9, 20, 270):
        states: dict[int, Tensor] = {}
        ids = torch.arange(rows)[None] % 30 + 4
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
    assert backend.name == "plain" and backend.choice["pass"] == ("plain",) * 7
    with backend.running() as recorded:
        assert not recorded


@pytest.mark.parametrize("kernel", IN_PLACE)
def test_weights_read_in_place_need_no_comparison(monkeypatch: pytest.MonkeyPatch, kernel: str) -> None:
    """Changes that no version counter shows take effect at once; only copied weights are read in each request."""
    choose(monkeypatch, (kernel,) * 7)
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
    """Of a sample: two layers, or the first rows of a larger one."""
    now = iter(range(10**6))
    layers = [weights(nn.Linear(48, 8), nn.Linear(48, 12))] * 2
    found = measure({"qkv": layers}, clock=lambda: float(next(now)))
    absent = {"half"} | (set() if compiled.registers() else {"compiled"})
    assert found == {"qkv": {kernel: [1.0] * len(ROWS) for kernel in KERNELS if kernel not in absent}}
    (_, sample), *_ = kernels._variants([weights(nn.Linear(8, 100))], 1 << 10)
    assert [(w.shape, b.shape) for w, b in sample._own] == [((32, 8), (32,))]


def test_the_report_states_kernels_by_rows() -> None:
    assert by_rows(("packed",) * 7) == "packed"
    assert by_rows(MIXED) == (
        "library, packed from 2 rows, library from 9 rows, packed from 17 rows, library from 64 rows, "
        "packed from 256 rows"
    )


def test_copies_that_no_pass_uses_are_not_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """Own code runs from 4 rows: only fewer rows and the output layer need their kernels."""
    packed_once: Kernels = ("library",) * 5 + ("packed",) * 2
    choose(monkeypatch, packed_once, (1, 2))
    model = tiny.llava()
    backend = backends.choose(model)
    assert {backend.choice[name] for name in NAMES[:4]} == {("library",) * 7}
    assert backend.choice["output"] == packed_once
    assert backend._pass is not None and [*backend._pass.copied] == [model.lm_head.weight]


def test_measuring_leaves_the_model_unchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    """Real measurements, also when a request redirects the model at the time, or has switched autocast on."""
    monkeypatch.setattr(fused, "measure", measure)
    monkeypatch.setattr("msd.backends.comparison.faster", FASTER)
    model = tiny.llava()
    decoder, ids = model.get_decoder(), torch.arange(5)[None]
    with torch.no_grad():
        own = model(input_ids=ids).logits
        before = {**vars(decoder)}
        with backends.choose(model, "fused").running(), torch.autocast("cpu"):
            backend = backends.choose(model, "measure")
        assert vars(decoder) == before and len(decoder.layers) == model.config.text_config.num_hidden_layers
        assert torch.equal(model(input_ids=ids).logits, own)
        assert backend.choice.keys() == {*NAMES, "pass"} and not backend.reason
        with backend.running():
            torch.testing.assert_close(model(input_ids=ids).logits, own, atol=1e-4, rtol=1e-4)


def test_a_choice_is_measured_once_per_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quiet, calls, now = [True], [], [0.0]
    monkeypatch.setattr(measurements.machine, "quietly", lambda measure: (quiet[0], measure()))
    monkeypatch.setattr(measurements.time, "monotonic", lambda: now[0])

    def found(key: str = "llama", place: Path = tmp_path) -> int:
        """The number of measurements so far."""
        choice = {"qkv": MIXED}
        assert cached(place, (key,), Choice, bool, lambda: calls.append(1) or choice) == choice  # type: ignore[func-returns-value]
        return len(calls)

    assert found() == found() == 1
    assert found("other sizes") == 2
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        assert found() == 3, "another number of threads"
    finally:
        torch.set_num_threads(threads)
    monkeypatch.setattr(measurements.machine, "hardware", lambda: "another processor")
    assert found() == found() == 4
    quiet[0] = False
    assert found("busy") == found("busy") == 5, "the process uses a disturbed measurement for a while"
    now[0] += 601
    assert found("busy") == 6
    quiet[0] = True
    now[0] += 601
    assert found("busy") == found("busy") == 7
    now[0] += 10**6
    assert found("busy") == 7, "an undisturbed one is stored"
    blocked = tmp_path / "file"
    blocked.write_text("")
    assert found("llama", blocked) == found("llama", blocked) == 8


@pytest.mark.parametrize(
    "damage",
    [
        '{"qkv": ["library"]}', json.dumps({"qkv": ["plain"] * 7}), json.dumps({"foreign": MIXED}),
        json.dumps({name: ["a"] * 7 for name in NAMES}), "{", "{}", "[1]",
    ],
)  # fmt: skip
def test_a_damaged_choice_is_measured_again(damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "FOLDER", tmp_path)
    monkeypatch.setattr(fused, "cached", cached)
    monkeypatch.setattr(measurements.machine, "quietly", lambda measure: (True, measure()))
    choose(monkeypatch, MIXED)
    model = tiny.llava()
    expected = {**dict.fromkeys(NAMES, MIXED), "pass": ("fused",) * 7}
    for _ in range(2):
        backends._chosen.clear()
        assert backends.choose(model).choice == expected
        paths = list(tmp_path.iterdir())
        assert len(paths) == 2, "of products and of passes"
        for path in paths:
            path.write_text(damage)
