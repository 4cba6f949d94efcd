"""DraftTree: the drafted continuations of the newest token. Scores, Accepted, Step: the results of verifying a tree.

Node 0 is the root, the newest emitted token. Every other node is a drafted token below its parent; parents come first.
The verifier tries the children of a node in order, as *candidates*. A deterministic candidate (top-k, prompt lookup) is
chosen without randomness. A sampled candidate is drawn from a distribution q, which is stored because verification
needs it. Deterministic candidates are tried first. When both kinds propose the same token, they are two candidates on
one node. See docs/verification.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from msd.core.modality import LANGUAGE

# the value of each tensor of a tree at padding nodes
_PADDING: dict[str, float] = {
    "tokens": 0, "parents": -1, "depths": 0, "valid": 0, "modality": LANGUAGE.id, "deterministic": 0, "q": 0.0,
}  # fmt: skip


def _depths(parents: Sequence[int]) -> list[int]:
    """The depths of drafted nodes from their parents' numbers."""
    depth = [0]
    for parent in parents:
        depth.append(depth[parent] + 1)
    return depth[1:]


@dataclass
class SampledCandidates:
    """Sampled candidates, in the order in which each parent tries them.

    child:         [B, N, K] int64, the node of parent n's k-th candidate, -1 for none.
    distribution:  [B, N, K] int64, the row of `distributions` that the candidate was drawn from.
    distributions: [B, R, V] float32, complete draft distributions q at the time of drawing; each sums to 1.
    """

    child: Tensor
    distribution: Tensor
    distributions: Tensor


