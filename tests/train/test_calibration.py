"""Thresholds θ for a budget, fitted on recorded draft trees."""

from __future__ import annotations

import pytest
import torch

import tiny
from msd.config import SpeculativeConfig
from msd.drafters.algorithms.msd import MSD, MSDConfig, MSDNetwork
from msd.model import SpeculativeVLM
from msd.train.held_out import Recorder, solve


def engine(verifier: str, **settings: object) -> SpeculativeVLM:
    model = tiny.llava(sharpness=15.0)
    config = MSDConfig.for_target(model.config.text_config, 60, form="ar", rank=4)
    torch.manual_seed(0)
    network = MSDNetwork(config)
    network.heads.ids = torch.arange(4, 64)
    return SpeculativeVLM(model, None, SpeculativeConfig(verifier=verifier, nodes=12, **settings), MSD(network))  # type: ignore[arg-type]


def test_recording_changes_nothing_and_sees_every_position() -> None:
    plain, recording = engine("lossless"), engine("lossless")
    recorder = Recorder()
    recording.verifier = recorder
    inputs, sampling = tiny.llava_inputs(0), {"max_new_tokens": 20, "do_sample": True, "seed": 3}
    one, two = plain.generate(**inputs, **sampling), recording.generate(**inputs, **sampling)
    assert one.tokens == two.tokens
    positions = sum(len(m) for m in recorder.masses.values())
    assert 0 < positions <= len(one.tokens) - 1
    assert all(0 <= m <= 1 for masses in recorder.masses.values() for m in masses)


def test_solved_thresholds_keep_the_budget_on_the_records() -> None:
    torch.manual_seed(0)
    masses = {"vision": torch.rand(400).tolist(), "language": (1 - torch.rand(400) ** 3 * 0.5).tolist()}
    table = solve(masses, (0.01, 0.05))
    for epsilon, thetas in table.items():
        for name, theta in thetas.items():
            p = torch.tensor(masses[name], dtype=torch.float64)
            cost = lambda t: float(torch.where(p >= t, 1 - p, 0.0).sum() / len(p))  # noqa: B023, E731
            assert cost(theta) <= float(epsilon) + 1e-9
            assert theta == 0.0 or cost(theta - 0.02) > float(epsilon)
    assert table["0.05"]["vision"] < table["0.01"]["vision"]


def test_a_drafters_own_thresholds_are_used() -> None:
    vlm = engine("budget", epsilon=0.03)
    vlm.drafter.calibrated = {"0.01": {"vision": 0.9}, "0.05": {"vision": 0.7}}  # type: ignore[attr-defined]
    again = vlm.with_method(vlm.drafter)
    assert again.verifier._thresholds == {"vision": 0.9}  # type: ignore[attr-defined]
    own = SpeculativeVLM(
        vlm.model, None, SpeculativeConfig(verifier="budget", epsilon=0.03, thresholds={"vision": 0.5}), vlm.drafter
    )
    assert own.verifier._thresholds == {"vision": 0.5}  # type: ignore[attr-defined]
    tight = SpeculativeVLM(vlm.model, None, SpeculativeConfig(verifier="budget", epsilon=0.005), vlm.drafter)
    assert tight.verifier._thresholds == {}  # type: ignore[attr-defined]
    assert tight.generate(**tiny.llava_inputs(0), max_new_tokens=5, do_sample=False).tokens


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_solved_thresholds_stay_within_the_budget(temperature: float) -> None:
    vlm = engine("budget", epsilon=0.05)
    result = vlm.generate(
        **tiny.llava_inputs(1), max_new_tokens=40, do_sample=True, temperature=temperature, top_k=0, seed=1
    )
    spent = result.as_dict()["divergence"]
    assert 0 <= spent["per_token"] <= 0.05 + 1e-9
