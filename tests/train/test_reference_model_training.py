"""Training on a packed batch equals training on each question alone."""

from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from recipes.reference_vlm.model import CELLS, COLOURS, HIDDEN, VISION, ModelConfig, TrainableVLM
from recipes.reference_vlm.pack import IMAGE, Batch, Branch, Sample, pack
from recipes.reference_vlm.train import weighted_loss
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

PICTURE = (*[IMAGE] * CELLS, 5)
CAPTION, SHORT = Branch((10, 11), (12, 13, 14, 2), "caption"), Branch((20,), (21, 2), "vqa", 3.0)
AVOID = Branch((10, 11, 12, 13), (14, 15, 16), "avoid", 4.0, avoid=True)
SEEN = Sample((1, 4, *PICTURE), (CAPTION, SHORT, AVOID), (("flickr", 0),))
BLIND = Sample((1, 4, *PICTURE), (CAPTION, SHORT), (("flickr", 1),), blind=True)
FRAMES = Sample((1, 4, *PICTURE, *PICTURE), (SHORT, CAPTION), (("clips", 0),))
TEXT = Sample((1, 4), (Branch((30, 31, 32), (33, 34), "text"),))
ROWS = ((SEEN, BLIND), (TEXT, FRAMES, TEXT))
LENGTH = 180
Models = tuple[TrainableVLM, Any]  # the model that learns, and the same language model left alone


def small(bf16: bool = False) -> Models:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=HIDDEN, intermediate_size=64, num_hidden_layers=2, num_attention_heads=9,
        num_key_value_heads=3, attn_implementation="sdpa",
    )  # fmt: skip
    lm = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        lm.lm_head.weight.mul_(4)  # distributions that are not nearly uniform
    plain = deepcopy(lm)
    return TrainableVLM(lm, ModelConfig(rank=2, bf16=bf16)).eval(), plain


@pytest.fixture
def models() -> Models:
    return small()


def pictures(seed: int = 0, n: int = 4) -> Tensor:
    """Features of the four pictures of ROWS: seen, blind, and two frames."""
    return torch.randn(n, CELLS, VISION + COLOURS, generator=torch.Generator().manual_seed(seed))


def packed(*rows: tuple[Sample, ...], features: Tensor | None = None) -> Batch:
    return replace(pack(rows, LENGTH, 2), features=pictures() if features is None else features)


def entropies_alone(models: Models, sample: Sample, branch: Branch, features: Tensor) -> Tensor:
    """-log p of a branch's answer with plain causal attention; blind samples skip the positions of image tokens."""
    model, plain = models
    ids = torch.tensor(sample.prefix + branch.question + branch.answer)
    x = plain.model.embed_tokens(ids.clamp(min=0))
    x[ids == IMAGE] = model.image_tokens(features).flatten(0, 1)
    at = torch.arange(len(ids))
    at = at[ids != IMAGE] if sample.blind else at
    mask = torch.ones(1, len(at), dtype=torch.long)  # without it, gaps would be taken for borders of packed texts
    logits = plain(inputs_embeds=x[None, at], position_ids=at[None], attention_mask=mask).logits[0]
    n = len(branch.answer)
    return F.cross_entropy(logits[-n - 1 : -1], ids[-n:], reduction="none")


