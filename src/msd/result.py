"""Result: one answer, with what happened on the way."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from msd.core.statistics import Statistics


@dataclass(frozen=True)
class Result:
    """One answer. tokens: emitted ids without the prompt. finish: "eos", "length" or "criteria".

    predicted_modality: name per token as the router *predicts* it, None for the first token, or None without a router.
    """

    text: str
    tokens: list[int]
    finish: str
    method: str
    statistics: Statistics
    predicted_modality: list[str | None] | None = None

    @property
    def seconds(self) -> float:
        """Wall time of the whole call, image encoding and prefill included."""
        return self.statistics.seconds["total"]

    @property
    def tokens_per_second(self) -> float:
        """Emitted tokens per second of the whole call."""
        return len(self.tokens) / self.seconds if self.seconds else 0.0

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
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