@dataclass
class DraftTree:
    """B trees of at most N nodes.

    tokens:        [B, N] int64.
    parents:       [B, N] int64, -1 at the root and at padding. A parent has a smaller index than its children.
    depths:        [B, N] int64, 0 at the root.
    valid:         [B, N] bool, False at padding nodes; rows may draft different numbers of nodes.
    modality:      [B, N] int64, ids of `msd.core.modality`.
    deterministic: [B, N] bool, whether the node is a deterministic candidate of its parent.
    height:        the largest depth, an int.
    candidates:    the sampled candidates; None if all are deterministic.
    q:             [B, N] float32, the draft probability of the node's token given its parent, 1 at the root; None if
                   the drafter has no probabilities. The lossless policy does not read it.
    forecast:      for each row, (parent, probability that the target chooses the node, given that it chose the parent)
                   of each drafted node, on the host; empty or None where the drafter predicts nothing.
    """

    tokens: Tensor
    parents: Tensor
    depths: Tensor
    valid: Tensor
    modality: Tensor
    deterministic: Tensor
    height: int
    candidates: SampledCandidates | None = None
    q: Tensor | None = None
    forecast: list[list[tuple[int, float]]] | None = None

    @classmethod
    def root_only(cls, newest: Tensor) -> DraftTree:
        """Trees of the newest tokens [B] without drafts: plain decoding."""
        return cls.from_lists(newest, [[]] * len(newest), [[]] * len(newest))

    @classmethod
    def from_lists(
        cls,
        newest: Tensor,
        tokens: list[list[int]],
        parents: list[list[int]],
        candidates: SampledCandidates | None = None,
        deterministic: list[list[bool]] | None = None,
        modality: list[list[int]] | None = None,
        q: list[list[float]] | None = None,
    ) -> DraftTree:
        """Builds trees from lists of drafted nodes, one list per row, without the root; parent 0 is the root.

        By default all nodes are deterministic candidates of the language modality.
        """
        most, depths = max(map(len, tokens), default=0), [_depths(row) for row in parents]

        def padded(rows: Sequence[Sequence[float]], root: float, name: str) -> list[list[float]]:
            return [[root, *row, *[_PADDING[name]] * (most - len(row))] for row in rows]

        ones = [[1] * len(row) for row in tokens]
        language = [[LANGUAGE.id] * len(row) for row in tokens]
        table = torch.tensor(
            [
                padded(tokens, 0, "tokens"), padded(parents, -1, "parents"), padded(depths, 0, "depths"),
                padded(ones, 1, "valid"), padded(modality or language, LANGUAGE.id, "modality"),
                padded(deterministic or ones, 0, "deterministic"),
            ],
            dtype=torch.long, device=newest.device,
        )  # fmt: skip
        table[0, :, 0] = newest
        t, p, d, v, m, f = table.unbind()
        height = max((max(row, default=0) for row in depths), default=0)
        chances = None if q is None else torch.tensor(padded(q, 1.0, "q"), device=newest.device)
        return cls(t, p, d, v.bool(), m, f.bool(), height, candidates, chances)

    @property
    def batch(self) -> int:
        """B."""
        return self.tokens.shape[0]

    @property
    def size(self) -> int:
        """N, the number of nodes with the root and padding."""
        return self.tokens.shape[1]

    def _tensors(self) -> dict[str, Any]:
        """The tensors [B, N] of these trees by field name."""
        return {name: getattr(self, name) for name in _PADDING if getattr(self, name) is not None}

    def extended(self, tokens: Tensor, parents: Tensor) -> DraftTree:
        """These trees with one more level of F deterministic nodes: `tokens` [B, F] below the nodes `parents` [B, F].

        The trees must have neither sampled candidates nor draft probabilities.
        """
        one = torch.ones_like(tokens, dtype=torch.bool)
        new = {"tokens": tokens, "parents": parents, "depths": self.depths.gather(1, parents) + 1, "valid": one,
               "modality": torch.full_like(tokens, LANGUAGE.id), "deterministic": one}  # fmt: skip
        joined: dict[str, Any] = {name: torch.cat([x, new[name]], 1) for name, x in self._tensors().items()}
        return replace(self, height=self.height + 1, **joined)

    def select(self, rows: list[int]) -> DraftTree:
        """The trees of `rows`, in that order."""
        if rows == list(range(self.batch)):
            return self
        c = self.candidates
        candidates = c and SampledCandidates(c.child[rows], c.distribution[rows], c.distributions[rows])
        forecast = None if self.forecast is None else [self.forecast[row] for row in rows]
        tensors = {name: x[rows] for name, x in self._tensors().items()}
        return replace(self, candidates=candidates, forecast=forecast, **tensors)

    def replace_rows(self, rows: list[int], other: DraftTree) -> DraftTree:
        """Replaces the trees of `rows` by those of `other`, cut to the N nodes of these trees.

        Neither may have sampled candidates. Nodes of a tree without draft probabilities get q = 1.
        """
        out: dict[str, Any] = {}
        for name, mine in self._tensors().items():
            theirs = other.valid if name == "q" and other.q is None else getattr(other, name)
            part = theirs[rows, : self.size]
            out[name] = mine.clone()
            out[name][rows] = F.pad(part, (0, self.size - part.shape[1]), value=_PADDING[name]).to(mine.dtype)
        kept = self.forecast and [[] if row in set(rows) else own for row, own in enumerate(self.forecast)]
        return replace(self, height=int(out["depths"].max()), forecast=kept, **out)

    def scatter(self, rows: list[int], newest: Tensor) -> DraftTree:
        """Puts these trees into a batch with the roots `newest` [B], as the trees of `rows`.

        All other rows have no drafts. These trees must not have sampled candidates.
        """
        if rows == list(range(len(newest))):
            return self
        root: dict[str, Any] = {"tokens": newest, "valid": 1, "q": 1.0}
        out: dict[str, Any] = {}
        for name, x in self._tensors().items():
            out[name] = x.new_full((len(newest), self.size), _PADDING[name])
            out[name][:, 0] = root.get(name, _PADDING[name])
            out[name][rows] = x
        forecast: list[list[tuple[int, float]]] = [[] for _ in newest]
        for row, own in zip(rows, self.forecast or [], strict=False):
            forecast[row] = own
        return replace(self, forecast=forecast, **out)

    def ancestors(self) -> Tensor:
        """[B, N, N] bool: entry (i, j) is True if node j is node i or one of its ancestors."""
        reached = torch.eye(self.size, dtype=torch.bool, device=self.tokens.device).expand(self.batch, -1, -1)
        jump = self.parents  # the ancestor at distance 1, 2, 4, …; -1 above the root
        for _ in range(self.height.bit_length()):
            exists, at = jump >= 0, jump.clamp_min(0)
            above = reached.gather(1, at[:, :, None].expand(-1, -1, self.size))
            reached = reached | (above & exists[:, :, None])
            jump = jump.gather(1, at).masked_fill(~exists, -1)
        return reached

    def children(self, node: Tensor) -> Tensor:
        """[B, N] bool: the deterministic children of `node` [B]."""
        children = (self.parents == node[:, None]) & self.valid
        return children if self.candidates is None else children & self.deterministic

    def child_tokens(self, node: Tensor, vocabulary: int) -> Tensor:
        """[B, V] bool: the tokens of the deterministic children of `node` [B]."""
        count = torch.zeros(self.batch, vocabulary, dtype=torch.long, device=self.tokens.device)
        return count.scatter_add_(1, self.tokens, self.children(node).long()) > 0

    def follow(self, node: Tensor, token: Tensor, among: Tensor) -> Tensor:
        """The child of `node` [B] with `token` [B], out of the nodes `among` [B, N] bool: [B], -1 for none."""
        match = among & self.valid & (self.parents == node[:, None]) & (self.tokens == token[:, None])
        exists, child = match.max(dim=1)
        return torch.where(exists, child, -1)


