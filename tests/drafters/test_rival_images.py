"""SpecVLM's image compression, and the pruning of its namesake for video."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

import rivals
import tiny
from msd.drafters.algorithms.eagle2 import Eagle2
from msd.drafters.algorithms.specvlm import BRANCHES, Compressor
from msd.drafters.algorithms.specvlm_video import SpecVLMVideo, kept_tokens
from msd.drafters.toolkit.context import text_columns
from msd.targets import adapt
from msd.targets.teacher import run_teacher

MODEL = tiny.llava()


def compressor(branch: str | None = None, tokens: int = 3) -> Compressor:
    torch.manual_seed(0)
    net = Compressor(8, 2, tokens).eval()
    if branch is not None:
        torch.nn.init.zeros_(net.gate.weight)
        net.gate.bias.data = torch.eye(len(BRANCHES))[BRANCHES.index(branch)] * 9
    return net


def by_hand(net: Compressor, branch: str, image: Tensor) -> Tensor:
    """One image [n, 8] without padding -> [K, 8], K = min(tokens, n)."""
    n, K = len(image), min(net.tokens, len(image))
    runs = [[j for j in range(n) if j * K // n == k] for k in range(K)]
    if branch == "pool":
        return torch.stack([sum(image[j] for j in run) / len(run) for run in runs])
    if branch == "conv":
        w, b = net.near.weight[:, 0], net.near.bias
        padded = torch.cat([torch.zeros(1, 8), image, torch.zeros(1, 8)])
        near = torch.stack([sum(w[:, t] * padded[j + t] for t in range(3)) + b for j in range(n)])
        mixed = torch.nn.functional.silu(near) @ net.mix.weight.T
        return torch.stack([sum(mixed[j] for j in run) / len(run) for run in runs])
    scores = torch.tensor([float(net.score(row)) for row in image])
    best = sorted(scores.argsort(descending=True)[:K].tolist())
    return image[best]


@pytest.mark.parametrize("branch", ["prune", "pool", "conv"])
@torch.no_grad()
def test_compression_by_hand(branch: str) -> None:
    """Compresses images of unequal size in one batch, one of them smaller than its compressed size."""
    net, sizes = compressor(branch), [7, 2, 4]
    states, mask = torch.randn(3, 7, 8), torch.arange(7) < torch.tensor(sizes)[:, None]
    tokens, chosen = net(states, mask, torch.randn(3, 8))
    assert chosen.tolist() == [BRANCHES.index(branch)] * 3
    for image, n, out in zip(states, sizes, tokens, strict=True):
        expected = by_hand(net, branch, image[:n])
        assert torch.allclose(out[: len(expected)], expected, atol=1e-5)


@torch.no_grad()
def test_the_resampler_reads_the_image_alone() -> None:
    net = compressor("resample")
    states = torch.randn(2, 6, 8)
    mask = torch.arange(6) < torch.tensor([[6], [4]])
    tokens, _ = net(states, mask, torch.randn(2, 8))
    other = states.clone()
    other[1, 4:] = 9.0
    assert torch.equal(tokens, net(other, mask, torch.randn(2, 8))[0])
    alone, _ = net(states[1:, :4], mask[1:, :4], torch.randn(1, 8))
    assert torch.allclose(alone[0], tokens[1], atol=1e-6)


def test_the_gate_reads_the_question() -> None:
    """The branch depends on the question; argmax at inference, all branches in training, and the gate learns."""
    net = compressor()
    net.gate.weight.data.normal_(std=2.0)
    states, mask = torch.randn(1, 6, 8), torch.ones(1, 6, dtype=torch.bool)
    chosen = {int(net(states, mask, torch.randn(1, 8) * 3)[1]) for _ in range(60)}
    assert len(chosen) >= 3
    question = torch.randn(1, 8)
    assert len({int(net(states, mask, question)[1]) for _ in range(5)}) == 1
    torch.nn.init.zeros_(net.gate.weight)
    net.train()
    tried = {int(net(states, mask, question)[1]) for _ in range(100)}
    assert tried == set(range(len(BRANCHES)))
    tokens, _ = net(states, mask, question)
    (tokens * torch.randn_like(tokens)).sum().backward()
    assert net.gate.weight.grad is not None and net.gate.weight.grad.any()


def test_the_question_is_the_prompts_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """It excludes padding, image tokens and the answer, which decoding does not know yet."""
    net = rivals.network(MODEL, "specvlm")
    teacher_batch = rivals.teacher_batch(MODEL, net)
    questions: list[Tensor] = []
    forward = Compressor.forward

    def recorded(self: Compressor, states: Tensor, mask: Tensor, question: Tensor) -> tuple[Tensor, Tensor]:
        questions.append(question)
        return forward(self, states, mask, question)

    monkeypatch.setattr(Compressor, "forward", recorded)
    L = teacher_batch.prompt
    net.select(teacher_batch.layout, teacher_batch.taps[:, :-1], L)
    net.select(teacher_batch.layout, teacher_batch.taps[:, :L], L)
    assert torch.equal(questions[0], questions[1]) and len(questions[0]) == 2
    for question, row in zip(questions[0], (1, 2), strict=True):  # the rows with images
        ids = teacher_batch.layout.tokens[row, teacher_batch.layout.start[row] + 1 : L]
        embeddings = net.embed(ids[ids != tiny.IMAGE])
        assert torch.allclose(question, embeddings.mean(0), atol=1e-6)


@pytest.mark.parametrize("branch", BRANCHES)
def test_number_of_tokens_kept_of_an_image(branch: str) -> None:
    net = rivals.network(MODEL, "specvlm", options={"tokens": 3})
    torch.nn.init.zeros_(net.compressor.gate.weight)  # type: ignore[union-attr, arg-type]
    net.compressor.gate.bias.data = torch.eye(len(BRANCHES))[BRANCHES.index(branch)] * 9  # type: ignore[union-attr]
    teacher_batch = rivals.teacher_batch(MODEL, net)
    found = net.select(teacher_batch.layout, teacher_batch.taps[:, :-1], teacher_batch.prompt)
    text = teacher_batch.taps.shape[1] - 1 - torch.tensor(teacher_batch.layout.start)
    images = torch.tensor([s % 3 for s in range(4)])
    left = 0 if branch == "text" else 3
    assert found.present.sum(1).tolist() == (text - 4 * images + left * images.clamp_max(1)).tolist()


def test_attention_is_the_targets() -> None:
    """Compares with the eager attention of `transformers`."""
    net = rivals.network(MODEL, "specvlm-video")
    inputs = tiny.batch(tiny.llava_inputs(1, images=1), tiny.llava_inputs(2, images=2, words=9))
    eager = copy.deepcopy(MODEL)
    eager.set_attn_implementation("eager")
    with torch.no_grad():
        layers = eager(**inputs, output_attentions=True, position_ids=_positions(inputs)).attentions
    teacher_batch = run_teacher(adapt(MODEL, net.config.taps), inputs, [[5, 6, 7]] * 2)
    c = text_columns(
        teacher_batch.layout, teacher_batch.taps[:, :-1], net.embed, net.config.hidden, teacher_batch.prompt
    )
    actual = net.attention(c)  # type: ignore[operator]
    for row in range(2):
        ids = inputs["input_ids"][row]
        last = int((ids == tiny.IMAGE).nonzero().max())
        expected = layers[-1][row, :, last + 1 :].mean(0).mean(0)  # [L]
        for column in range(teacher_batch.prompt - 1):
            if c.visual[row, column]:
                assert float(actual[row, column]) == pytest.approx(float(expected[column + 1]), rel=1e-3)


def _positions(inputs: dict[str, Tensor]) -> Tensor:
    return (inputs["attention_mask"].cumsum(1) - 1).clamp_min(0)


def test_two_stages_of_pruning() -> None:
    """The most attended tokens up to 40% of the attention, then evenly spaced ones; a tenth in total."""
    scores = torch.full((40,), 0.01)
    scores[[7, 30]] = 0.2
    assert kept_tokens(scores).tolist() == [0, 7, 30, 39]  # 4 of 40: two hold 51%, two are spread over the rest
    scores[7] = 0.9
    assert kept_tokens(scores).tolist() == [0, 7, 20, 39]  # one holds 40% already
    assert kept_tokens(torch.full((50,), 0.02)).tolist() == [0, 1, 2, 3, 4]  # a tenth comes before 40%
    assert kept_tokens(torch.tensor([0.1, 0.5, 0.4])).tolist() == [1]


def test_it_drafts_with_eagle_2s_weights() -> None:
    trained = rivals.network(MODEL, "eagle2")
    assert isinstance(trained, Eagle2)
    net = SpecVLMVideo.adopted(trained)
    assert all(torch.equal(net.state_dict()[k], v) for k, v in trained.state_dict().items())
    teacher_batch = rivals.teacher_batch(MODEL, net.attach(MODEL))
    found = net.select(teacher_batch.layout, teacher_batch.taps[:, :-1], teacher_batch.prompt)
    text = teacher_batch.taps.shape[1] - 1 - torch.tensor(teacher_batch.layout.start)
    assert found.present.sum(1).tolist() == (text - torch.tensor([0, 3, 7, 0])).tolist()
