"""The rivals' losses by hand, and the stages that they are trained in."""

from __future__ import annotations

import math

import pytest
import torch

import rivals
import tiny
from msd.drafters.algorithms.vispec import ViSpec
from msd.drafters.toolkit.training import Objective, Truth
from msd.train.losses import terms as teaching
from msd.train.losses.eagle import states_everywhere
from msd.train.teacher_batches import PublishedStages

MODEL = tiny.llava()


def test_terms_by_hand() -> None:
    torch.manual_seed(0)
    z, t, h, g = torch.randn(6), torch.randn(6), torch.randn(4) * 3, torch.randn(4)
    p, q = t.exp() / t.exp().sum(), z.exp() / z.exp().sum()
    assert float(teaching.soft_entropy(z, p)) == pytest.approx(
        -sum(float(a * b.log()) for a, b in zip(p, q, strict=True))
    )
    assert float(teaching.hard_entropy(z, torch.tensor(2))) == pytest.approx(-math.log(float(q[2])))
    assert float(teaching.distance(z, p)) == pytest.approx(sum(abs(float(a - b)) for a, b in zip(p, q, strict=True)))
    short = p[:4]  # a third of the law is out of reach, where the draft has nothing
    expected = float((short - z[:4].softmax(-1)).abs().sum() + p[4:].sum())
    assert float(teaching.distance(z[:4], short)) == pytest.approx(expected)
    smooth = [0.5 * d * d if d < 1 else d - 0.5 for d in (h - g).abs().tolist()]
    assert float(teaching.regression(h, g)) == pytest.approx(sum(smooth) / 4)
    order = p.argsort(descending=True).tolist()[:3]
    chance = 1.0
    for i in range(3):
        chance *= float(z[order[i]].exp() / sum(z[j].exp() for j in order[i:]))
    assert float(teaching.ranking(z, p, 3)) == pytest.approx(-math.log(chance), rel=1e-5)


def test_truth_is_the_targets_at_the_drafted_positions() -> None:
    made = rivals.network(MODEL, "eagle2")
    batch = rivals.batch(MODEL, made)
    first = torch.tensor([[0, 3, rivals.LENGTH - 2]] * 4)
    truth = Truth.of(batch, first, 2, made.config.hidden)
    assert batch.taps is not None
    for a, root in enumerate(first[0].tolist()):
        for d in range(2):
            at = root + 1 + d
            inside = at < rivals.LENGTH
            assert bool(truth.valid[1, a, d]) == inside
            if inside:
                assert torch.equal(truth.p[1, a, d], batch.logits[1, at].exp())
                assert int(truth.token[1, a, d]) == int(batch.answers[1, at])
                state = batch.taps[1, batch.prompt + at - 1, -made.config.hidden :]
                assert torch.equal(truth.state[1, a, d], state)
                assert torch.allclose((made.head(state)).softmax(-1), truth.p[1, a, d], atol=1e-5)
    values = torch.arange(24.0).view(4, 3, 2)
    assert float(truth.mean(values)) == pytest.approx(float(values[truth.valid].mean()))


def test_eagle_3_weighs_levels_and_leaves_foreign_words_out() -> None:
    made = rivals.network(MODEL, "eagle3", draft_vocabulary=30)
    made.choose_words(torch.arange(4, 34))
    batch = rivals.batch(MODEL, made)
    first = torch.arange(rivals.LENGTH - 1).expand(4, -1)
    loss, _ = made.loss(batch, first)
    logits = made.logits(made.states(batch, first, 7), first)
    expected = 0.0
    for level in range(7):
        each = []
        for row in range(4):
            for root in range(rivals.LENGTH - 1):
                at = root + 1 + level
                if at < rivals.LENGTH and 4 <= int(batch.answers[row, at]) < 34:
                    p = batch.logits[row, at].exp()
                    each.append(-float((p / p.sum() * logits[row, root, level].log_softmax(-1)).sum().detach()))
        expected += 0.8**level * (sum(each) / len(each) if each else 0.0)
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-4)


def test_dspark_by_hand() -> None:
    made = rivals.network(MODEL, "dspark")
    batch = rivals.batch(MODEL, made)
    first = torch.tensor([[2, 12]] * 4)
    loss, parts = made.loss(batch, first)
    states = made.states(batch, first, 7)
    sums, total = [0.0, 0.0, 0.0], 0.0
    for row in range(4):
        for a, root in enumerate(first[0].tolist()):
            for k in range(7):
                at = root + 1 + k
                if at >= rivals.LENGTH:
                    continue
                parent = batch.answers[row, at - 1]
                q = made.logits(states[row, a, k], parent).softmax(-1)
                p = batch.logits[row, at].exp()
                apart = float((p - q).abs().sum().detach())
                c = float(made.sure(states[row, a, k], parent).sigmoid().detach())
                met, weight = 1 - apart / 2, math.exp(-k / 4)
                entropy = -math.log(float(q[batch.answers[row, at]].detach()))
                right = -met * math.log(c) - (1 - met) * math.log(1 - c)
                sums = [s + weight * v for s, v in zip(sums, (apart, entropy, right), strict=True)]
                total += weight
    apart, entropy, right = (s / total for s in sums)
    assert [float(parts[n].detach()) for n in ("distance", "entropy", "confidence")] == pytest.approx(
        [apart, entropy, right], rel=1e-3
    )
    assert float(loss.detach()) == pytest.approx(0.9 * apart + 0.1 * entropy + right, rel=1e-3)


