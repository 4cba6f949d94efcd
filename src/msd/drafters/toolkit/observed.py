"""Node chances of drafters that nobody calibrated, fitted on what the target accepted of their drafts.

Every step shows, for each child of an accepted node, whether it was the target's choice: what a fit needs, at no cost.
`Observed` counts these candidates by the log odds of their draft probability, and keeps the counts between runs, under
the fingerprints of the target and of the draft network. The chances change only when a request ends. They choose the
nodes of trees, so they change no lossless answer.
"""

from __future__ import annotations

import hashlib
from contextlib import suppress
from pathlib import Path

import torch
import torch.nn.functional as F
from pydantic import TypeAdapter
from torch import Tensor
from transformers import PreTrainedModel

from msd.core.tree import Accepted, DraftTree, Scores
from msd.drafters.base import Drafter
from msd.drafters.toolkit.calibration import fitted
from msd.drafters.toolkit.chance import NodeFeatures, Weights, corrected, log_chance, log_odds
from msd.errors import UserError
from msd.system import measurements
from msd.system.files import write_whole
from msd.targets.registry import fingerprint
from msd.targets.state import State

LARGEST, WIDTH = 14.0, 0.5  # of log odds: the outermost bin, and the width of a bin
BINS = int(2 * LARGEST / WIDTH)
FEWEST, ENOUGH = 200, 20_000  # candidates of the first fit; when counting stops
GROWTH = 1.1  # of the number of candidates, between two fits
_STORED = TypeAdapter(tuple[list[int], list[int]])


class Observed:
    """The chances of one drafter.

    counts: [2, BINS] int64, candidates and, of these, the target's choices. path: the file that keeps them.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.counts, self.weights = path, torch.zeros(2, BINS, dtype=torch.long), dict[str, float]()
        with suppress(OSError, ValueError):  # ValueError: damaged, or of another version
            stored = torch.tensor(_STORED.validate_json(path.read_bytes()))
            if stored.shape == self.counts.shape and (stored[1] >= 0).all() and (stored[1] <= stored[0]).all():
                self.counts = stored
        self._fit()

    def add(self, tree: DraftTree, accepted: Accepted) -> None:
        """Counts the candidates of a step whose parent was accepted. One host read."""
        if tree.q is None or tree.size == 1 or self.counts[0].sum() >= ENOUGH:
            return
        tokens, parents, q = torch.stack([tree.tokens.double(), tree.parents.double(), tree.q.double()]).cpu()
        chosen = torch.full_like(tokens, -1.0)
        for row, (nodes, emitted) in enumerate(zip(accepted.nodes, accepted.tokens, strict=True)):
            chosen[row, [0, *nodes][: len(emitted)]] = torch.tensor(emitted, dtype=chosen.dtype)
        above = chosen.gather(1, parents.long().clamp_min(0))
        candidate = (parents >= 0) & (above >= 0)
        bins = ((log_odds(q[candidate].log()).clamp(-LARGEST, LARGEST) + LARGEST) / WIDTH).long().clamp_max(BINS - 1)
        correct = (tokens == above)[candidate]
        self.counts += torch.stack([bins.bincount(minlength=BINS), bins[correct].bincount(minlength=BINS)])

    def finish(self) -> None:
        """Fits and saves the chances after a request, if there is much that is new. A full disk is ignored."""
        if self.counts[0].sum() >= GROWTH * max(1, self._known):
            self._fit()
            with suppress(OSError, UserError):
                self.path.parent.mkdir(parents=True, exist_ok=True)
                write_whole(self.path, _STORED.dump_json((self.counts[0].tolist(), self.counts[1].tolist())) + b"\n")

    def _fit(self) -> None:
        self._known = int(self.counts[0].sum())
        if self._known < FEWEST:
            return
        with torch.inference_mode(False), torch.enable_grad():
            right = torch.tensor(self.counts[1].tolist())
            number = torch.stack([torch.tensor(self.counts[0].tolist()) - right, right], 1).flatten()  # wrong, right
            log_q = F.logsigmoid((torch.arange(BINS) + 0.5) * WIDTH - LARGEST).repeat_interleave(2)
            correct = torch.tensor([False, True]).repeat(BINS)
            node = NodeFeatures(log_q.repeat_interleave(number), torch.zeros(()))
            weights = fitted(node, correct.repeat_interleave(number))
        # better candidates must not count as worse, which few of them can suggest
        self.weights = weights if weights.get("log_odds", 0.0) > 0 else {}


class ObservedDrafter(Drafter):
    """A drafter whose chances are its draft probabilities, until the target has accepted or rejected enough of them."""

    observed: Observed | None = None

    def fingerprint(self) -> str:
        """Of the draft network, and of all else that its draft probabilities depend on."""
        raise NotImplementedError

    def remember(self, model: PreTrainedModel) -> None:
        """See `Drafter`; the counts are in the user's cache directory."""
        key = hashlib.sha256(f"{fingerprint(model)}|{self.name} {self.fingerprint()}".encode()).hexdigest()[:16]
        self.observed = Observed(measurements.folder("chances") / f"{key}.json")

    def log_acceptance(self, node: NodeFeatures) -> Tensor:
        """Log-probability that a candidate is the target's choice: fitted, or else its log draft probability."""
        weights: Weights = self.observed.weights if self.observed is not None else {}
        return log_chance(weights, node) if weights else corrected(node.log_q, node.correction)

    def observe(self, state: State, tree: DraftTree, scores: Scores, accepted: Accepted) -> None:
        """See `Drafter`."""
        if self.observed is not None:
            self.observed.add(tree, accepted)

    def finish(self) -> None:
        """See `Drafter`."""
        if self.observed is not None:
            self.observed.finish()
