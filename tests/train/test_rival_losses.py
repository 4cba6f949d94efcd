"""The rivals' losses, computed by hand, and their training stages."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

import rivals
import tiny
from msd.drafters import registry
from msd.drafters.algorithms.vispec import ViSpec
from msd.drafters.toolkit import checkpoint
from msd.drafters.toolkit.training import Objective, TargetOutputs
from msd.train.losses import terms
from msd.train.losses.published import states_everywhere
from msd.train.teacher_batches import PublishedStages

MODEL = tiny.llava()


def test_terms_by_hand() -> None:
    torch.manual_seed(0)
    z, t, h, g = torch.randn(6), torch.randn(6), torch.randn(4) * 3, torch.randn(4)
    p, q = t.exp() / t.exp().sum(), z.exp() / z.exp().sum()
    assert float(terms.soft_entropy(z, p)) == pytest.approx(-sum(float(a * b.log()) for a, b in zip(p, q, strict=True)))
    assert float(terms.hard_entropy(z, torch.tensor(2))) == pytest.approx(-math.log(float(q[2])))
    assert float(terms.distance(z, p)) == pytest.approx(sum(abs(float(a - b)) for a, b in zip(p, q, strict=True)))
    short = p[:4]  # a third of the tokens are outside the draft vocabulary
    expected = float((short - z[:4].softmax(-1)).abs().sum() + p[4:].sum())
    assert float(terms.distance(z[:4], short)) == pytest.approx(expected)
    smooth = [0.5 * d * d if d < 1 else d - 0.5 for d in (h - g).abs().tolist()]
    assert float(terms.regression(h, g)) == pytest.approx(sum(smooth) / 4)
    order = p.argsort(descending=True).tolist()[:3]
    chance = 1.0
    for i in range(3):
        chance *= float(z[order[i]].exp() / sum(z[j].exp() for j in order[i:]))
    assert float(terms.ranking(z, p, 3)) == pytest.approx(-math.log(chance), rel=1e-5)


def test_target_outputs_at_the_drafted_positions() -> None:
    net = rivals.network(MODEL, "eagle2")
    batch = rivals.teacher_batch(MODEL, net)
    roots = torch.tensor([[0, 3, rivals.LENGTH - 2]] * 4)
    target = TargetOutputs.of(batch, roots, 2, net.config.hidden)
    for a, root in enumerate(roots[0].tolist()):
        for d in range(2):
            at = root + 1 + d
            inside = at < rivals.LENGTH
            assert bool(target.valid[1, a, d]) == inside
            if inside:
                assert torch.equal(target.p[1, a, d], batch.logits[1, at].exp())
                assert int(target.token[1, a, d]) == int(batch.answers[1, at])
                state = batch.taps[1, batch.prompt + at - 1, -net.config.hidden :]
                assert torch.equal(target.state[1, a, d], state)
                assert torch.allclose((net.head(state)).softmax(-1), target.p[1, a, d], atol=1e-5)
    values = torch.arange(24.0).view(4, 3, 2)
    assert float(target.mean(values)) == pytest.approx(float(values[target.valid].mean()))


def test_eagle_3_weighs_levels_and_ignores_tokens_outside_its_vocabulary() -> None:
    net = rivals.network(MODEL, "eagle3", draft_vocabulary=30)
    net.choose_draft_vocabulary(torch.arange(4, 34))
    batch = rivals.teacher_batch(MODEL, net)
    roots = torch.arange(rivals.LENGTH - 1).expand(4, -1)
    loss, _ = net.loss(batch, roots)
    logits = net.logits(net.states(batch, roots, 7), roots)
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
    net = rivals.network(MODEL, "dspark")
    batch = rivals.teacher_batch(MODEL, net)
    roots = torch.tensor([[2, 12]] * 4)
    loss, parts = net.loss(batch, roots)
    states = net.states(batch, roots, 7)
    sums, total = [0.0, 0.0, 0.0], 0.0
    for row in range(4):
        for a, root in enumerate(roots[0].tolist()):
            for k in range(7):
                at = root + 1 + k
                if at >= rivals.LENGTH:
                    continue
                parent = batch.answers[row, at - 1]
                q = net.logits(states[row, a, k], parent).softmax(-1)
                p = batch.logits[row, at].exp()
                l1 = float((p - q).abs().sum().detach())
                c = float(net.confidence_logits(states[row, a, k], parent).sigmoid().detach())
                met, weight = 1 - l1 / 2, math.exp(-k / 4)
                entropy = -math.log(float(q[batch.answers[row, at]].detach()))
                confidence = -met * math.log(c) - (1 - met) * math.log(1 - c)
                sums = [s + weight * v for s, v in zip(sums, (l1, entropy, confidence), strict=True)]
                total += weight
    l1, entropy, confidence = (s / total for s in sums)
    assert [float(parts[n].detach()) for n in ("distance", "entropy", "confidence")] == pytest.approx(
        [l1, entropy, confidence], rel=1e-3
    )
    assert float(loss.detach()) == pytest.approx(0.9 * l1 + 0.1 * entropy + confidence, rel=1e-3)


def test_stages_are_those_published() -> None:
    share = {m: PublishedStages.for_run(rivals.network(MODEL, m).stages, 1000) for m in rivals.RIVALS}
    msd = [share["msd-published"].share(s) for s in (0, 499, 500, 750, 1000)]
    assert msd == pytest.approx([0, 0, 0, 0.5, 1])
    assert [share["vispec"].share(s) for s in (0, 299, 300, 999)] == [0, 0, 1, 1]
    assert share["eagle2"].share(10) == 0 and share["eagle2"].share(20) == 0.5 and share["eagle2"].share(999) == 0.95


@pytest.mark.parametrize("method", rivals.RIVALS)
def test_half_precision_training_is_nearly_the_same(method: str) -> None:
    net = rivals.network(MODEL, method)
    batch, roots = rivals.teacher_batch(MODEL, net), torch.arange(rivals.LENGTH - 1).expand(4, -1)
    objective = Objective(net)
    whole, _ = objective(batch, torch.zeros(4, rivals.LENGTH), roots)
    with torch.autocast("cpu", torch.bfloat16):
        half, _ = objective(batch, torch.zeros(4, rivals.LENGTH), roots)
    half.backward()
    assert float(half.detach()) == pytest.approx(float(whole.detach()), rel=0.05)


@pytest.mark.parametrize("method", rivals.RIVALS)
def test_every_method_learns_where_answers_end(method: str, tmp_path: Path) -> None:
    """The probe reaches no other weight, and is saved with the network."""
    net = rivals.network(MODEL, method)
    batch, roots = rivals.teacher_batch(MODEL, net), torch.arange(-2, rivals.LENGTH - 1).expand(4, -1)
    labels, end = torch.zeros(4, rivals.LENGTH), int(batch.answers[0, -1])
    alone, _ = Objective(net)(batch, labels, roots)
    own = {name: p.detach().clone() for name, p in net.named_parameters()}
    net.add_ending()
    objective = Objective(net, [end])
    loss, _ = objective(batch, labels, roots)
    assert float(loss.detach()) > float(alone.detach())
    extra = objective.ending_loss(batch, roots)
    assert isinstance(extra, torch.Tensor)
    extra.backward()
    assert {name for name, p in net.named_parameters() if p.grad is not None} == {
        f"ending.{name}" for name, _ in net.ending.named_parameters()
    }
    optimizer = torch.optim.AdamW(net.ending.parameters(), lr=0.02)
    for _ in range(60):
        optimizer.zero_grad()
        objective.ending_loss(batch, roots).backward()  # type: ignore[union-attr]
        optimizer.step()
    said, last, valid = objective.endings(batch, roots)
    assert not valid[:, :2].any(), "what follows a root in the prompt is no ending of a decoded answer"
    assert torch.equal(last[:, 2:], batch.answers[:, 1:] == end)
    assert ((said > 0) == last)[valid].float().mean() > 0.97
    checkpoint.save(net, tmp_path / "own")
    again = registry.load(tmp_path / "own").attach(MODEL)
    after = objective.endings(batch, roots)[0]
    assert torch.allclose(Objective(again, [end]).endings(batch, roots)[0], after, atol=0.05, rtol=0.05)
    assert all(torch.equal(p, own[name]) for name, p in net.named_parameters() if name in own)


def test_chains_count_correct_drafts() -> None:
    """Counts the drafts of a network that is always correct, and of one that never is."""
    net = rivals.network(MODEL, "eagle2")
    batch = rivals.teacher_batch(MODEL, net)
    answers = batch.answers
    labels = torch.arange(rivals.LENGTH).expand(4, -1) % 3
    for shift, correct in ((0, True), (1, False)):
        seen: list[int] = []

        def logits(
            states: torch.Tensor, parents: torch.Tensor, seen: list[int] = seen, shift: int = shift
        ) -> torch.Tensor:
            d = len(seen)
            seen.append(d)
            at = (torch.arange(states.shape[1]) + 1 + d).clamp_max(rivals.LENGTH - 1)
            token = (answers[:, at] + shift) % 64
            return torch.nn.functional.one_hot(token, 64).float()

        net.logits = logits  # type: ignore[method-assign]
        counts = Objective(net).acceptance(batch, labels)
        accepted, drafted = (sum(c[i] for c in counts.values()) for i in (0, 1))
        assert accepted == (drafted if correct else 0)
        each = [min(5, rivals.LENGTH - 1 - r) if correct else 1 for r in range(rivals.LENGTH - 1)]
        assert drafted == 4 * sum(each)


def test_eagles_loss_by_hand() -> None:
    net = rivals.network(MODEL, "msd-published")
    batch = rivals.teacher_batch(MODEL, net)
    roots = torch.tensor([[0, 6, rivals.LENGTH - 1]] * 4)  # below the last token nothing is drafted
    loss, parts = net.loss(batch, roots)
    states = net.states(batch, roots, 1)[:, :, 0]
    target = batch.taps[:, batch.prompt - 1 : -1, -net.config.hidden :] if batch.taps is not None else None
    assert target is not None
    regression, entropy = [], []
    for row in range(4):
        for a, root in ((0, 0), (1, 6)):
            off = (states[row, a] - target[row, root + 1]).abs()
            regression.append(float(torch.where(off < 1, 0.5 * off * off, off - 0.5).mean().detach()))
            q = net.head(states[row, a]).log_softmax(-1)
            entropy.append(-float((batch.logits[row, root + 1].exp() * q).sum().detach()))
    mean = lambda values: sum(values) / len(values)  # noqa: E731
    assert float(parts["regression"].detach()) == pytest.approx(mean(regression), rel=1e-4)
    assert float(loss.detach()) == pytest.approx(mean(regression) + 0.1 * mean(entropy), rel=1e-4)


def test_vispecs_second_stage_by_hand() -> None:
    """The loss averages a pass on target features and a pass on the states that the first pass drafted."""
    net = rivals.network(MODEL, "vispec")
    assert isinstance(net, ViSpec)
    batch = rivals.teacher_batch(MODEL, net)
    roots = torch.tensor([[1, 9]] * 4)
    selection = net.select(batch.layout, batch.taps[:, :-1], batch.prompt)
    feature = net.feature(selection.taps)
    plain = states_everywhere(net, selection, feature)
    fed = feature.clone()
    for s in range(1, fed.shape[1]):
        fed[:, s] = plain[:, s - 1]
    losses = []
    for states in (plain, states_everywhere(net, selection, fed)):
        for row in range(4):
            for a, root in enumerate(roots[0].tolist()):
                at = int(selection.slot[row, batch.prompt - 1 + root])
                if states is plain:
                    assert torch.allclose(states[row, at], net.states(batch, roots, 1)[row, a, 0], atol=1e-5)
                z, p = net.head(states[row, at]), batch.logits[row, root + 1].exp()
                l1 = (p - z.softmax(-1)).abs().sum()
                order = p.argsort(descending=True)[:10]
                rank = sum(z[order[i:]].logsumexp(0) - z[order[i]] for i in range(10))
                losses.append(float((10 * l1 + 0.1 * rank).detach()))
    loss, _ = net.loss(batch, roots)
    assert float(loss.detach()) == pytest.approx(sum(losses) / len(losses), rel=1e-4)
