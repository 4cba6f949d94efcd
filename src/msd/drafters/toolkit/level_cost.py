"""Decides how many draft levels pay, from their measured seconds and the tokens that levels are expected to give."""

from __future__ import annotations

from collections import deque
from statistics import median_low

MEMORY = 0.9  # of the running means of expected tokens
RECENT = 15  # drafts in the running median of seconds


class LevelCost:
    """Measures the draft levels of one drafter; the decision needs no look at the draft itself.

    A level's expected tokens are those of the level above times a ratio, the decayed mean over the drafts of a request.
    Where a level was never drafted, it is assumed to fall off like the level above.
    """

    def __init__(self) -> None:
        self._seconds: deque[float] = deque(maxlen=RECENT)
        self._cold = True  # the first draft of a process allocates and is not measured
        self._tokens: list[tuple[float, float]] = []  # by level, decayed sums of expected tokens: its own, its parent's

    @property
    def seconds(self) -> float:
        """Median seconds of a level in recent drafts; 0 if unknown."""
        return median_low(self._seconds) if self._seconds else 0.0

    def begin(self) -> None:
        """Starts a request: its first draft has all levels, because other answers say little about this one."""
        self._tokens.clear()

    def levels(self, deepest: int, token_seconds: float, node_seconds: float) -> int:
        """Returns how many of `deepest` levels are expected to save more time than they cost, at least one.

        token_seconds: cost of a token without drafting. node_seconds: extra cost of the target's pass for one more node
        in every row; small for one row, large for a large batch.
        """
        expected, ratio = 1.0, 1.0
        for level in range(deepest):
            if level < len(self._tokens):
                own, parent = self._tokens[level]
                ratio = own / max(parent, 1e-9)
            expected *= ratio
            if level and expected * token_seconds < self.seconds + node_seconds:
                return level
        return deepest

    def learn(self, expected: list[float], seconds: float) -> None:
        """Records a draft. expected: tokens that each level is expected to give per row. seconds: of all but the first.

        Without a second level the oldest measurement is dropped, so that the levels are measured again at some time.
        """
        for level, (parent, own) in enumerate(zip([1.0, *expected], expected, strict=False)):
            before = self._tokens[level] if level < len(self._tokens) else (0.0, 0.0)
            self._tokens[level : level + 1] = [(MEMORY * before[0] + own, MEMORY * before[1] + parent)]
        if len(expected) > 1 and not self._cold:
            self._seconds.append(seconds / (len(expected) - 1))
        elif len(expected) < 2 and self._seconds:
            self._seconds.popleft()
        self._cold = False
