"""Many rows at one position: each has the same p and the same drafter, and emits one token; tests count the tokens."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import torch
from torch import Tensor
from transformers import LogitsProcessorList, StoppingCriteriaList
from transformers.generation.stopping_criteria import MaxLengthCriteria

from msd.core.layout import Layout
from msd.core.sampling import Randomness, Sampler
from msd.core.tree import Accepted, DraftTree, SampledCandidates, Scores
from msd.verify import Verifier

P = [0.30, 0.25, 0.20, 0.15, 0.08, 0.02]
Q = [[0.20, 0.32, 0.04, 0.10, 0.14, 0.20], [0.05, 0.10, 0.30, 0.35, 0.05, 0.15], [0.5, 0.1, 0.1, 0.1, 0.1, 0.1]]
V = len(P)


class OneToken(Sampler):
    """Every row ends with its first token."""

    def emit(self, row: int, token: int) -> bool:
        return False


def sampler(rows: int, seed: Randomness | int = 0, do_sample: bool = True) -> OneToken:
    layout = Layout.from_prompt(torch.zeros(rows, 1, dtype=torch.long), 12)
    criteria = StoppingCriteriaList([MaxLengthCriteria(12)])
    randomness = torch.Generator().manual_seed(seed) if isinstance(seed, int) else seed
    return OneToken(layout, LogitsProcessorList(), criteria, do_sample, V, randomness)


def draft(
    rows: int,
    distributions: Sequence[Sequence[float]] = (),
    deterministic: Sequence[int] = (),
    q: Sequence[float] = (),
    seed: int = 1,
) -> DraftTree:
    """Trees with the tokens `deterministic` (draft probabilities q), then one draw from each of `distributions`."""
    F, K = len(deterministic), len(distributions)
    N = 1 + F + K
    generator = torch.Generator().manual_seed(seed)
    table = torch.tensor(distributions).view(K, V)
    drawn = [torch.multinomial(distribution, rows, True, generator=generator) for distribution in table]
    still = [torch.full((rows,), token) for token in (0, *deterministic)]
    parents = torch.tensor([-1] + [0] * (N - 1)).expand(rows, -1)
    child, distribution = torch.full((rows, N, max(K, 1)), -1), torch.zeros(rows, N, max(K, 1), dtype=torch.long)
    for k in range(K):
        child[:, 0, k], distribution[:, 0, k] = 1 + F + k, k
    marks = torch.tensor([False] + [True] * F + [False] * K).expand(rows, -1)
    return DraftTree(
        tokens=torch.stack(still + drawn, 1), parents=parents, depths=(parents >= 0).long(),
        valid=torch.ones(rows, N, dtype=torch.bool), modality=torch.zeros(rows, N, dtype=torch.long),
        deterministic=marks, height=1,
        candidates=SampledCandidates(child, distribution, table.expand(rows, K, V)) if K else None,
        q=torch.tensor([1.0, *q] + [0.5] * K).expand(rows, -1) if q else None,
    )  # fmt: skip


def accept(verifier: Verifier, tree: DraftTree, p: Sequence[float] = P, kind: int | None = None) -> Accepted:
    """Runs the verifier with p as the target's distribution at every node."""
    rows = tree.batch
    logits = torch.tensor(p).log().expand(rows, tree.size, V)
    kinds = None if kind is None else torch.full((rows, tree.size), kind)
    return verifier.accept(tree, Scores(logits, None, kinds), sampler(rows))


def counts(accepted: Accepted) -> Tensor:
    return torch.bincount(torch.tensor([t[0] for t in accepted.tokens]), minlength=V)


def by_enumeration(
    policy: str,
    threshold: float,
    distributions: Sequence[Sequence[float]] = (),
    deterministic: Sequence[int] = (),
    q: Sequence[float] = (),
    p: Sequence[float] = P,
) -> list[float]:
    """The output distribution by enumeration of all combinations of draws; shares no code with the package."""
    total = [0.0] * len(p)
    for drawn in product(range(len(p)), repeat=len(distributions)):
        probability = 1.0
        for c, distribution in zip(drawn, distributions, strict=True):
            probability *= distribution[c]
        for token, share in enumerate(_given_draws(policy, threshold, drawn, distributions, deterministic, q, list(p))):
            total[token] += probability * share
    return total


def _given_draws(
    policy: str,
    threshold: float,
    drawn: Sequence[int],
    distributions: Sequence[Sequence[float]],
    deterministic: Sequence[int],
    q: Sequence[float],
    p: list[float],
) -> list[float]:
    out, reach = [0.0] * len(p), 1.0
    if policy == "threshold":
        known = q or [1.0] * len(deterministic)
        for draft_q, _, token in sorted(((-b, -p[c], c) for b, c in zip(known, deterministic, strict=True))):
            if min(1.0, p[token] / -draft_q) >= threshold:
                out[token] = 1.0
                return out
    elif deterministic:
        total = sum(p[c] for c in deterministic)
        for c in deterministic:
            out[c] = p[c] / total if total >= threshold else p[c]
        reach = 0.0 if total >= threshold else 1 - total
    r = [0.0 if c in deterministic else x for c, x in enumerate(p)]
    r = [x / sum(r) for x in r]
    for c, distribution in zip(drawn, distributions, strict=True):
        alpha = min(1.0, r[c] / distribution[c])
        always = alpha >= threshold and r[c] > 0
        a = 1.0 if always else 0.0 if policy == "threshold" else alpha
        out[c] += reach * a
        reach *= 1 - a
        left = [max(x - y, 0.0) for x, y in zip(r, distribution, strict=True)]
        r = [x / sum(left) for x in left]
    return [o + reach * x for o, x in zip(out, r, strict=True)]


def distance(distribution: Sequence[float], p: Sequence[float] = P) -> float:
    return sum(abs(a - b) for a, b in zip(distribution, p, strict=True)) / 2