def test_stages_are_those_published() -> None:
    share = {m: PublishedStages.for_run(rivals.network(MODEL, m).stages, 1000) for m in rivals.RIVALS}
    msd = [share["msd-published"].share(s) for s in (0, 499, 500, 750, 1000)]
    assert msd == pytest.approx([0, 0, 0, 0.5, 1])
    assert [share["vispec"].share(s) for s in (0, 299, 300, 999)] == [0, 0, 1, 1]
    assert share["eagle2"].share(10) == 0 and share["eagle2"].share(20) == 0.5 and share["eagle2"].share(999) == 0.95


@pytest.mark.parametrize("method", rivals.RIVALS)
def test_half_precision_training_is_nearly_the_same(method: str) -> None:
    made = rivals.network(MODEL, method)
    batch, first = rivals.batch(MODEL, made), torch.arange(rivals.LENGTH - 1).expand(4, -1)
    objective = Objective(made)
    whole, _ = objective(batch, torch.zeros(4, rivals.LENGTH), first)
    with torch.autocast("cpu", torch.bfloat16):
        half, _ = objective(batch, torch.zeros(4, rivals.LENGTH), first)
    half.backward()
    assert float(half.detach()) == pytest.approx(float(whole.detach()), rel=0.05)


def test_chains_count_what_is_drafted_right() -> None:
    """A network that is right by construction: it drafts what the answer says, then one that never is."""
    made = rivals.network(MODEL, "eagle2")
    batch = rivals.batch(MODEL, made)
    answers = batch.answers
    labels = torch.arange(rivals.LENGTH).expand(4, -1) % 3
    for shift, right in ((0, True), (1, False)):
        seen: list[int] = []

        def logits(
            states: torch.Tensor, parents: torch.Tensor, seen: list[int] = seen, shift: int = shift
        ) -> torch.Tensor:
            d = len(seen)
            seen.append(d)
            at = (torch.arange(states.shape[1]) + 1 + d).clamp_max(rivals.LENGTH - 1)
            token = (answers[:, at] + shift) % 64
            return torch.nn.functional.one_hot(token, 64).float()

        made.logits = logits  # type: ignore[method-assign]
        counts = Objective(made).acceptance(batch, labels)
        accepted, drafted = (sum(c[i] for c in counts.values()) for i in (0, 1))
        assert accepted == (drafted if right else 0)
        each = [min(5, rivals.LENGTH - 1 - r) if right else 1 for r in range(rivals.LENGTH - 1)]
        assert drafted == 4 * sum(each)


def test_eagles_loss_by_hand() -> None:
    made = rivals.network(MODEL, "msd-published")
    batch = rivals.batch(MODEL, made)
    first = torch.tensor([[0, 6, rivals.LENGTH - 1]] * 4)  # below the last one there is nothing to draft
    loss, parts = made.loss(batch, first)
    states = made.states(batch, first, 1)[:, :, 0]
    truth = batch.taps[:, batch.prompt - 1 : -1, -made.config.hidden :] if batch.taps is not None else None
    assert truth is not None
    regression, entropy = [], []
    for row in range(4):
        for a, root in ((0, 0), (1, 6)):
            off = (states[row, a] - truth[row, root + 1]).abs()
            regression.append(float(torch.where(off < 1, 0.5 * off * off, off - 0.5).mean().detach()))
            q = made.head(states[row, a]).log_softmax(-1)
            entropy.append(-float((batch.logits[row, root + 1].exp() * q).sum().detach()))
    mean = lambda values: sum(values) / len(values)  # noqa: E731
    assert float(parts["regression"].detach()) == pytest.approx(mean(regression), rel=1e-4)
    assert float(loss.detach()) == pytest.approx(mean(regression) + 0.1 * mean(entropy), rel=1e-4)


def test_vispecs_second_stage_by_hand() -> None:
    """A plain pass, and one in which every position's feature is what the plain pass drafted at the one before."""
    made = rivals.network(MODEL, "vispec")
    assert isinstance(made, ViSpec)
    batch = rivals.batch(MODEL, made)
    first = torch.tensor([[1, 9]] * 4)
    assert batch.taps is not None
    found = made.select(batch.layout, batch.taps[:, :-1], batch.prompt)
    feature = made.feature(found.taps)
    plain = states_everywhere(made, found, feature)
    fed = feature.clone()
    for s in range(1, fed.shape[1]):
        fed[:, s] = plain[:, s - 1]
    losses = []
    for states in (plain, states_everywhere(made, found, fed)):
        for row in range(4):
            for a, root in enumerate(first[0].tolist()):
                at = int(found.slot[row, batch.prompt - 1 + root])
                if states is plain:
                    assert torch.allclose(states[row, at], made.states(batch, first, 1)[row, a, 0], atol=1e-5)
                z, p = made.head(states[row, at]), batch.logits[row, root + 1].exp()
                apart = (p - z.softmax(-1)).abs().sum()
                order = p.argsort(descending=True)[:10]
                rank = sum(z[order[i:]].logsumexp(0) - z[order[i]] for i in range(10))
                losses.append(float((10 * apart + 0.1 * rank).detach()))
    loss, _ = made.loss(batch, first)
    assert float(loss.detach()) == pytest.approx(sum(losses) / len(losses), rel=1e-4)
