"""χ² goodness-of-fit tests for sampled tokens, with Bonferroni's correction for multiple tests."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import numpy as np
import torch
from numpy.typing import ArrayLike
from scipy import stats
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
)

from msd.core.statistics import Statistics
from msd.drafters import Drafter
from msd.model import SpeculativeVLM

LEAST_EXPECTED = 5.0  # Cochran's rule: with fewer expected draws in a cell the statistic does not follow χ²


def chi2_p_value(counts: ArrayLike, expected_probabilities: ArrayLike) -> float:
    """The p-value of the hypothesis that `counts` were drawn from `expected_probabilities`.

    counts: draws per outcome, any shape. expected_probabilities: same shape, sums to 1. Outcomes with fewer than 5
    expected draws are pooled. If an outcome of probability 0 was drawn, the result is 0.0.
    """
    observed = np.asarray(counts, dtype=np.float64).ravel()
    p = np.asarray(expected_probabilities, dtype=np.float64).ravel()
    if observed.shape != p.shape:
        raise ValueError(f"{observed.size} counts for {p.size} probabilities")
    if not np.isclose(p.sum(), 1.0, atol=1e-4) or p.min() < 0:
        raise ValueError(f"the expected probabilities sum to {p.sum():.6f} (least {p.min():.2g}), not to 1")
    if observed[p == 0].any():
        return 0.0
    observed, expected = _pool(observed, p / p.sum() * observed.sum())
    if len(observed) < 2:
        raise ValueError(f"{int(observed.sum())} draws are too few to test this distribution")
    return float(stats.chisquare(observed, expected).pvalue)


def _pool(observed: np.ndarray, expected: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Merges the rarest outcomes into one cell until every cell expects at least 5 draws."""
    order = np.argsort(expected, kind="stable")
    observed, expected = observed[order], expected[order]
    rare = int((expected < LEAST_EXPECTED).sum())
    while rare < len(expected) and 0.0 < expected[:rare].sum() < LEAST_EXPECTED:
        rare += 1
    if rare == 0:
        return observed, expected
    observed = np.append(observed[rare:], observed[:rare].sum())
    expected = np.append(expected[rare:], expected[:rare].sum())
    possible = expected > 0
    return observed[possible], expected[possible]


def rejects(p_values: Sequence[float], alpha: float) -> bool:
    """Whether any of the hypotheses is rejected, with a family-wise false-rejection rate of at most `alpha`."""
    return any(p <= alpha / len(p_values) for p in p_values)  # Bonferroni


VOCABULARY, EOS, TOKENS, ROWS = 6, 2, 4, 500
SETTINGS: tuple[tuple[float, int], ...] = ((1.0, 0), (0.7, 4))  # (temperature, top-k; 0: off)


def end_to_end_p_values(drafter: Drafter, draws: int) -> list[float]:
    """χ² p-values of the joint distribution of four new tokens, from at least `draws` answers per entry of `SETTINGS`.

    A twin of `drafter` drafts for a tiny model. The seeds are fixed, so the values are reproducible. 10⁵ draws take
    about one minute per setting.
    """
    model = tiny_model()
    engine = SpeculativeVLM(model, None, drafter=drafter.twin(model))
    values = []
    for temperature, top_k in SETTINGS:
        counts, _ = count_answers(engine, draws, temperature, top_k)
        values.append(chi2_p_value(counts.numpy(), exact_distribution(model, temperature, top_k).numpy()))
    return values


def tiny_model(seed: int = 1) -> LlavaForConditionalGeneration:
    """A random LLaVA with a vocabulary of 6 tokens, used without images; the image placeholder is outside it."""
    text = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=128, bos_token_id=1, eos_token_id=EOS, pad_token_id=0,
    )  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, image_size=8, patch_size=8,
        projection_dim=8,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlavaForConditionalGeneration(
            LlavaConfig(vision_config=vision, text_config=text, image_token_id=VOCABULARY, vision_feature_layer=-1)
        )
    with torch.no_grad():
        model.lm_head.weight.mul_(15.0)  # random weights give nearly uniform distributions
    return model.eval()


def prompt() -> Tensor:
    """[1, 33] int64: four tokens in random order, so that most pairs occur with several continuations."""
    tokens = torch.randint(2, VOCABULARY, (32,), generator=torch.Generator().manual_seed(0))
    return torch.cat([torch.ones(1, dtype=torch.long), tokens])[None]


def count_answers(
    engine: SpeculativeVLM, draws: int, temperature: float, top_k: int, seed: int = 0
) -> tuple[Tensor, Statistics]:
    """Counts of each answer in at least `draws` sampled answers, [V, V, V, V], and the statistics of drafting."""
    ids = prompt().expand(ROWS, -1)
    generator = torch.Generator().manual_seed(seed)
    counts, total = torch.zeros((VOCABULARY,) * TOKENS, dtype=torch.long), Statistics()
    for _ in range(-(-draws // ROWS)):
        results = engine.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=True, temperature=temperature, top_k=top_k,
            max_new_tokens=TOKENS, eos_token_id=EOS, pad_token_id=0, seed=generator,
        )  # fmt: skip
        assert isinstance(results, list)
        answers = torch.tensor([r.tokens + [0] * (TOKENS - len(r.tokens)) for r in results])
        counts.index_put_(tuple(answers.T), torch.ones(ROWS, dtype=torch.long), accumulate=True)
        total.add(results[0].statistics)
    return counts, total


@torch.no_grad()
def exact_distribution(model: LlavaForConditionalGeneration, temperature: float, top_k: int) -> Tensor:
    """The joint distribution of the answer, [V, V, V, V] float64; tokens after EOS count as token 0."""
    processors = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    if top_k:
        processors.append(TopKLogitsWarper(top_k))
    prefixes = torch.tensor(list(product(range(VOCABULARY), repeat=TOKENS - 1)))  # [V³, 3]
    ids = torch.cat([prompt().expand(len(prefixes), -1), prefixes], dim=1)
    logits = model(input_ids=ids).logits[:, -TOKENS:]  # after the prompt and after each token of the prefix
    p = processors(ids[:, :1], logits.reshape(-1, VOCABULARY)).double().softmax(-1).view(-1, TOKENS, VOCABULARY)
    prefix_p = p[:, :-1].gather(2, prefixes[:, :, None])[:, :, 0].prod(dim=1)
    outcomes = torch.tensor(list(product(range(VOCABULARY), repeat=TOKENS)))
    ended = (outcomes == EOS).long().cumsum(1) - (outcomes == EOS).long() > 0
    joint = (prefix_p[:, None] * p[:, -1]).reshape(-1)
    out = torch.zeros((VOCABULARY,) * TOKENS, dtype=torch.float64)
    return out.index_put_(tuple(outcomes.masked_fill(ended, 0).T), joint, accumulate=True)
