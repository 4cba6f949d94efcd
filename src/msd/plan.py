"""Plan: how much may be drafted in a step."""

from __future__ import annotations

from dataclasses import dataclass

from msd.sampling import Sampler


@dataclass(frozen=True)
class Budget:
    """What one step may draft in each row: at most `nodes` drafted nodes, `depth[row]` levels and `width` per level.

    A width of None is no limit; a width of 1 asks for a chain, the likeliest draft below the likeliest draft.
    """

    nodes: int
    depth: list[int]
    width: int | None = None


@dataclass(frozen=True)
class Plan:
    """A fixed budget: at most `nodes` drafted nodes in trees at most `depth` deep and `width` wide."""

    nodes: int = 8
    depth: int = 6
    width: int | None = None

    def budget(self, sampler: Sampler) -> Budget:
        """The budget of the next step; a row that may emit r more tokens drafts at most r - 1, a finished one none."""
        alive = set(sampler.alive)
        rows = range(sampler.layout.batch)
        depth = [min(self.depth, sampler.room(r) - 1) if r in alive else 0 for r in rows]
        return Budget(self.nodes, depth, self.width)
