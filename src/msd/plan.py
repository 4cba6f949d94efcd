"""Plan: how much may be drafted in a step."""

from __future__ import annotations

from dataclasses import dataclass

from msd.sampling import Sampler


@dataclass(frozen=True)
class Budget:
    """What one step may draft: at most `nodes` drafted nodes per row, and at most `depth[row]` levels in each row."""

    nodes: int
    depth: list[int]


@dataclass(frozen=True)
class Plan:
    """A fixed budget: at most `nodes` drafted nodes in trees at most `depth` deep."""

    nodes: int = 8
    depth: int = 6

    def budget(self, sampler: Sampler) -> Budget:
        """The budget of the next step; a row that may emit r more tokens drafts at most r - 1, a finished one none."""
        alive = set(sampler.alive)
        rows = range(sampler.layout.batch)
        return Budget(self.nodes, [min(self.depth, sampler.room(r) - 1) if r in alive else 0 for r in rows])
