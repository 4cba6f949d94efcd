"""Trust: corrects the chances that a drafter gives its nodes by what the target accepts of them in this answer.

Node chances are fitted once, on answers like the training data (`msd.drafters.toolkit.chance`). Elsewhere a drafter is
too sure: on texts the shipped one expects 2.6 accepted nodes a draft where 0.3 are, on sampled answers 3.9 where 1.9
are (docs/plan.md), so trees are far too large. Every row therefore has a shift, which is added to the log odds of all
its chances. It is the bias of a logistic regression with a Gaussian prior, updated by one Newton step after each target
pass (as an extended Kalman filter does). An answer starts with the usual shift of its kind: sampled or greedy, about
media or not. Where a drafter is too sure, it also knows less about which of its nodes are good ones: with a negative
shift, log odds are divided by √(1 + shift²), which lowers the log loss of the chances further, by 2 to 6%. The step
ignores that this factor depends on the shift.

Shifts choose the nodes of trees, so they change no lossless answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from msd.core.tree import Accepted, DraftTree

PRIOR = 2.0  # 1 / variance of the shifts of answers of one kind around the usual one
MOST = 30.0  # of a row's precision, so that its shift can follow a change of subject
LOWEST, HIGHEST = -4.0, 2.0  # shifts: with no more than these, a few accepted or rejected nodes change the decision
USUAL = 0.05  # of a shift's distance from the usual one, which follows it by so much per unit of information


@dataclass
class Usual:
    """The usual shift of one kind of answers, a mean that forgets."""

    shift: float = 0.0

    def learn(self, shift: float, information: float) -> None:
        """information: see `Trust.learn`; an answer of ten passes has about 10 in all."""
        self.shift += min(1.0, USUAL * information) * (shift - self.shift)


@dataclass
class Trust:
    """The shift of one row. precision: 1 / variance of what is known about it."""

    usual: Usual
    shift: float = field(init=False)
    precision: float = PRIOR

    def __post_init__(self) -> None:
        self.shift = self.usual.shift

    def learn(self, outcomes: Sequence[tuple[float, bool]]) -> None:
        """outcomes: (chance, whether it was accepted) of the drafted nodes whose parent was accepted."""
        information = sum(chance * (1 - chance) for chance, _ in outcomes)
        surprise = sum(accepted - chance for chance, accepted in outcomes)
        self.precision = min(MOST, self.precision + information)
        self.shift = min(HIGHEST, max(LOWEST, self.shift + surprise / self.precision))
        self.usual.learn(self.shift, information)


def scale(shift: float) -> float:
    """What the log odds of a row's chances are multiplied by before its shift is added; below 1 if it is negative."""
    return (1.0 + min(0.0, shift) ** 2) ** -0.5


def learn(rows: Sequence[Trust], tree: DraftTree, accepted: Accepted) -> None:
    """Updates the trust of all rows by a step; rows whose tree has no forecast learn nothing."""
    for row, forecast in enumerate(tree.forecast or []):
        nodes, tokens = accepted.nodes[row], accepted.tokens[row]
        if not tokens or row in accepted.padded:  # had finished before
            continue
        known, right = {0, *nodes} if len(tokens) > len(nodes) else {0, *nodes[:-1]}, set(nodes)
        outcomes = [(chance, n in right) for n, (parent, chance) in enumerate(forecast, 1) if parent in known]
        if outcomes:
            rows[row].learn(outcomes)
