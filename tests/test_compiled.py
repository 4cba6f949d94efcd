"""Compiled products: equal to the library's up to rounding, and bit for bit independent of the other rows."""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch
from torch import Tensor, nn

from msd.backends import compiled
from msd.backends.microkernel import Registers

pytestmark = pytest.mark.skipif(compiled.registers() is None, reason="products cannot be compiled here")

THIS = compiled.registers()
KINDS = [Registers(lanes=8, sums=12, rows=6), Registers(lanes=4, sums=6, rows=3)]


def exact(x: Tensor, weights: list[Tensor]) -> Tensor:
    return torch.cat([x.double() @ w.double().T for w in weights], -1)


@pytest.fixture(params=[THIS, *KINDS], ids=str)
def registers(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Registers:
    """This CPU's, and those of smaller ones, whose code runs here too."""
    kind: Registers = request.param
    if kind != THIS:
        monkeypatch.setattr(compiled, "registers", lambda: kind)
        monkeypatch.setattr(compiled, "_compiled", lru_cache(compiled._compiled.__wrapped__))
    return kind


@pytest.mark.parametrize("columns", [16, 48])
def test_products_are_exact_and_a_row_does_not_depend_on_the_others(
    registers: Registers, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Numbers of outputs that fill tiles, and that do not; tiles of all sizes; one to three threads."""
    torch.manual_seed(0)
    weights = [torch.randn(outputs, columns) for outputs in (12, 7, 1)]
    x = torch.randn(2 * registers.rows + 3, columns)
    whole = compiled.product(x, weights)
    torch.testing.assert_close(whole.double(), exact(x, weights), atol=1e-5, rtol=1e-5)
    for count in range(1, len(x)):
        monkeypatch.setattr(torch, "get_num_threads", lambda count=count: 1 + count % 3)
        assert torch.equal(compiled.product(x[:count], weights), whole[:count])
        assert torch.equal(compiled.product(x[None, -count:], weights[1:]), whole[None, -count:, 12:])


def test_inputs_of_any_layout_and_none() -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(5, 32), torch.randn(32, 2, 3).permute(1, 2, 0)
    torch.testing.assert_close(compiled.product(x, [weight]), x @ weight.T, atol=1e-5, rtol=1e-5)
    assert compiled.product(x[:0], [weight]).shape == (0, 3, 5)


def test_a_weight_that_is_a_part_of_another_is_read_in_its_place() -> None:
    torch.manual_seed(0)
    whole, x = torch.randn(40, 32), torch.randn(3, 32)
    assert compiled.can_compile([whole[7:30]])
    torch.testing.assert_close(compiled.product(x, [whole[7:30]]), x @ whole[7:30].T, atol=1e-5, rtol=1e-5)


def test_other_weights_are_left_to_the_library() -> None:
    one = torch.randn(8, 32)
    assert compiled.can_compile([one, nn.Parameter(one)])
    for other in (one.double(), one.bfloat16(), one.T, one[:, :24], one[0], torch.randn(8, 31), torch.randn(8, 0)):
        assert not compiled.can_compile([one, other])


def test_weights_of_16_bits_are_multiplied_as_floats(registers: Registers) -> None:
    torch.manual_seed(0)
    weights, x = [torch.randn(outputs, 48).half() for outputs in (12, 7)], torch.randn(2 * registers.rows + 1, 48)
    assert compiled.can_compile(weights, torch.float16) and not compiled.can_compile(weights)
    whole = compiled.product(x, weights)
    torch.testing.assert_close(whole.double(), exact(x, weights), atol=1e-5, rtol=1e-5)
    assert torch.equal(whole, compiled.product(x, [w.float() for w in weights]))
