"""A mixture of experts: a pass over more nodes reads more experts, and the planned size follows the measured cost."""

from __future__ import annotations

import torch

from family_models import DEEP, HEAD, MARKS, sizes, tiny
from msd.drafters.toolkit.selection import best_size
from msd.planning import costs
from msd.targets import adapt

NODES = (1, 2, 3, 5, 9)
CHANCES = [[0.6, 0.4, 0.3, 0.2, 0.15, 0.1, 0.08, 0.05]]


class Clock:
    """Seconds pass only in the model: one for a pass, and one for each expert that a pass reads in a layer."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.now = 0.0
        model.get_decoder().register_forward_hook(lambda *_: self.pass_time(1.0))
        for layer in model.get_decoder().layers:
            if hasattr(layer.mlp, "gate"):
                layer.mlp.gate.register_forward_hook(lambda _m, _a, routed: self.pass_time(len(routed[-1].unique())))

    def pass_time(self, seconds: float) -> None:
        self.now += seconds

    def __call__(self) -> float:
        return self.now


def planned(**experts: int) -> tuple[list[float], int]:
    """(seconds of passes of 1 to 9 nodes, the planned number of drafted nodes) of a tiny Qwen3-VL."""
    text = sizes(**HEAD, num_experts=16, num_experts_per_tok=2, moe_intermediate_size=16, **experts)
    model = tiny("qwen3_vl_moe", text_config=text, vision_config=DEEP, **MARKS)()
    clock = Clock(model)
    curve = costs.measure(adapt(model, backend="plain"), NODES, (16, 64), clock).curve(9, 32)
    return curve, best_size(CHANCES, curve)


def test_the_planned_size_follows_the_experts_that_a_pass_reads() -> None:
    mixture, few = planned()
    dense, many = planned(mlp_only_layers=[0, 1, 2])
    assert mixture == sorted(mixture) and mixture[8] > 2 * mixture[0], "more nodes read more experts"
    assert max(dense) == min(dense), "in a dense model every pass reads all weights"
    assert few < many == len(CHANCES[0])
