"""Thresholds of `budget`, solved from the acceptance that was recorded for a drafter."""

from __future__ import annotations

from collections import defaultdict

import pytest
import torch

import tiny
from msd.config import SpeculativeConfig
from msd.core.sampling import Sampler
from msd.drafters.algorithms.msd import MSD, MSDConfig, MSDNetwork
from msd.model import SpeculativeVLM
from msd.train.held_out import Recorder, solve
from msd.verify import Budget
from msd.verify.lossy import Position


def engine(verifier: str, **settings: object) -> SpeculativeVLM:
    model = tiny.llava(sharpness=15.0)
    config = MSDConfig.for_target(model.config.text_config, 60, form="ar", rank=4)
    torch.manual_seed(0)
    network = MSDNetwork(config)
    network.heads.ids = torch.arange(4, 64)
    return SpeculativeVLM(
        model, None, SpeculativeConfig(verifier=verifier, nodes=12, backend="plain", **settings), MSD(network)
    )  # type: ignore[arg-type]


class RecordingVerifier(Budget):
    """The first implementation of `Recorder`: a verifier that emits as `lossless` does and records P."""

    def __init__(self) -> None:
        super().__init__(epsilon=1.0)
        self.probabilities: dict[int, list[float]] = defaultdict(list)

    def _choose_thresholds(self, position: Position, kinds: list[int], sampler: Sampler) -> list[float]:
        P = position.p.masked_fill(~position.drafted, 0.0).sum(-1).tolist()
        for kind, probability in zip(kinds, P, strict=True):
            self.probabilities[kind].append(min(probability, 1.0))
        return [1.0] * len(kinds)

    def _record(self, sampler: Sampler, rows: list[int], kinds: list[int], spent: list[float]) -> None:
        pass


def assert_close(one: dict[int, list[float]], two: dict[int, list[float]]) -> None:
    """Same positions in the same order; values to float32 rounding, for two passes may round differently."""
    assert one.keys() == two.keys()
    for kind in one:
        assert one[kind] == pytest.approx(two[kind], rel=1e-5, abs=1e-6)


def test_recording_changes_nothing_and_sees_every_position() -> None:
    plain, recording = (
        engine("lossless", adaptive=False),
        engine("lossless", adaptive=False, label=True, foresight=False),
    )
    other, verifier = engine("lossless", adaptive=False), RecordingVerifier()
    other.verifier = verifier
    recorder, inputs = Recorder(), tiny.llava_inputs(0)
    sampling = {"max_new_tokens": 20, "do_sample": True, "seed": 3}
    one = plain.generate(**inputs, **sampling)
    two = recording.generate(
        **inputs, **sampling, return_dict_in_generate=True, output_scores=True, on_step=recorder
    )  # fmt: skip
    assert one.tokens == two.tokens == other.generate(**inputs, **sampling).tokens
    assert_close(recorder.probabilities, verifier.probabilities)
    positions = sum(len(m) for m in recorder.probabilities.values())
    assert 0 < positions <= len(one.tokens) - 1
    assert all(0 <= p <= 1 for values in recorder.probabilities.values() for p in values)


def test_a_batch_is_recorded_row_by_row() -> None:
    inputs = tiny.batch(*(tiny.llava_inputs(seed, words=8 + 3 * seed) for seed in range(3)))
    recording, other = (
        engine("lossless", adaptive=False, label=True, foresight=False),
        engine("lossless", adaptive=False),
    )
    other.verifier, recorder = RecordingVerifier(), Recorder()
    sampling = {"max_new_tokens": 20, "do_sample": True, "seed": 3}
    recording.generate(**inputs, **sampling, return_dict_in_generate=True, output_scores=True, on_step=recorder)
    other.generate(**inputs, **sampling)
    assert_close(recorder.probabilities, other.verifier.probabilities)


def test_solved_thresholds_keep_the_budget_on_the_records() -> None:
    torch.manual_seed(0)
    probabilities = {"vision": torch.rand(400).tolist(), "language": (1 - torch.rand(400) ** 3 * 0.5).tolist()}
    table = solve(probabilities, (0.01, 0.05))
    for epsilon, thresholds in table.items():
        for name, threshold in thresholds.items():
            p = torch.tensor(probabilities[name], dtype=torch.float64)
            cost = lambda t: float(torch.where(p >= t, 1 - p, 0.0).sum() / len(p))  # noqa: B023, E731
            assert cost(threshold) <= float(epsilon) + 1e-9
            assert threshold == 0.0 or cost(threshold - 0.02) > float(epsilon)
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
