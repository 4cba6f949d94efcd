"""Plan: decides how many nodes each step may draft, and whether drafting saves time at all.

The seconds of a target pass by its number of rows are measured (`msd.planning.costs`). The gain of a drafted node is
its acceptance probability, which the drafter estimates. So a budget gives the drafter the seconds of a step for trees
of 0, 1, 2, … nodes, drafting included, and the drafter keeps the number of nodes with the most tokens per second. In
addition, a governor compares the measured time and tokens of each step with plain decoding, and pauses drafting while
it loses time. A batch of many rows has its own: drafting may lose time there and gain it in a small one.

A target with recurrent layers keeps a state for every scored node (`msd.targets.recurrent`). Its trees have no more
nodes than the states' bytes allow, and it drafts a chain where a second candidate cannot pay.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import median

from msd.core.layout import Layout
from msd.core.modality import LANGUAGE
from msd.core.sampling import Sampler
from msd.core.trust import Trust, Usual
from msd.planning.costs import STATE_BYTES, Costs, most_nodes

CREDIT, PROBE = 9.0, 4.5  # useless drafts whose time may be lost before drafting stops: at first, and after a pause
LEAST, IN_BATCH = 0.25, 0.45  # plain steps that a useless draft counts for: at least for one row; always for more
PAUSE, LONGEST = 16, 256  # steps without drafting: the first pause, and the longest one, of one row
RECENT = 15  # steps in the running medians of seconds


@dataclass(frozen=True)
class Budget:
    """What one step may draft in each row: at most `nodes` drafted nodes, `depth[row]` levels, `width` per level.

    A row with depth 0, such as a finished one, drafts nothing. A width of None is no limit; a width of 1 asks for a
    chain of the most probable tokens.
    seconds: of a whole step, for trees of 0, 1, … `nodes` drafted nodes; None: no costs known, draft the maximum.
    passes: of the target pass alone, as measured on an idle machine; None: no costs known.
    shift: of each row's trust (`msd.core.trust`); None: the chances are taken as they are.
    """

    nodes: int
    depth: list[int]
    width: int | None = None
    seconds: tuple[float, ...] | None = None
    passes: tuple[float, ...] | None = None
    shift: tuple[float, ...] | None = None

    @property
    def rows(self) -> list[int]:
        """Rows that may draft."""
        return [row for row, depth in enumerate(self.depth) if depth]

    @property
    def node_seconds(self) -> float:
        """Mean additional seconds of a target pass for one more node in every row; 0 if costs are unknown."""
        return 0.0 if self.passes is None else max(0.0, self.passes[-1] - self.passes[0]) / max(1, len(self.passes) - 1)

    def select(self, rows: list[int]) -> Budget:
        """The budget of `rows`, in that order."""
        shift = None if self.shift is None else tuple(self.shift[row] for row in rows)
        return replace(self, depth=[self.depth[row] for row in rows], shift=shift)


class Governor:
    """Pauses drafting when it loses time. Each pause is twice as long as the one before, until drafting gains again.

    A few useless drafts in a row are chance where drafts are accepted now and then, as in sampled answers. Where a
    draft costs much, they lose much time, so the limit counts useless drafts instead of time. A batch has more rows to
    tell chance from loss: there the limit is a time.

    A try in a batch reads the prompts of all its rows, and shows as much as one in each row alone. So the first pause
    there is longer by the number of rows, and the longest one is four times that of one row.
    """

    def __init__(self, rows: int = 1) -> None:
        self.longest = LONGEST * min(4, rows)
        self.first = min(PAUSE * rows, self.longest)
        self.alone = rows == 1
        self.credit, self.remaining, self.pause = CREDIT, 0, self.first

    def drafts(self) -> bool:
        """Whether the next step may draft; call it once per step."""
        self.remaining = max(0, self.remaining - 1)
        return self.remaining == 0

    def learn(self, gain: float, cost: float) -> None:
        """gain: tokens per row of a step with drafts, minus those of plain decoding in the same time.

        cost: the time of the step beyond that of a plain one, in plain steps.
        """
        self.credit = min(CREDIT, self.credit + gain / (max(cost, LEAST) if self.alone else IN_BATCH))
        if self.credit >= CREDIT:
            self.pause = self.first
        if self.credit < 0:
            self.remaining, self.pause, self.credit = self.pause + 1, min(2 * self.pause, self.longest), PROBE


class Plan:
    """Plans trees of at most `nodes` drafted nodes, `depth` levels and `width` nodes per level.

    costs: measured costs of the target. With them, budgets contain seconds, and a governor can pause drafting. There is
    one for 1 row, 2–3 rows, 4–7 rows, …; they last as long as the plan. Times are medians over recent steps, so one
    delayed step has no effect.
    state_bytes: what the recurrent states of all scored nodes may take.
    """

    def __init__(
        self,
        nodes: int = 8,
        depth: int = 8,
        width: int | None = None,
        costs: Costs | None = None,
        state_bytes: int = STATE_BYTES,
    ) -> None:
        self.nodes, self.depth, self.width, self.costs, self.state_bytes = nodes, depth, width, costs, state_bytes
        self._usual: defaultdict[tuple[bool, bool], Usual] = defaultdict(Usual)  # by (sampled, about media)
        self._governors: dict[int, Governor] = {}  # by the largest power of two within the number of rows
        self._drafts: deque[float] = deque(maxlen=RECENT)  # seconds of drafting
        self._slowness: deque[float] = deque(maxlen=RECENT)  # seconds of target passes / measured seconds

    @property
    def draft_seconds(self) -> float:
        """Median seconds of drafting in recent steps; 0 before the first step."""
        return median(self._drafts) if self._drafts else 0.0

    @property
    def slowness(self) -> float:
        """Median ratio of the seconds of recent target passes to the measured ones; 1 before the first step."""
        return median(self._slowness) if self._slowness else 1.0

    def governor(self, rows: int) -> Governor:
        """Returns the governor of steps in which `rows` rows, at least one, may draft."""
        size = 1 << (rows.bit_length() - 1)
        return self._governors.setdefault(size, Governor(size))

    def trust(self, layout: Layout, sampled: bool) -> list[Trust]:
        """The trust of each row of a new batch; sampled: whether its answers are."""
        media = (layout.modality != LANGUAGE.id).any(1).tolist()
        return [Trust(self._usual[sampled, about]) for about in media]

    def budget(self, sampler: Sampler, node_bytes: int = 0, trust: Sequence[Trust] = ()) -> Budget:
        """The budget of the next step. A row that may emit r more tokens drafts at most r - 1 levels.

        node_bytes: of a node's recurrent states; 0 for targets without any. trust: of each row, by default none.
        """
        alive = set(sampler.alive)
        rows = range(sampler.layout.batch)
        depth = [
            min(self.depth, sampler.tokens_left(r) - 1) if r in alive and sampler.may_draft(r) else 0 for r in rows
        ]
        nodes = self.nodes
        if node_bytes:
            nodes = max(0, min(nodes, most_nodes(node_bytes, self.state_bytes) // max(1, len(alive)) - 1))
        drafting = sum(d > 0 for d in depth)
        if self.costs is not None and not (drafting and nodes and self.governor(drafting).drafts()):
            return Budget(0, [0 for _ in rows], self.width, passes=self._passes(self.costs, sampler, 0))
        passes = None if self.costs is None else self._passes(self.costs, sampler, nodes)
        width = self._width(nodes, passes) if node_bytes else self.width
        if passes is None:
            return Budget(nodes, depth if nodes else [0 for _ in rows], width)
        seconds = tuple(self.draft_seconds + self.slowness * s for s in passes)
        return Budget(nodes, depth, width, seconds, passes, tuple(row.shift for row in trust) or None)

    def learn(self, budget: Budget, drafted: int, emitted: float, draft_seconds: float, score_seconds: float) -> None:
        """Records a step: its budget, nodes drafted and tokens emitted per row, seconds of drafting and of the pass."""
        if budget.passes is None:
            return
        nodes = min(drafted, len(budget.passes) - 1)
        self._slowness.append(score_seconds / budget.passes[nodes])
        if budget.nodes:
            self._drafts.append(draft_seconds)
            step = self.draft_seconds + self.slowness * budget.passes[nodes]
            plain = step / (self.slowness * budget.passes[0])
            self.governor(len(budget.rows)).learn(emitted - plain, plain - 1)

    def _width(self, nodes: int, passes: tuple[float, ...] | None) -> int | None:
        """1 where a target with recurrent layers should draft a chain, else the plan's own width.

        That is where the states' bytes leave no more nodes than levels, and where a node costs half a plain pass even
        on a level that exists already: a second candidate is accepted with a probability of at most 1/2, because the
        first one is at least as probable, and a token costs at most a plain pass.
        """
        if self.costs is None or passes is None or not nodes:
            sibling, token = 0.0, 1.0
        else:
            levels = self.costs.level * max(0, min(nodes, self.depth) - 1)
            sibling, token = (passes[-1] - passes[0] - levels) / nodes, passes[0]
        return 1 if nodes <= min(self.depth, self.nodes - 1) or sibling >= token / 2 else self.width

    def _passes(self, costs: Costs, sampler: Sampler, nodes: int) -> tuple[float, ...]:
        """Seconds of a target pass over trees of 0, 1, … `nodes` drafted nodes in each unfinished row.

        Levels are those of the deepest tree: a chain down to the plan's depth.
        """
        R = len(sampler.alive)
        curve = costs.curve(R * (nodes + 1), max(sampler.layout.end))[R - 1 :: R]
        return tuple(s + costs.level * max(0, min(n, self.depth) - 1) for n, s in enumerate(curve))
