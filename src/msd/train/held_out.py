"""What a drafter in training is worth on answers it does not learn from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor

from msd.targets.teacher import Lesson
from msd.train import confidence
from msd.train.captured import Captured
from msd.train.draft_loss import DraftObjective
from msd.train.lessons import Lessons
from msd.train.rivals import RivalObjective
from msd.train.router_report import router_report


class HeldOut:
    """Held-out chain acceptance: by modality in answers about images, and of all answers without one ("text")."""

    def __init__(
        self, objective: DraftObjective | RivalObjective, lessons: Lessons, held_out: Sequence[Captured]
    ) -> None:
        self.objective, self.lessons = objective, lessons
        some = [c for c in held_out if len(c.ids) > 1]
        self.about_images, self.text = ([c for c in some if bool(c.images) == images] for images in (True, False))
        self.last: dict[str, float] = {}

    def __call__(self) -> dict[str, float]:
        """The rates, by name; "acceptance" is that of all answers about images."""
        self.objective.eval()
        seen, text = self._counts(self.about_images), self._counts(self.text)
        self.objective.train()
        self.last = {name: accepted / max(1, drafted) for name, (accepted, drafted) in seen.items()}
        for name, counts in (("text", text), ("acceptance", seen or text)):
            accepted, drafted = (sum(c[i] for c in counts.values()) for i in (0, 1))
            if drafted:
                self.last[name] = accepted / drafted
        return self.last

    def _counts(self, answers: Sequence[Captured]) -> dict[str, list[int]]:
        """Modality name -> [accepted, drafted]."""
        counts: dict[str, list[int]] = {}
        for lesson, labels in self.lessons.in_turn(answers):
            for name, (accepted, drafted) in self.objective.acceptance(lesson, labels).items():
                old = counts.setdefault(name, [0, 0])
                counts[name] = [old[0] + accepted, old[1] + drafted]
        return counts

    def reports(self) -> dict[str, Any]:
        """Of a trained network: the router's quality, and the fit that turns confidence into tree scores."""
        if isinstance(self.objective, RivalObjective):
            return {}
        told = {"confidence": confidence.calibrate(self.objective, self._taught())}
        if self.objective.network.router is not None:
            told["router"] = router_report(self.objective, self._taught())
        return told

    def _taught(self) -> Iterator[tuple[Lesson, Tensor]]:
        """The held-out answers about images, in batches; those without where there are no others."""
        return self.lessons.in_turn(self.about_images or self.text)