@torch.no_grad()
def test_packed_losses_equal_those_of_each_branch_alone(models: Models) -> None:
    features, expected = pictures(), []
    shown = (features[:1], features[1:2], features[:0], features[2:], features[:0])
    for sample, own in zip((s for row in ROWS for s in row), shown, strict=True):
        for branch in sample.branches:
            entropy = entropies_alone(models, sample, branch, own)
            expected.append(-torch.log(1 - torch.exp(-entropy)) if branch.avoid else entropy)
    torch.testing.assert_close(models[0].losses(packed(*ROWS)), torch.cat(expected), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_answers_with_a_shared_question_equal_separate_ones(models: Models) -> None:
    answers = (CAPTION.answer, SHORT.answer, (44, 45, 46, 2))
    shared = Sample(
        (1, 4, *PICTURE, *CAPTION.question), tuple(Branch((), a, "caption") for a in answers), (("flickr", 0),)
    )
    own = Sample((1, 4, *PICTURE), tuple(Branch(CAPTION.question, a, "caption") for a in answers), (("flickr", 0),))
    features = pictures(n=1)
    expected = torch.cat([entropies_alone(models, own, b, features) for b in own.branches])
    for sample in (shared, own):
        found = models[0].losses(packed((sample,), features=features))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_blind_samples_ignore_their_picture_and_others_see_only_their_own(models: Models) -> None:
    before, n = models[0].losses(packed(*ROWS)), [sum(len(b.answer) for b in s.branches) for s in (SEEN, BLIND, TEXT)]
    parts = {"seen": slice(0, n[0]), "blind": slice(n[0], n[0] + n[1]), "frames": slice(sum(n), -n[2])}
    for picture, owner in enumerate(("seen", "blind", "frames", "frames")):
        features = pictures()
        features[picture] = pictures(seed=1)[picture]
        changed = (models[0].losses(packed(*ROWS, features=features)) - before).abs() > 1e-4
        assert changed[parts[owner]].all() == (owner != "blind")
        changed[parts[owner]] &= owner == "blind"
        assert not changed.any()


@pytest.mark.parametrize("bf16", [False, True])
@torch.no_grad()
def test_attention_is_causal(bf16: bool) -> None:
    model, _ = small(bf16)
    before = model.losses(packed((SEEN,), features=pictures(n=1)))
    for i in range(4):
        answer = (*CAPTION.answer[:i], 40, *CAPTION.answer[i + 1 :])
        other = replace(SEEN, branches=(replace(CAPTION, answer=answer), SHORT, AVOID))
        changed = model.losses(packed((other,), features=pictures(n=1))) != before
        assert changed.tolist() == [False] * i + [True] * (4 - i) + [False] * 5


def test_tokens_to_avoid_become_unlikely(models: Models) -> None:
    model, plain = models
    likeliest = plain(torch.tensor([[1, 4, 10, 11]])).logits[0, -1].argmax().item()
    plain, avoid = Branch((10, 11), (12,), "caption"), replace(AVOID, question=(10, 11), answer=(likeliest,))
    batch = packed((Sample((1, 4), (plain, avoid)),), features=torch.zeros(0))
    ordinary = replace(batch, avoid=torch.zeros(2, dtype=torch.bool))
    before = torch.exp(-model.losses(ordinary))
    losses = model.losses(batch)
    torch.testing.assert_close(losses, -torch.stack([before[0].log(), (1 - before[1]).log()]))
    loss, parts = weighted_loss(losses, batch)
    assert loss.item() == pytest.approx((losses[0] + 4 * losses[1]).item() / 5)
    assert parts == {"caption": losses[0].item(), "avoid": losses[1].item()}
    losses[1].backward()
    with torch.no_grad():
        for p in model.parameters():
            if p.grad is not None:
                p -= 0.1 * p.grad
    assert torch.exp(-model.losses(ordinary))[1] < 0.9 * before[1]


def test_a_repetition_with_probability_one_still_has_a_gradient(models: Models) -> None:
    model, _ = models
    model.lm.lm_head.weight.data.mul_(1000)
    logits = model.lm(torch.tensor([[1, 4, 10, 11]])).logits[0, -1].detach()
    avoid = replace(AVOID, question=(10, 11), answer=(int(logits.argmax()),))
    loss = model.losses(packed((Sample((1, 4), (avoid,)),), features=torch.zeros(0)))
    target = int(logits.argmax())
    others = torch.cat([logits[:target], logits[target + 1 :]])
    assert loss.item() == pytest.approx(float(logits.logsumexp(-1) - others.logsumexp(-1)), rel=1e-3)
    loss.sum().backward()
    moved = [n for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0]
    assert any(n.startswith("lm.") for n in moved)


def test_only_answers_of_ordinary_branches_are_targets() -> None:
    batch = packed(*ROWS)
    answers = [b.answer for row in ROWS for s in row for b in s.branches if not b.avoid]
    assert batch.targets[~batch.avoid].tolist() == [i for a in answers for i in a]
    assert batch.targets[batch.avoid].tolist() == list(AVOID.answer)
    assert [t == "avoid" for t in batch.tasks] == batch.avoid.tolist()


def test_only_the_projector_and_the_factors_learn(models: Models) -> None:
    model, _ = models
    loss, _ = weighted_loss(model.losses(packed(*ROWS)), packed(*ROWS))
    loss.backward()
    learning = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert {n for n in learning if not n.startswith("lm.")} == {
        "tower.norm.weight", "tower.norm.bias", "tower.pos", "tower.colour", "linear_1.weight", "linear_1.bias",
        "linear_2.weight", "linear_2.bias",
    }  # fmt: skip
    assert {n for n in learning if n.startswith("lm.")} == {n for n, _ in model.named_parameters() if n.endswith(".B")}
