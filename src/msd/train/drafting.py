"""Training a draft network for a target from captured answers, to a folder that decoding loads.

The network's embedding and the first guess of its output layer are the target's own. Resumable as `train.loop` is; the
learning curve is drawn as it grows. With `accelerate launch` every process trains on its own share of a step's answers.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from msd.drafters.msd import MSDConfig, MSDNetwork, checkpoint
from msd.drafters.msd.heads import frequent
from msd.gain import ModalityCuts, assert_images_matter
from msd.prompts import prepare
from msd.targets import Target, adapt
from msd.train.captured import Captured
from msd.train.draft_loss import DraftObjective, LossConfig, chain_acceptance
from msd.train.lessons import Lessons, Stages, token_counts
from msd.train.loop import Loop, LoopConfig
from msd.train.router_report import router_report


@dataclass(frozen=True)
class DraftTraining:
    """How a drafter is trained. anchors: positions per answer and step that drafts start from.

    off: parts of the network left out, names of `msd.drafters.msd.SWITCHES`. text_only: stage 1 alone.
    """

    form: str = "block"
    steps: int = 400
    batch: int = 8
    anchors: int = 24
    lr: float = 1e-3
    draft_vocabulary: int = 4096
    seed: int = 0
    off: tuple[str, ...] = ()
    text_only: bool = False
    loss: LossConfig = field(default_factory=LossConfig)
    stages: Stages = field(default_factory=Stages)
    evaluate_every: int = 100


def new_network(target: Target, captured: Sequence[Captured], settings: DraftTraining) -> MSDNetwork:
    """A network for the target: the tokens it writes most as vocabulary, its output rows as first guess."""
    model, config = target.model, target.text_config
    counts = token_counts(captured, config.vocab_size)
    size = min(settings.draft_vocabulary, config.vocab_size)
    changes: dict[str, Any] = dict.fromkeys(settings.off, False) | {"form": settings.form}
    torch.manual_seed(settings.seed)
    network = MSDNetwork(MSDConfig.for_target(config, size, **changes))
    network.heads.ids = frequent(counts, size).to(torch.long)
    rows = model.get_output_embeddings().weight.detach().float().cpu()[network.heads.ids]
    with torch.no_grad():
        network.heads.head.weight.copy_(rows)
    return network.attach(model.get_input_embeddings())


def train(
    model: Any,
    processor: Any,
    captured: Sequence[Captured],
    held_out: Sequence[Captured],
    cuts: ModalityCuts,
    out: Path,
    settings: DraftTraining,
) -> bool:
    """Trains to `out/drafter`; False when it was asked to stop before the end (run it again to go on).

    UserError when the target's images do not reach it.
    """
    model.requires_grad_(False)
    network = new_network(adapt(model), captured, settings).to(model.device)
    target = adapt(model, network.config.taps)
    _refuse_blind_targets(target, processor, captured)
    stages = Stages(settings.steps, 1, 1.0) if settings.text_only else settings.stages
    lessons = Lessons(target, processor, captured, cuts, settings.batch, stages, settings.seed)
    objective = DraftObjective(network, settings.loss).to(model.device)
    evaluate = _Evaluation(objective, Lessons(target, processor, held_out, cuts, settings.batch), held_out)
    begun, tokens = time.monotonic(), 0

    def step_loss(step: int) -> tuple[Tensor, Mapping[str, float]]:
        nonlocal tokens
        lesson, labels = lessons(step)
        tokens += sum(lesson.lengths)
        loss, parts = objective(lesson, labels, lessons.roots(lesson, settings.anchors))
        speed = {"answer_tokens_per_second": tokens / (time.monotonic() - begun), "peak_gb": peak_gigabytes()}
        return loss, {**parts, **speed}

    params = {n: p for n, p in objective.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(params.values(), lr=settings.lr, betas=(0.9, 0.95), weight_decay=0.01)
    warmup = min(20, 1 + settings.steps // 10)
    config = LoopConfig(settings.steps, settings.seed, warmup, clip=0.5, evaluate_every=settings.evaluate_every)
    loop = Loop(params, optimizer, step_loss, config, out, evaluate)
    finished = loop.run()
    router = evaluate.router() if finished and network.router is not None else None
    told = {
        "settings": asdict(settings), "steps": loop.step, "cuts": cuts.model_dump(), "answers": len(captured),
        "losses": loop.running, "held_out": evaluate.last, "router": router, "seconds": time.monotonic() - begun,
        "peak_gigabytes": peak_gigabytes(),
    }  # fmt: skip
    checkpoint.save(network, out / "drafter", told)
    return finished


class _Evaluation:
    """Held-out chain acceptance by modality, and the mean acceptance length a chain would have."""

    def __init__(self, objective: DraftObjective, lessons: Lessons, held_out: Sequence[Captured]) -> None:
        self.objective, self.lessons = objective, lessons
        self.held_out = [c for c in held_out if len(c.ids) > 1]
        self.last: dict[str, float] = {}

    def __call__(self) -> dict[str, float]:
        counts: dict[str, list[int]] = {}
        size = self.lessons.batch
        self.objective.eval()
        for start in range(0, len(self.held_out), size):
            lesson, labels = self.lessons.teach(self.held_out[start : start + size])
            for name, (accepted, drafted) in chain_acceptance(self.objective, lesson, labels).items():
                old = counts.setdefault(name, [0, 0])
                counts[name] = [old[0] + accepted, old[1] + drafted]
        self.objective.train()
        self.last = {name: accepted / max(1, drafted) for name, (accepted, drafted) in counts.items()}
        total = [sum(c[i] for c in counts.values()) for i in (0, 1)]
        self.last["acceptance"] = total[0] / max(1, total[1])
        return self.last

    def router(self) -> dict[str, Any]:
        """See `router_report`."""
        size = self.lessons.batch
        starts = range(0, len(self.held_out), size)
        return router_report(self.objective, (self.lessons.teach(self.held_out[s : s + size]) for s in starts))


def _refuse_blind_targets(target: Target, processor: Any, captured: Sequence[Captured]) -> None:
    """The teacher test: other pixels must change the target's logits (the published Qwen2-VL teacher saw none)."""
    some = [c for c in captured if c.images][:2]
    if some:
        inputs = prepare(processor, [list(c.images) for c in some], [c.prompt for c in some])
        assert_images_matter(target, inputs, [c.ids for c in some])


def peak_gigabytes() -> float:
    """Peak resident memory of this process."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1e9 if sys.platform == "darwin" else 1e6)
