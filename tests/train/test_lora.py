"""A low-rank layer equals its merged matrix, and a higher rank keeps the function."""

import pytest
import torch
from recipes.reference_vlm.lora import adapt, factors, load_factors
from torch import nn


def network() -> nn.Module:
    torch.manual_seed(1)
    net = nn.Module()
    net.q_proj, net.o_proj = nn.Linear(6, 5), nn.Linear(5, 3, bias=False)
    return net


def test_low_rank_equals_merged_weight() -> None:
    net = network()
    dense = net.q_proj.weight.clone()
    assert adapt(net, ["q_proj"], rank=2) == ["q_proj"]
    x = torch.randn(4, 6)
    torch.testing.assert_close(net.q_proj(x), x @ dense.T + net.q_proj.base.bias)
    nn.init.normal_(net.q_proj.B)
    merged = dense + 2.0 * net.q_proj.B @ net.q_proj.A
    torch.testing.assert_close(net.q_proj(x), x @ merged.T + net.q_proj.base.bias)


def test_widening_keeps_the_function() -> None:
    narrow, wide = network(), network()
    adapt(narrow, ["_proj"], rank=2)
    for layer in (narrow.q_proj, narrow.o_proj):
        nn.init.normal_(layer.B)
    adapt(wide, ["_proj"], rank=5)
    load_factors(wide, factors(narrow, "lm."), "lm.")
    x = torch.randn(4, 6)
    torch.testing.assert_close(wide.o_proj(wide.q_proj(x)), narrow.o_proj(narrow.q_proj(x)))
    with pytest.raises(ValueError, match="does not fit"):
        load_factors(narrow, factors(wide))
    with pytest.raises(ValueError, match="no low-rank layer"):
        load_factors(narrow, {"other.A": torch.zeros(2, 6)})


def test_only_factors_learn() -> None:
    net = network()
    adapt(net, ["q_proj"], rank=2)
    net.o_proj.requires_grad_(False)
    assert [n for n, p in net.named_parameters() if p.requires_grad] == ["q_proj.A", "q_proj.B"]
    with pytest.raises(ValueError, match="ends in any"):
        adapt(net, ["k_proj"], rank=2)
