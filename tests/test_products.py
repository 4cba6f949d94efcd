"""Products and norms of drafts: they equal the plain ones as far as their precision allows, on every input."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from msd.backends import norms, packed
from msd.backends.norms import RMSNorm, rms_norm
from msd.backends.packed import Linear, Packed, draft_dtype, faster_in_bf16, multiplies_in_bf16, rounds

HERE = [torch.float32, *([torch.bfloat16] if multiplies_in_bf16() else []), *([torch.float16] if rounds() else [])]
ERROR = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 1e-2}  # relative, in the norm
rounding = pytest.mark.skipif(not rounds(), reason="this CPU has no rounded products")


@pytest.fixture(autouse=True)
def decoding() -> Iterator[None]:
    with torch.no_grad():
        yield


def error(out: Tensor, truth: Tensor) -> float:
    return float((out - truth).norm() / truth.norm())


@pytest.mark.parametrize("dtype", HERE)
@pytest.mark.parametrize("shape", [(1,), (1, 1), (2, 7), (1, 63), (1, 64), (3, 100)])
@pytest.mark.parametrize("bias", [False, True])
def test_a_packed_product_equals_the_layers(dtype: torch.dtype, shape: tuple[int, ...], bias: bool) -> None:
    torch.manual_seed(0)
    one, two = nn.Linear(96, 40, bias=bias), nn.Linear(96, 24, bias=bias)
    x, other = torch.randn(*shape, 96), torch.randn(*shape, 64)
    truth = torch.cat([one(x), two(x)], -1)
    product = Packed.of(one, two, dtype=dtype)
    assert product(x).shape == truth.shape and product(x).dtype == torch.float32
    assert error(product(x), truth) < ERROR[dtype]
    assert error(product.plus(x, other), truth + other) < ERROR[dtype]
    assert error(product(x.transpose(0, -2).contiguous().transpose(0, -2)), truth) < ERROR[dtype]


@rounding
def test_float16_products_take_every_input_and_leave_each_row_alone() -> None:
    """Nothing that a target computes may stop a draft, and a draft does not depend on other rows of its batch."""
    product = Packed.of(nn.Linear(8, 4, bias=False), dtype=torch.float16)
    bad = torch.tensor([[float("nan")] * 8, [1.0] * 8])
    assert product(bad)[0].isnan().all() and not product(bad)[1].isnan().any()
    assert torch.equal(product(torch.zeros(3, 8)), torch.zeros(3, 4))
    assert product(torch.zeros(0, 8)).shape == (0, 4)
    assert product(torch.ones(2, 8, dtype=torch.bfloat16)).dtype == torch.bfloat16
    x = torch.randn(20, 8)
    assert torch.equal(product(x[:3]), product(x)[:3])


@rounding
def test_the_engine_of_quantised_models_stays_as_it_is() -> None:
    before = torch.backends.quantized.engine
    Packed.of(nn.Linear(8, 4), dtype=torch.float16)
    assert torch.backends.quantized.engine == before


def test_gradients_use_the_layers_own_weights() -> None:
    layer = Linear(8, 4)
    layer.pack(HERE[-1])
    with torch.enable_grad():
        x = torch.randn(2, 8, requires_grad=True)
        layer(x).sum().backward()
        assert x.grad is not None


def test_a_draft_has_the_fastest_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock decides among what this CPU has, and never for products that it only emulates."""
    device = torch.device("cpu")
    draft_dtype.cache_clear()
    assert draft_dtype(device) in HERE
    seconds = {torch.float32: 3.0, torch.bfloat16: 2.0, torch.float16: 1.9}
    monkeypatch.setattr(packed, "_seconds", lambda product, x: seconds[product])
    monkeypatch.setattr(packed.Packed, "of", lambda *layers, dtype: dtype)
    for bf16, rounded, best in (
        (False, False, torch.float32), (True, False, torch.bfloat16), (False, True, torch.float16),
        (True, True, torch.float16),
    ):  # fmt: skip
        monkeypatch.setattr(packed, "multiplies_in_bf16", lambda bf16=bf16: bf16)
        monkeypatch.setattr(packed, "rounds", lambda rounded=rounded: rounded)
        draft_dtype.cache_clear()
        assert draft_dtype(device) == best
    seconds[torch.float16] = seconds[torch.bfloat16] = 2.9  # not worth a rounded weight
    draft_dtype.cache_clear()
    assert draft_dtype(device) == torch.float32
    draft_dtype.cache_clear()
    monkeypatch.setattr(packed, "multiplies_in_bf16", lambda: False)
    monkeypatch.setattr(packed.time, "perf_counter", iter([0.0, 9.0] * 5 + [0.0, 1.0] * 5).__next__)  # float32 last
    assert not faster_in_bf16(device)


@pytest.mark.parametrize("shape", [(576,), (3, 576), (2, 5, 64), (0, 64), (400, 576)])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e4])
def test_the_norm_equals_pytorchs(shape: tuple[int, ...], scale: float) -> None:
    torch.manual_seed(0)
    x, weight = scale * torch.randn(shape), torch.randn(shape[-1])
    for w in (weight, None):
        for eps in (1e-5, None):
            torch.testing.assert_close(rms_norm(x, w, eps), F.rms_norm(x, shape[-1:], w, eps), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(rms_norm(torch.zeros(shape), weight, 1e-5), torch.zeros(shape))


def test_the_norm_has_gradients_and_other_precisions() -> None:
    norm = RMSNorm(16, 1e-5)
    with torch.enable_grad():
        x = torch.randn(2, 16, requires_grad=True)
        out = norm(x)
        out.square().sum().backward()
    assert x.grad is not None and norm.weight.grad is not None
    torch.testing.assert_close(norm(x.detach()), out.detach())
    half = x.detach().bfloat16()
    assert torch.equal(rms_norm(half, None, 1e-5), F.rms_norm(half, (16,), None, 1e-5))
    large = torch.randn(norms.SMALL // 16 + 1, 16)
    assert torch.equal(rms_norm(large, None, 1e-5), F.rms_norm(large, (16,), None, 1e-5))
