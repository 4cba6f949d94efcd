"""Node chances fitted on what the target accepted: what is counted, kept, and never changed by it."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from test_draft_model import inputs, noisy, plain

from families import BY_NAME
from msd.config import SpeculativeConfig
from msd.core.tree import Step
from msd.drafters.algorithms.draft_model import DraftModel
from msd.drafters.algorithms.mtp import MtpDrafter
from msd.drafters.toolkit import observed
from msd.drafters.toolkit.chance import NodeFeatures
from msd.drafters.toolkit.observed import BINS, LARGEST, WIDTH, Observed
from msd.model import SpeculativeVLM
from msd.planning.plan import Plan
from msd.system import measurements
from mtp_targets import TARGETS, layers_of

CONFIG = SpeculativeConfig(nodes=12, depth=4, backend="plain")
LONG = {"do_sample": False, "max_new_tokens": 24, "eos_token_id": None}
SAMPLED = {"do_sample": True, "temperature": 0.8, "top_k": 0, "max_new_tokens": 24, "eos_token_id": None}
LLAVA = BY_NAME["llava"].make()


def engine(model: Any = LLAVA, drafter: Any = None) -> SpeculativeVLM:
    """An engine that is adaptive, but whose trees do not depend on the clock."""
    made = SpeculativeVLM(model, None, CONFIG, drafter or DraftModel(noisy(LLAVA)))
    made.plan = Plan(CONFIG.nodes, CONFIG.depth)
    return made


def counted(steps: list[Step], rows: int) -> torch.Tensor:
    """The candidates below the accepted nodes of some steps, one by one."""
    counts = torch.zeros(2, BINS, dtype=torch.long)
    for step, row in itertools.product(steps, range(rows)):
        if step.tree.q is None:
            continue
        tree, path = step.tree, [0, *step.accepted.nodes[row]]
        for node in range(1, tree.size):
            parent = int(tree.parents[row, node])
            if parent not in path or path.index(parent) >= len(step.accepted.tokens[row]) or not tree.valid[row, node]:
                continue
            q = min(float(tree.q[row, node]), 1 - 1e-6)
            place = min(BINS - 1, int((max(-LARGEST, min(LARGEST, math.log(q / (1 - q)))) + LARGEST) / WIDTH))
            counts[0, place] += 1
            counts[1, place] += int(tree.tokens[row, node]) == step.accepted.tokens[row][path.index(parent)]
    return counts


@pytest.mark.parametrize(("settings", "rows"), [(LONG, 1), (LONG, 3), (SAMPLED, 1)])
def test_candidates_below_accepted_nodes_are_counted(settings: dict[str, Any], rows: int) -> None:
    vlm, steps, given = engine(), list[Step](), inputs("llava", rows)
    vlm.generate(**given, **settings, seed=1, on_step=steps.append)
    drafter = vlm.drafter
    assert isinstance(drafter, DraftModel) and drafter.observed is not None
    wanted = counted(steps, rows)
    assert (drafter.observed.counts - wanted).abs().sum() <= 2, "rounding at the edge of a bin"
    assert drafter.observed.counts.sum(1).tolist() == wanted.sum(1).tolist() and (wanted.sum(1) > 2).all()


def test_chances_are_the_rates_of_acceptance(tmp_path: Path) -> None:
    """Of a network that is too sure of itself: the candidate's log odds are halved and moved."""
    made, centre = Observed(tmp_path / "x"), (torch.arange(BINS) + 0.5) * WIDTH - LARGEST
    rate = (0.5 * centre - 0.4).sigmoid()
    made.counts = torch.stack([torch.full((BINS,), 300), (300 * rate).round().long()])
    made.finish()
    q = torch.linspace(0.01, 0.99, 9)
    expected = (0.5 * torch.logit(q) - 0.4).sigmoid()
    drafter = DraftModel(LLAVA)
    node = NodeFeatures(q.log(), torch.zeros(()))
    assert torch.equal(drafter.log_acceptance(node), q.log())
    drafter.observed = Observed(tmp_path / "x")  # as another process reads it
    assert torch.allclose(drafter.log_acceptance(node).exp().float(), expected, atol=0.01)
    made.counts[1] = made.counts[1].flip(0)  # better candidates accepted less often: no fit
    made.counts *= 2
    made.finish()
    assert made.weights == {}


@pytest.mark.parametrize("name", ["draft-model", "mtp"])
def test_answers_stay_and_the_next_process_knows(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(observed, "FEWEST", 30)
    model, given = LLAVA, inputs("llava")
    if name == "mtp":
        model, given = TARGETS["qwen3_5"].make(1), TARGETS["qwen3_5"].inputs(1)

    def drafter() -> Any:
        return MtpDrafter(layers_of(model, 1)) if name == "mtp" else DraftModel(noisy(model))

    one = engine(model, drafter())
    for settings in (LONG, SAMPLED, LONG):  # a fit after the first
        result = one.generate(**given, **settings, seed=3)
        assert result.tokens == plain(model, given, 3, **settings)[0]  # type: ignore[union-attr]
    another = engine(model, drafter())
    known, found = (e.drafter.observed for e in (one, another))  # type: ignore[attr-defined]
    assert torch.equal(known.counts, found.counts) and known.weights == found.weights and known.counts.sum() > 100
    assert name == "mtp" or known.weights, "random layers may be right as often where they are less sure"
    assert another.generate(**given, **LONG).tokens == plain(model, given, **LONG)[0]  # type: ignore[union-attr]
    for other in (
        {"calibrate": False},
        {"adaptive": False},
        {"verifier": "threshold", "thresholds": {"language": 0.9}},
    ):
        config = CONFIG.model_copy(update=other)
        assert SpeculativeVLM(model, None, config, drafter()).drafter.observed is None  # type: ignore[attr-defined]


def test_what_is_kept_may_be_damaged_or_incomplete() -> None:
    vlm = engine()
    vlm.generate(**inputs("llava"), **LONG)
    (file,) = measurements.folder("chances").iterdir()
    whole = file.read_bytes()
    for damage in (b"", whole[:20], b"[[1],[2]]", whole.replace(b"[0", b"[-7"), b'{"a": 1}'):
        file.write_bytes(damage)
        assert not engine().drafter.observed.counts.any()  # type: ignore[attr-defined]
    file.unlink()
    file.mkdir()  # nothing can be read or written
    other = engine()
    other.generate(**inputs("llava"), **LONG)
    assert other.drafter.observed.counts.any()  # type: ignore[attr-defined]


def test_an_interrupted_request_leaves_counts_for_the_next() -> None:
    vlm = engine()

    def stop(step: Step) -> None:
        if step.tree.size > 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        vlm.generate(**inputs("llava"), **LONG, on_step=stop)
    assert not measurements.folder("chances").exists()
    vlm.generate(**inputs("llava"), **LONG)
    assert [path.suffix for path in measurements.folder("chances").iterdir()] == [".json"]
