"""One position, many rows: the same law p and the same drafter everywhere, one token emitted a row, tokens counted."""

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
    rows: int, laws: Sequence[Sequence[float]] = (), fixed: Sequence[int] = (), q: Sequence[float] = (), seed: int = 1
) -> DraftTree:
    """Below each root the deterministic tokens `fixed`, then one draw from each of `laws`; q: of the fixed tokens."""
    F, K = len(fixed), len(laws)
    N = 1 + F + K
    generator = torch.Generator().manual_seed(seed)
    table = torch.tensor(laws).view(K, V)
    drawn = [torch.multinomial(law, rows, True, generator=generator) for law in table]
    still = [torch.full((rows,), token) for token in (0, *fixed)]
    parents = torch.tensor([-1] + [0] * (N - 1)).expand(rows, -1)
    child, law = torch.full((rows, N, max(K, 1)), -1), torch.zeros(rows, N, max(K, 1), dtype=torch.long)
    for k in range(K):
        child[:, 0, k], law[:, 0, k] = 1 + F + k, k
    marks = torch.tensor([False] + [True] * F + [False] * K).expand(rows, -1)
    return DraftTree(
        tokens=torch.stack(still + drawn, 1), parents=parents, depths=(parents >= 0).long(),
        valid=torch.ones(rows, N, dtype=torch.bool), modality=torch.zeros(rows, N, dtype=torch.long), fixed=marks,
        height=1, candidates=SampledCandidates(child, law, table.expand(rows, K, V)) if K else None,
        q=torch.tensor([1.0, *q] + [0.5] * K).expand(rows, -1) if q else None,
    )  # fmt: skip


def accept(verifier: Verifier, tree: DraftTree, p: Sequence[float] = P, kind: int | None = None) -> Accepted:
    """What the verifier emits when the target's law is p everywhere."""
    rows = tree.batch
    logits = torch.tensor(p).log().expand(rows, tree.size, V)
    kinds = None if kind is None else torch.full((rows, tree.size), kind)
    return verifier.accept(tree, Scores(logits, None, kinds), sampler(rows))


def counts(accepted: Accepted) -> Tensor:
    return torch.bincount(torch.tensor([t[0] for t in accepted.tokens]), minlength=V)


def by_enumeration(
    policy: str,
    theta: float,
    laws: Sequence[Sequence[float]] = (),
    fixed: Sequence[int] = (),
    q: Sequence[float] = (),
    p: Sequence[float] = P,
) -> list[float]:
    """The output law from the rules' words, over every combination of draws. Shares no code with the package."""
    total = [0.0] * len(p)
    for drawn in product(range(len(p)), repeat=len(laws)):
        chance = 1.0
        for c, law in zip(drawn, laws, strict=True):
            chance *= law[c]
        for token, share in enumerate(_given_draws(policy, theta, drawn, laws, fixed, q, list(p))):
            total[token] += chance * share
    return total


def _given_draws(
    policy: str,
    theta: float,
    drawn: Sequence[int],
    laws: Sequence[Sequence[float]],
    fixed: Sequence[int],
    q: Sequence[float],
    p: list[float],
) -> list[float]:
    out, reach = [0.0] * len(p), 1.0
    if policy == "threshold":
        known = q or [1.0] * len(fixed)
        for draft_q, _, token in sorted(((-b, -p[c], c) for b, c in zip(known, fixed, strict=True))):
            if min(1.0, p[token] / -draft_q) >= theta:
                out[token] = 1.0
                return out
    elif fixed:
        mass = sum(p[c] for c in fixed)
        for c in fixed:
            out[c] = p[c] / mass if mass >= theta else p[c]
        reach = 0.0 if mass >= theta else 1 - mass
    r = [0.0 if c in fixed else x for c, x in enumerate(p)]
    r = [x / sum(r) for x in r]
    for c, law in zip(drawn, laws, strict=True):
        alpha = min(1.0, r[c] / law[c])
        sure = alpha >= theta and r[c] > 0
        a = 1.0 if sure else 0.0 if policy == "threshold" else alpha
        out[c] += reach * a
        reach *= 1 - a
        left = [max(x - y, 0.0) for x, y in zip(r, law, strict=True)]
        r = [x / sum(left) for x in left]
    return [o + reach * x for o, x in zip(out, r, strict=True)]


def distance(law: Sequence[float], p: Sequence[float] = P) -> float:
    return sum(abs(a - b) for a, b in zip(law, p, strict=True)) / 2
