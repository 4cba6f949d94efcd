"""`Result`: one answer with its statistics."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from msd.core.statistics import Statistics


@dataclass(frozen=True)
class Result:
    """One answer. tokens: emitted ids without the prompt. finish: why it ended, "eos", "length" or "criteria".

    predicted_modality: the modality that the router predicts for each token, None for the first; None without a router.
    """

    text: str
    tokens: list[int]
    finish: str
    method: str
    statistics: Statistics
    predicted_modality: list[str | None] | None = None

    @property
    def seconds(self) -> float:
        """Wall time of the whole call, including image encoding and prefill."""
        return self.statistics.seconds["total"]

    @property
    def tokens_per_second(self) -> float:
        """Emitted tokens divided by the wall time of the whole call."""
        return len(self.tokens) / self.seconds if self.seconds else 0.0

    def as_dict(self) -> dict[str, Any]:
        """Returns the result as an object for JSON."""
        own = {"text": self.text, "tokens": self.tokens, "finish": self.finish, "method": self.method}
        if self.predicted_modality is not None:
            own["predicted_modality"] = self.predicted_modality
        statistics = self.statistics.as_dict()
        split = statistics.pop("seconds")
        return {
            **own,
            "seconds": self.seconds,
            "tokens_per_second": self.tokens_per_second,
            **statistics,
            "time": split,
        }
