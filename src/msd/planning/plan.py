"""Plan: how much may be drafted in a step, and whether drafting pays at all.

What a target pass costs by its number of rows is known (`msd.planning.costs`), and what a drafted node is worth is the
chance that it is accepted, which the drafter knows best. So a budget tells the drafter the seconds that trees of 0, 1,
2, … nodes cost, drafting included; the drafter keeps as many nodes as give most tokens per second. Above that stands a
governor: it goes by what steps really took and gave, and stops drafting for a while when that loses.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, replace
from statistics import median

from msd.core.sampling import Sampler
from msd.planning.costs import Costs

TRUST, PROBE = 4.0, 1.5  # plain steps' worth of time that drafting may lose before it stops; when it is tried again
PAUSE, LONGEST = 16, 256  # steps without drafting, the first time and at most
RECENT = 15  # steps whose medians tell how fast this machine is now


@dataclass(frozen=True)
class Budget:
    """What one step may draft in each row: at most `nodes` drafted nodes, `depth[row]` levels and `width` per level.

    A row with no depth drafts nothing, as where it has ended.

    A width of None is no limit; a width of 1 asks for a chain, the likeliest draft below the likeliest draft.
    seconds: of a whole step whose trees have 0, 1, … `nodes` drafted nodes; None: draft what fits.
    passes: of its target pass alone, as measured when the machine was quiet; None where costs are not known.
    """

    nodes: int
    depth: list[int]
    width: int | None = None
    seconds: tuple[float, ...] | None = None
    passes: tuple[float, ...] | None = None

    @property
    def rows(self) -> list[int]:
        """Rows that may draft."""
        return [row for row, depth in enumerate(self.depth) if depth]

    @property
    def node_seconds(self) -> float:
        """By how much a target pass takes longer for a node in every row, on average; 0 where costs are not known."""
        return 0.0 if self.passes is None else max(0.0, self.passes[-1] - self.passes[0]) / max(1, len(self.passes) - 1)

    def of(self, rows: list[int]) -> Budget:
        """The budget of some rows, in that order."""
        return replace(self, depth=[self.depth[row] for row in rows])


class Governor:
    """Stops drafting when it loses time, and tries again after pauses that double as long as it keeps losing."""

    def __init__(self) -> None:
        self.credit, self.left, self.pause = TRUST, 0, PAUSE

    def drafts(self) -> bool:
        """Whether the next step may draft; counts a pause down."""
        self.left = max(0, self.left - 1)
        return self.left == 0

    def learn(self, gain: float) -> None:
        """gain: tokens a row that a drafting step emitted, less those that plain decoding emits in that time."""
        self.credit = min(TRUST, self.credit + gain)
        if self.credit >= TRUST:
            self.pause = PAUSE
        if self.credit < 0:
            self.left, self.pause, self.credit = self.pause + 1, min(2 * self.pause, LONGEST), PROBE


class Plan:
    """At most `nodes` drafted nodes in trees at most `depth` deep and `width` wide.

    With the target's costs, budgets tell seconds and a governor watches; what it learns lasts as long as the plan.
    Times are medians of recent steps: a step that another process held up says nothing of drafting.
    """

    def __init__(self, nodes: int = 8, depth: int = 6, width: int | None = None, costs: Costs | None = None) -> None:
        self.nodes, self.depth, self.width, self.costs = nodes, depth, width, costs
        self.governor = Governor()
        self._drafts: deque[float] = deque(maxlen=RECENT)  # seconds of drafting
        self._passes_seen: deque[float] = deque(maxlen=RECENT)  # seconds of target passes, over those measured

    @property
    def draft_seconds(self) -> float:
        """What drafting for a step takes; 0 before the first."""
        return median(self._drafts) if self._drafts else 0.0

    @property
    def slowness(self) -> float:
        """Seconds of target passes now, as a multiple of those measured."""
        return median(self._passes_seen) if self._passes_seen else 1.0

    def budget(self, sampler: Sampler) -> Budget:
        """The budget of the next step; a row that may emit r more tokens drafts at most r - 1, a finished one none."""
        alive = set(sampler.alive)
        rows = range(sampler.layout.batch)
        depth = [min(self.depth, sampler.room(r) - 1) if r in alive else 0 for r in rows]
        if self.costs is None:
            return Budget(self.nodes, depth, self.width)
        passes = self._passes(self.costs, sampler)
        if not self.governor.drafts():
            return Budget(0, [0 for _ in rows], self.width, passes=passes)
        seconds = tuple(self.draft_seconds + self.slowness * s for s in passes)
        return Budget(self.nodes, depth, self.width, seconds, passes)

    def learn(self, budget: Budget, drafted: int, emitted: float, draft: float, verify: float) -> None:
        """What became of a budget: nodes drafted and tokens emitted per row, seconds of the draft and of the pass."""
        if budget.passes is None:
            return
        nodes = min(drafted, self.nodes)
        self._passes_seen.append(verify / budget.passes[nodes])
        if budget.nodes:
            self._drafts.append(draft)
            step = self.draft_seconds + self.slowness * budget.passes[nodes]
            self.governor.learn(emitted - step / (self.slowness * budget.passes[0]))

    def _passes(self, costs: Costs, sampler: Sampler) -> tuple[float, ...]:
        """Seconds of target passes over trees of 0, 1, … nodes in every row that goes on: what counts is all rows."""
        R = len(sampler.alive)
        curve = costs.of(R * (self.nodes + 1), max(sampler.layout.end))
        return tuple(curve[R - 1 :: R])
