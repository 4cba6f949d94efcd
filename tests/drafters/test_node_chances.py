"""Node chances: the fit, its place in a drafter's folder, and its effect on trees but not on answers."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import rivals
import tiny
import tiny_checkpoint
from msd.bench.data import Sample
from msd.certify import certificate
from msd.core.foresight import Outlook
from msd.core.tree import DraftTree
from msd.drafters import registry
from msd.drafters.algorithms.msd import MSDNetwork
from msd.drafters.toolkit import checkpoint
from msd.drafters.toolkit.calibration import calibrate, calibration_error, candidates, fitted, log_loss, quality
from msd.drafters.toolkit.chance import FEATURES, NodeFeatures, log_chance, log_odds
from msd.drafters.toolkit.drafter import Memory, TrainedDrafter
from msd.drafters.toolkit.growth import Shape, Subtrees, grow
from msd.errors import UserError
from msd.loading import load_target
from msd.planning.plan import Budget

MODEL = tiny.llava()
SKEWED = {"log_odds": 0.2, "bias": 1.5}  # another order of nodes than that of log q


def invented(n: int = 20_000) -> NodeFeatures:
    torch.manual_seed(0)
    log_q = torch.rand(n // 2, 2).clamp_min(1e-4).log().sort(-1, descending=True).values  # of two siblings each
    return NodeFeatures(log_q.flatten(), torch.randn(n), log_q[:, :1].expand(-1, 2).flatten())


def test_the_fit_finds_the_model_that_made_the_data() -> None:
    node = invented()
    true = {"log_odds": 1.6, "confidence": -0.4, "best": -0.3, "first": 0.8, "bias": 1.0}
    correct = torch.rand(len(node.log_q)) < log_chance(true, node).exp()
    found = fitted(node, correct)
    assert found == pytest.approx(true, abs=0.1)  # four standard errors
    report = quality(found, node, correct)
    assert report["log_loss"] < report["log_loss_of_q"] - 0.02 and report["ece"] < 0.02 < report["ece_of_q"]
    without = NodeFeatures(node.log_q, torch.zeros(()))  # features that do not vary have no weight
    assert fitted(without, correct).keys() == {"log_odds", "bias"}


def test_features_of_siblings() -> None:
    """The likeliest child counts as first, and all have its log odds; without it, neither feature has a weight."""
    q = torch.tensor([[0.6, 0.3, 0.05]])
    node = NodeFeatures(q.log(), torch.zeros(()), q[:, :1].log())
    assert FEATURES["first"](node).tolist() == [[1.0, 0.0, 0.0]]
    assert FEATURES["best"](node) == pytest.approx(math.log(0.6 / 0.4))
    alone = NodeFeatures(q.log(), torch.zeros(()))
    assert [FEATURES[name](alone) for name in ("best", "first")] == [0.0, 0.0]


def test_measures_by_hand() -> None:
    sure = torch.tensor([0.95, 0.95, 0.95, 0.95, 0.55, 0.55])
    right = torch.tensor([True, True, True, False, False, True])
    assert calibration_error(sure, right) == pytest.approx(4 / 6 * 0.2 + 2 / 6 * 0.05, abs=1e-6)
    assert calibration_error(torch.ones(5), torch.ones(5).bool()) == 0.0
    assert log_loss(sure.log(), right) == pytest.approx(float(F.binary_cross_entropy(sure, right.float())), abs=1e-6)


def test_no_weights_are_q_and_stored_ones_of_msd_are_the_published_formula() -> None:
    node = invented(100)
    assert torch.equal(rivals.network(MODEL, "eagle2").log_acceptance(node), node.log_q)
    spark = rivals.network(MODEL, "dspark")
    assert torch.equal(spark.log_acceptance(node), node.log_q + F.logsigmoid(node.confidence))
    made = MSDNetwork.for_target(MODEL.config.text_config, draft_vocabulary=60)
    stored = torch.tensor([1.587, -0.3892, 1.9204]).half().float()
    made.heads.calibration.copy_(stored)
    a, b, c = stored
    assert torch.equal(made.log_acceptance(node), F.logsigmoid(a * log_odds(node.log_q) + b * node.confidence + c))


@pytest.mark.parametrize("method", ["eagle2", "dspark", "text-only"])
def test_a_fit_predicts_other_answers_better_than_q(method: str) -> None:
    net = rivals.network(MODEL, method)
    objective = net.objective().eval()
    fit = calibrate(objective, [rivals.teacher_batch(MODEL, net, first=first) for first in (0, 4)])
    assert net.calibration == fit["calibration"] and fit["confidence"]["candidates"] > 1000
    assert ("confidence" in fit["calibration"]) == (method == "dspark")
    node, correct = candidates(objective, [rivals.teacher_batch(MODEL, net, first=8)])
    report = quality(fit["calibration"], node, correct)
    assert report["log_loss"] < report["log_loss_of_q"] and report["ece"] < report["ece_of_q"]


def test_candidates_are_those_of_decoding() -> None:
    """q of the likeliest candidates, level by level along the answer, as a decoding step computes it."""
    net = rivals.network(MODEL, "eagle3")
    batch = rivals.teacher_batch(MODEL, net, rows=1)
    node, correct = candidates(net.objective().eval(), [batch])
    assert len(correct) == 4 * sum(rivals.LENGTH - d for d in range(1, 9))
    with torch.inference_mode():
        memory = Memory.begin(net, _layout(batch), batch.taps[:, : batch.prompt])
        levels = net.levels(memory.anchors(), batch.answers[:, 0])
        distributions = [levels.root(torch.ones(1, 1, 1))]
        for d in range(1, 8):
            token = batch.answers[:, d : d + 1]
            distributions.append(levels.below(token, torch.zeros(1, 1, dtype=torch.long)))
    for d, distribution in enumerate(distributions, 1):
        log_q, top = distribution.logits[0, 0].log_softmax(-1).topk(4)
        first = 4 * sum(rivals.LENGTH - above for above in range(1, d))  # the first root's at this level
        assert torch.allclose(node.log_q[first : first + 4], log_q, atol=1e-4)
        assert node.best is not None and torch.allclose(node.best[first : first + 4], log_q[0], atol=1e-4)
        assert torch.equal(correct[first : first + 4], net.ids[top] == batch.answers[0, d])


def _layout(batch: Any) -> Any:
    from msd.core.layout import Layout

    whole = batch.layout
    return Layout(whole.tokens, whole.modality, whole.positions, whole.start, [batch.prompt + 1] * whole.batch)


def tree(net: Any, outlook: Any = None) -> DraftTree:
    batch = rivals.teacher_batch(MODEL, net)
    with torch.inference_mode():
        memory = Memory.begin(net, _layout(batch), batch.taps[:, : batch.prompt])
        newest = batch.answers[:, 0]
        subtrees = Subtrees.single(newest, Shape(4, 6))
        levels = net.levels(memory.anchors(), newest)
        return grow(levels, net, subtrees, (0,), newest, Budget(7, [6] * 4), outlook)


def test_a_calibration_changes_greedy_trees_only() -> None:
    """A request that samples accepts a node with probability q, so a fit on greedy answers has no effect there."""
    net = rivals.network(MODEL, "eagle2")
    by_q = tree(net)
    net.calibration = SKEWED
    sampled = tree(net, lambda levels: Outlook(lambda logits: logits))
    assert torch.equal(sampled.tokens, by_q.tokens) and torch.equal(sampled.parents, by_q.parents)
    skewed = tree(net)
    assert not (skewed.parents.shape == by_q.parents.shape and torch.equal(skewed.parents, by_q.parents))


def test_calibrated_drafters_pass_verify(tmp_path: Path) -> None:
    model, processor = load_target(tiny_checkpoint.write(tmp_path / "target"))
    for method in ("eagle2", "eagle3"):
        net = rivals.network(model, method)
        net.calibration = SKEWED
        registry.register(method, lambda net=net: TrainedDrafter(net))  # type: ignore[misc]
    photo = tmp_path / tiny_checkpoint.photos(tmp_path, 1)[0]
    samples, methods = [Sample((photo,), "What is it?", None, "see")], ["eagle2", "eagle3+prompt-lookup"]
    rows = certificate.certify(model, processor, samples, methods, 10, 1000, lambda _: None, "plain")
    assert [(row.method, row.passed) for row in rows] == [(name, True) for name in methods]


def test_a_fit_is_stored_with_the_drafter(tmp_path: Path) -> None:
    net = rivals.network(MODEL, "eagle2")
    checkpoint.save(net, tmp_path, {"answers": 3})
    before = checkpoint.digest(tmp_path)
    assert registry.load(tmp_path).calibration is None
    checkpoint.save_training(tmp_path, {"answers": 3, "calibration": SKEWED})
    again = registry.load(tmp_path)
    node = invented(50)
    assert again.calibration == SKEWED and torch.equal(again.log_acceptance(node), log_chance(SKEWED, node))
    assert registry.get("specvlm-video").make(again).network.calibration == SKEWED  # the same weights
    assert checkpoint.digest(tmp_path) != before
    for wrong, message in (({"bias": "high"}, "'calibration' is no table"), ({"mood": 1.0}, "unknown feature 'mood'")):
        (tmp_path / "training.json").write_text(json.dumps({"calibration": wrong}))
        with pytest.raises(UserError, match=message):
            registry.load(tmp_path)
