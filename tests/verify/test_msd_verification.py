"""`MSDVerification` on chains of plain probabilities, and the divergence that a generation reports."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from positions import P, Q, V, by_enumeration, distance
from torch import Tensor

import msd
from msd.certify import chi2
from msd.certify.chi2 import chi2_p_value
from msd.config import SpeculativeConfig
from msd.core.modality import VISION
from msd.core.statistics import Statistics
from msd.core.tree import Accepted, DraftTree
from msd.model import SpeculativeVLM


@pytest.mark.parametrize("policy", ["lossless", "threshold", "budget"])
def test_a_chain_follows_its_distribution(policy: str) -> None:
    """The first position of each chain; ε = 1 allows any θ."""
    generator = torch.Generator().manual_seed(0)
    p, q = torch.tensor([P, P]), torch.tensor(Q[:1])
    counts, spent = torch.zeros(V), set()
    for _ in range(6000):
        chain = msd.MSDVerification(policy, {"vision": 0.7}, 1.0)
        drafts = torch.multinomial(q[0], 1, generator=generator)
        result = chain.verify(drafts, p, q, ["vision"], generator)
        counts[result.tokens[0]] += 1
        spent.add(round(result.divergence[0], 6))
        assert len(result.tokens) == len(result.divergence) == 1 + result.accepted
    wanted = P if policy == "lossless" else by_enumeration(policy, 0.7, Q[:1])
    assert chi2_p_value(counts.numpy(), wanted) > 1e-3
    assert spent == {round(distance(wanted), 6)}


def test_the_threshold_depends_on_the_modality() -> None:
    p, q = torch.tensor([[0.25, 0.75]]), torch.tensor([[0.5, 0.5]])  # α of token 0 is 0.5
    for name, tokens in (("vision", [1]), ("fusion", [0]), ("language", [0]), (VISION.id, [1])):
        result = msd.MSDVerification().verify([0], p, q, [name])
        assert (result.tokens, result.accepted) == (tokens, int(tokens == [0]))


def test_a_bonus_token_follows_if_all_drafts_are_accepted() -> None:
    same = torch.tensor([[0.5, 0.5], [0.5, 0.5]])
    bonus = torch.cat([same, torch.tensor([[0.0, 1.0]])])
    assert msd.MSDVerification().verify([0, 1], bonus, same, ["vision"] * 2).tokens == [0, 1, 1]
    assert msd.MSDVerification().verify([0, 1], same, same, ["vision"] * 2).tokens == [0, 1]
    assert msd.MSDVerification().verify([], bonus[2:], same[:0], []).tokens == [1]


@pytest.mark.parametrize("policy", ["lossless", "threshold", "budget"])
@pytest.mark.parametrize("threshold", [0.0, 0.5, 1.0])
def test_one_hot_targets_give_the_argmax(policy: str, threshold: float) -> None:
    p = torch.eye(4)[[2, 1, 3]]
    q = torch.full((2, 4), 0.25)
    for drafts, tokens in (([2, 1], [2, 1, 3]), ([2, 0], [2, 1]), ([0, 1], [2])):
        chain = msd.MSDVerification(policy, dict.fromkeys(["language", "vision"], threshold), 1.0)
        result = chain.verify(drafts, p, q, ["vision", "language"])
        assert result.tokens == tokens
        assert result.divergence == [0.0] * len(tokens)


def test_the_balance_carries_over_from_call_to_call() -> None:
    chain, generator = msd.MSDVerification("budget", {"vision": 0.0}, 0.05), torch.Generator().manual_seed(0)
    p, q, spent = torch.tensor([P]), torch.tensor(Q[:1]), []
    for _ in range(300):
        spent += chain.verify(torch.multinomial(q[0], 1, generator=generator), p, q, ["vision"], generator).divergence
        assert sum(spent) <= 0.05 * len(spent) + 1e-9
    assert sum(spent) > 0.8 * 0.05 * len(spent)


EVEN = torch.full((1, 4), 0.25)


@pytest.mark.parametrize(
    "arguments, line",
    [
        (([0], EVEN, EVEN[:, :3], ["vision"]), "draft_probs"),
        (([0, 1], EVEN, EVEN, ["vision"] * 2), "2 draft tokens need"),
        (([0], EVEN, EVEN, []), "1 draft tokens but 0 modalities"),
        (([4], EVEN, EVEN, ["vision"]), "outside the vocabulary of 4"),
        (([0], EVEN * 2, EVEN, ["vision"]), "target_probs has a row"),
        (([0], EVEN, EVEN - 0.5, ["vision"]), "draft_probs has a row"),
        (([0], EVEN, EVEN, ["smell"]), "unknown modality 'smell'"),
        (([0], EVEN, EVEN, [99]), "modality 99"),
    ],
)
def test_invalid_arguments_are_refused(arguments: Any, line: str) -> None:
    with pytest.raises(msd.UserError, match=line):
        msd.MSDVerification().verify(*arguments)


def test_invalid_settings_are_refused() -> None:
    for settings, line in ((("best",), "unknown verifier"), (("budget", None, 2.0), "outside")):
        with pytest.raises(msd.UserError, match=line):
            msd.MSDVerification(*settings)  # type: ignore[arg-type]


def test_divergence_is_counted_by_modality() -> None:
    statistics, total = Statistics(), Statistics()
    tree = DraftTree.root_only(torch.zeros(2, dtype=torch.long))
    statistics.count(tree, Accepted([[], []], [[5, 6], [7]], [[0.1, 0.0], [0.2]], [[0, 1], [0]]))
    total.add(statistics)
    total.add(statistics)
    data = json.loads(json.dumps(total.as_dict()))["divergence"]
    assert (data["tokens"], data["per_token"], data["total"]) == (6, pytest.approx(0.1), pytest.approx(0.6))
    assert data["by_modality"]["language"]["per_token"] == pytest.approx(0.15)
    assert data["by_modality"]["vision"]["total"] == 0.0
    assert Statistics().as_dict()["divergence"] is None


def answer(verifier: str, do_sample: bool = True, **settings: Any) -> tuple[Tensor, Any]:
    """(tokens, divergence) of 20 answers of the tiny model with prompt-lookup drafts."""
    config = SpeculativeConfig(verifier=verifier, **settings)
    engine = SpeculativeVLM(chi2.tiny_model(), None, config)
    ids = chi2.prompt().expand(20, -1)
    results = engine.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=do_sample, max_new_tokens=8, eos_token_id=None,
        pad_token_id=0, seed=0,
    )  # fmt: skip
    assert isinstance(results, list)
    return torch.tensor([r.tokens for r in results]), results[0].as_dict()["divergence"]


def test_a_generation_reports_its_divergence() -> None:
    plain, nothing = answer("lossless")
    assert nothing is None
    spending, account = answer("budget", epsilon=0.15)
    assert 0.0 < account["per_token"] <= 0.15
    assert account["total"] == pytest.approx(account["per_token"] * account["tokens"])
    assert not torch.equal(spending, plain)
    frugal, none = answer("budget", epsilon=0.0)
    assert torch.equal(frugal, plain) and none["total"] == 0.0
    _, hard = answer("threshold")
    assert hard["per_token"] > account["per_token"]


def test_a_greedy_generation_is_the_same_under_every_policy() -> None:
    plain, _ = answer("lossless", do_sample=False)
    for verifier, settings in (("threshold", {"thresholds": {"language": 0.0}}), ("budget", {"epsilon": 1.0})):
        tokens, account = answer(verifier, do_sample=False, **settings)
        assert torch.equal(tokens, plain)
        assert account["total"] == 0.0
