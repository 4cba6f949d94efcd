"""Training a rival: its network for a target, its published loss, and how its drafts fare on held-out answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from msd.drafters.msd.heads import frequent
from msd.drafters.rivals import Rival, named
from msd.modality import FUSION, LANGUAGE, VISION
from msd.targets import Target
from msd.targets.teacher import Lesson
from msd.train.captured import Captured
from msd.train.draft_loss import count_chain
from msd.train.lessons import Stages, token_counts

CHAIN = 5  # depth of the chains that acceptance is measured on


def new_rival(
    method: str, target: Target, captured: Sequence[Captured], words: int, seed: int, layers: int | None = None
) -> Rival:
    """An untrained network of `method` for the target; `words`: size of its vocabulary, where it has one of its own."""
    kind, config = named(method), target.text_config
    changes = {} if layers is None else {"layers": layers}
    if kind.reduced:
        changes["draft_vocabulary"] = min(words, config.vocab_size)
    torch.manual_seed(seed)
    network = kind.for_target(config, **changes)
    if kind.reduced:
        network.choose_words(frequent(token_counts(captured, config.vocab_size), network.config.draft_vocabulary))
    network.begin_from(target.model)
    return network.attach(target.model)


@dataclass(frozen=True)
class Published(Stages):
    """Stages as a method was published with them. first: share of answers about images when stage 2 begins."""

    first: float = 0.5

    @classmethod
    def of(cls, network: Rival, steps: int) -> Published:
        """Of a run of `steps` steps."""
        text, rise, first, keep = network.stages
        return cls(round(text * steps), round(rise * steps), keep, first)

    def share(self, step: int) -> float:
        """The share of answers about images at a step."""
        if step < self.text:
            return 0.0
        return min(1.0 - self.keep, self.first + (1 - self.first) * (step - self.text) / max(1, self.rise))


class RivalObjective(nn.Module):
    """A rival's loss on lessons whose logits are log p over its vocabulary."""

    def __init__(self, network: Rival) -> None:
        super().__init__()
        self.network = network

    def forward(self, lesson: Lesson, labels: Tensor, first: Tensor) -> tuple[Tensor, dict[str, float]]:
        """Loss and its parts on drafts from the answer tokens `first` [B, A]; the methods do not ask for labels."""
        loss, parts = self.network.loss(lesson, first)
        return loss, {name: float(part.detach()) for name, part in parts.items()}

    @torch.no_grad()
    def acceptance(self, lesson: Lesson, labels: Tensor) -> dict[str, list[int]]:
        """[accepted, drafted] per modality name on top-1 chains from every answer token (see `count_chain`)."""
        answers = lesson.answers
        first = torch.arange(max(lesson.lengths) - 1, device=answers.device).expand(len(answers), -1)
        states = self.network.states(lesson, first, min(CHAIN, self.network.config.depth))
        guesses = []
        for d in range(states.shape[2]):  # a level at a time: laws over a whole vocabulary are large
            parents = answers.gather(1, (first + d).clamp_max(answers.shape[1] - 1))
            guesses.append(self.network.ids[self.network.logits(states[:, :, d], parents).argmax(-1)])
        names = [m.name for m in (LANGUAGE, VISION, FUSION)]
        return count_chain(lesson, labels, torch.stack(guesses, -1), names)
