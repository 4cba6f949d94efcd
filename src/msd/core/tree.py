"""DraftTree: the proposed continuations of the newest token, and what the target said of them.

Node 0 is the root, the newest emitted token; every other node is a drafted token below its parent, parents first.
A parent tries its children as *ordered trials*. A deterministic trial (top-k, prompt lookup) is there whatever the
target says; a sampled trial was drawn from a law q, kept whole because verification needs it. Deterministic trials come
first, and the same token from two sources is two trials on one node. See docs/verification.md.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from msd.core.modality import LANGUAGE


@dataclass
class SampledCandidates:
    """Sampled trials, in the order they are to be tried at each parent.

    child: [B, N, K] int64, the node a trial of parent n leads to, -1 where there is none.
    distribution:  [B, N, K] int64, row of `distributions` that the child's token was drawn from.
    distributions: [B, R, V] float32, full draft distributions q at draw time (each sums to 1).
    """

    child: Tensor
    distribution: Tensor
    distributions: Tensor


@dataclass
class DraftTree:
    """B trees of at most N nodes.

    tokens:   [B, N] int64.
    parents:  [B, N] int64, -1 at the root and at padding; a parent's index is below its children's.
    depths:   [B, N] int64, 0 at the root.
    valid:    [B, N] bool, False at padding nodes (rows may draft unequal numbers).
    modality: [B, N] int64, ids of `msd.core.modality`.
    fixed:    [B, N] bool, True where the node is a deterministic trial of its parent.
    height:   largest depth, a host integer.
    trials:   sampled trials, or None when every trial is deterministic.
    q:        [B, N] float32, probability of the node's token under its parent's draft law, 1 at the root; or None when
              the drafter has no law. The lossless policy does not read it.
    """

    tokens: Tensor
    parents: Tensor
    depths: Tensor
    valid: Tensor
    modality: Tensor
    fixed: Tensor
    height: int
    candidates: SampledCandidates | None = None
    q: Tensor | None = None

    @classmethod
    def root_only(cls, newest: Tensor) -> DraftTree:
        """Trees without drafts over the newest tokens [B]: plain decoding."""
        return cls.from_lists(newest, [[]] * len(newest), [[]] * len(newest))

    @classmethod
    def from_lists(
        cls,
        newest: Tensor,
        tokens: list[list[int]],
        parents: list[list[int]],
        modality: list[list[int]] | None = None,
        candidates: SampledCandidates | None = None,
        fixed: list[list[bool]] | None = None,
    ) -> DraftTree:
        """Builds trees from host lists of drafted nodes (the root excluded; a parent of 0 is the root)."""
        B, N = len(tokens), 1 + max(map(len, tokens), default=0)
        table = torch.zeros(6, B, N, dtype=torch.long)
        table[1] = -1
        table[4] = LANGUAGE.id
        height = 0
        for row, (drafted, above) in enumerate(zip(tokens, parents, strict=True)):
            depth = [0]
            for p in above:
                depth.append(depth[p] + 1)
            height = max(height, *depth)
            n = len(depth)
            table[0, row, 1:n] = torch.tensor(drafted, dtype=torch.long)
            table[1, row, 1:n] = torch.tensor(above, dtype=torch.long)
            table[2, row, :n] = torch.tensor(depth)
            table[3, row, :n] = 1
            if modality is not None:
                table[4, row, 1:n] = torch.tensor(modality[row], dtype=torch.long)
            table[5, row, 1:n] = 1 if fixed is None else torch.tensor(fixed[row], dtype=torch.long)
        table = table.to(newest.device)
        table[0, :, 0] = newest
        t, p, d, v, m, f = table
        return cls(t, p, d, v.bool(), m, f.bool(), height, candidates)

    @property
    def batch(self) -> int:
        """B."""
        return self.tokens.shape[0]

    @property
    def size(self) -> int:
        """N, the root included."""
        return self.tokens.shape[1]

    def of(self, rows: list[int]) -> DraftTree:
        """The trees of some rows only, in that order."""
        if rows == list(range(self.batch)):
            return self
        t = self.candidates
        candidates = (
            None if t is None else SampledCandidates(t.child[rows], t.distribution[rows], t.distributions[rows])
        )
        fixed, modality = self.fixed[rows], self.modality[rows]
        q = None if self.q is None else self.q[rows]
        return DraftTree(
            self.tokens[rows], self.parents[rows], self.depths[rows], self.valid[rows], modality, fixed, self.height,
            candidates, q,
        )  # fmt: skip

    def replaced(self, rows: list[int], by: DraftTree) -> DraftTree:
        """These trees, those of `rows` being the first nodes of `by`'s, as many as there is room for.

        Neither has sampled trials. What has no draft law counts as drafted for sure.
        """
        N = self.size

        def mixed(mine: Tensor, theirs: Tensor, empty: float) -> Tensor:
            out, part = mine.clone(), theirs[rows, :N]
            out[rows] = F.pad(part, (0, N - part.shape[1]), value=empty).to(out.dtype)
            return out

        q = None if self.q is None else mixed(self.q, by.valid if by.q is None else by.q, 0.0)
        depths = mixed(self.depths, by.depths, 0)
        return DraftTree(
            mixed(self.tokens, by.tokens, 0), mixed(self.parents, by.parents, -1), depths,
            mixed(self.valid, by.valid, 0), mixed(self.modality, by.modality, LANGUAGE.id),
            mixed(self.fixed, by.fixed, 0), int(depths.max()), q=q,
        )  # fmt: skip

    def among(self, rows: list[int], newest: Tensor) -> DraftTree:
        """These trees, without sampled trials, as those of `rows` in a batch with the roots `newest` [B].

        The other rows draft nothing.
        """
        if rows == list(range(len(newest))):
            return self

        def spread(x: Tensor, root: Tensor | float, empty: float) -> Tensor:
            out = x.new_full((len(newest), self.size), empty)
            out[:, 0] = root
            out[rows] = x
            return out

        return DraftTree(
            spread(self.tokens, newest, 0), spread(self.parents, -1, -1), spread(self.depths, 0, 0),
            spread(self.valid, 1, 0), spread(self.modality, LANGUAGE.id, LANGUAGE.id), spread(self.fixed, 0, 0),
            self.height, q=None if self.q is None else spread(self.q, 1.0, 0.0),
        )  # fmt: skip

    def ancestors(self) -> Tensor:
        """[B, N, N] bool: entry (i, j) says that node j is node i or above it."""
        eye = torch.eye(self.size, dtype=torch.bool, device=self.tokens.device).expand(self.batch, -1, -1)
        above = self.parents.clamp_min(0)[:, :, None].expand(-1, -1, self.size)
        reach = eye
        for _ in range(self.height):
            reach = eye | (reach.gather(1, above) & (self.parents >= 0)[:, :, None])
        return reach

    def follow(self, node: Tensor, token: Tensor, among: Tensor) -> Tensor:
        """The child of `node` [B] that carries `token` [B] among the nodes `among` [B, N] bool: [B], -1 if none."""
        match = among & self.valid & (self.parents == node[:, None]) & (self.tokens == token[:, None])
        found, child = match.max(dim=1)
        return torch.where(found, child, -1)


@dataclass
class Scores:
    """What one target pass says of a tree.

    logits: [B, N, V], the target's logits after each node, in the model's dtype, unprocessed; of a row that has ended,
            anything.
    taps:   [B, N, T*H] hidden states at the drafter's tap layers, concatenated, or None.
    modality: [B, N] int64, class predicted for the token *below* each node from the target's own states, or None when
            nobody routes; then every position counts as language.
    """

    logits: Tensor
    taps: Tensor | None = None
    modality: Tensor | None = None

    def among(self, rows: list[int], batch: int) -> Scores:
        """These as the scores of `rows` in a batch; what the other rows hold means nothing."""
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
    """The verifier's choice, on the host.

    nodes:  for every row, the accepted drafted nodes in order (the root left out).
    tokens: for every row, the emitted tokens: the accepted ones, then the target's own (bonus) token. One longer than
            `nodes`, unless the row stopped on an accepted token or lockstep ended the walk there (equal length), or the
            row had already finished (both empty).
    divergence: for every emitted token, the exact total variation of its law from the target's; None: all are 0.
    modality: for every emitted token, the class that the router predicted for it; None where nobody asked.
    padded: rows that had finished before this step: what they emit is padding (see `Sampler`, lockstep).
    """

    nodes: list[list[int]]
    tokens: list[list[int]]
    divergence: list[list[float]] | None = None
    modality: list[list[int]] | None = None
    padded: frozenset[int] = frozenset()

    @property
    def tokens_a_row(self) -> float:
        """Tokens emitted by each row that took part, on average."""
        lengths = [len(tokens) for tokens in self.tokens if tokens]
        return sum(lengths) / max(1, len(lengths))


@dataclass(frozen=True)
class Step:
    """One target pass over the trees of all rows, and what came of it.

    draft_seconds, verify_seconds: wall time of the draft and of the target's pass. prefill: whether this is the first
    step, whose scores [B, 1, V] are those of the prompt's last token and whose trees are bare roots.
    """

    tree: DraftTree
    scores: Scores
    accepted: Accepted
    draft_seconds: float
    verify_seconds: float
    prefill: bool = False