@dataclass
class Scores:
    """The target's output for a tree, from one pass.

    logits:   [B, N, V], the unprocessed logits after each node, in the model's dtype; undefined for finished rows.
    taps:     [B, N, T*H], hidden states of the drafter's tap layers, concatenated, or None.
    modality: [B, N] int64, the modality that the router predicts for the token *below* each node; None without a
              router, and then every position counts as language.
    """

    logits: Tensor
    taps: Tensor | None = None
    modality: Tensor | None = None

    def scatter(self, rows: list[int], batch: int) -> Scores:
        """Puts these scores into a batch, as those of `rows`; the values of all other rows are undefined."""
        if rows == list(range(batch)):
            return self
        logits = self.logits.new_empty(batch, *self.logits.shape[1:])
        logits[rows] = self.logits
        if self.taps is None:
            return Scores(logits)
        taps = self.taps.new_zeros(batch, *self.taps.shape[1:])
        taps[rows] = self.taps
        return Scores(logits, taps)


@dataclass
class Accepted:
    """The verifier's decision. Each list has one entry per row of the batch, itself a list.

    nodes:      indices of the accepted drafted nodes in order, without the root.
    tokens:     ids of the emitted tokens: the accepted ones, then one token drawn by the target. That last token is
                absent, so that `tokens` is as long as `nodes`, if the row stopped on an accepted token, or if lockstep
                ended the step there. Rows that had finished before have no nodes, and no tokens outside lockstep.
    divergence: for every emitted token, the total variation distance between the distribution it was drawn from and
                the target's, computed exactly; None: all are 0.
    modality:   for every emitted token, the id of the modality that the router predicted for it; None without a router.
    padded:     indices of rows that had finished before this step; in lockstep they emit padding (see `Sampler`).
    logits:     for every emitted token, the target's logits from which it was drawn, (raw, processed): [V] in the
                model's dtype and [V] float32. None unless `Sampler.keep_logits` is set.
    """

    nodes: list[list[int]]
    tokens: list[list[int]]
    divergence: list[list[float]] | None = None
    modality: list[list[int]] | None = None
    padded: frozenset[int] = frozenset()
    logits: list[list[tuple[Tensor, Tensor]]] | None = None

    @property
    def tokens_per_row(self) -> float:
        """Mean number of tokens of the rows that emitted any in this step; 0 if none did."""
        lengths = [len(tokens) for tokens in self.tokens if tokens]
        return sum(lengths) / max(1, len(lengths))


@dataclass(frozen=True)
class Step:
    """One target pass over the trees of all rows, with the verifier's decision.

    draft_seconds, score_seconds: wall time of drafting and of the target pass.
    prefill: whether this is the first step. Its scores [B, 1, V] belong to the last token of the prompt, and its trees
    have no drafts.
    """

    tree: DraftTree
    scores: Scores
    accepted: Accepted
    draft_seconds: float
    score_seconds: float
    prefill: bool = False
