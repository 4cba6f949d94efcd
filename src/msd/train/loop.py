"""A training loop that can stop anywhere and go on to the same result.

Everything a step does follows from (seed, step): the caller draws data from the step number alone, the loop seeds
torch from it, and the learning rate is a function of the step, never of the clock. A checkpoint therefore holds
weights, optimizer state, step and schedule. Knows nothing of models or data.
"""

from __future__ import annotations

import json
import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

StepLoss = Callable[[int], tuple[Tensor, Mapping[str, float]]]
Evaluate = Callable[[], Mapping[str, float]]


@dataclass(frozen=True)
class Schedule:
    """A cosine from `level` at step `start` to `floor` at step `steps`, as factors of the peak.

    The first `warmup` steps from step `warm_from` on rise to it.
    """

    steps: int
    start: int = 0
    level: float = 1.0
    warmup: int = 50
    floor: float = 0.03
    warm_from: int = 0

    def factor(self, step: int) -> float:
        """The learning rate of `step`, as a share of the peak."""
        part = min(1.0, max(0.0, (step - self.start) / max(1, self.steps - self.start)))
        cosine = self.floor + (self.level - self.floor) * 0.5 * (1 + math.cos(math.pi * part))
        return min(1.0, (step - self.warm_from + 1) / max(1, self.warmup)) * cosine

    def landing(self, step: int, steps: int) -> Schedule:
        """The same run with another end: from where the schedule stands at `step`, a cosine to the floor at `steps`.

        A run that had reached its end warms up to the peak again.
        """
        if steps == self.steps:
            return self
        if steps <= step:
            raise ValueError(f"the run is at step {step} already: it cannot end at step {steps}")
        if step >= self.steps:
            return Schedule(steps, step, 1.0, self.warmup, self.floor, step)
        return Schedule(
            steps, step, self.factor(max(step, self.warm_from + self.warmup)), self.warmup, self.floor, self.warm_from
        )


@dataclass(frozen=True)
class LoopConfig:
    """How long and how often. Seconds only decide when to save, which changes no result."""

    steps: int
    seed: int = 0
    warmup: int = 50
    floor: float = 0.03
    clip: float = 1.0
    log_every: int = 10
    evaluate_every: int = 200
    save_seconds: float = 300.0
    memory: float = 0.98  # of the running losses
    average: float = 0.0  # share that the averaged weights keep per step; 0: no averaging


class Loop:
    """Trains named parameters; its state lives in `folder/checkpoint.pt`, its log in `folder/log.jsonl`.

    `step_loss(step)` returns the loss to minimise and named losses to log. A folder with a checkpoint is continued; if
    `config.steps` differs from the checkpoint's, the schedule lands at the new end. With several processes each runs
    the loop: `backward` brings their gradients together (accelerate's), and only the `main` one writes and evaluates.
    `sink` is given every row of the log.
    """

    def __init__(
        self,
        params: Mapping[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
        step_loss: StepLoss,
        config: LoopConfig,
        folder: Path,
        evaluate: Evaluate | None = None,
        backward: Callable[[Tensor], None] = Tensor.backward,
        main: bool = True,
        sink: Callable[[Mapping[str, float]], None] | None = None,
    ):
        self.params, self.optimizer, self.step_loss, self.config = dict(params), optimizer, step_loss, config
        self.folder, self.evaluate = folder, evaluate if main else None
        self.backward, self.main, self.sink = backward, main, sink
        self.step, self.running = 0, dict[str, float]()
        self.averaged = {n: p.detach().clone() for n, p in self.params.items()} if config.average else {}
        self.schedule = Schedule(config.steps, warmup=config.warmup, floor=config.floor)
        self._peaks = [g["lr"] for g in optimizer.param_groups]
        self._stop = False
        folder.mkdir(parents=True, exist_ok=True)
        if self.checkpoint.exists():
            self._restore()

    @property
    def checkpoint(self) -> Path:
        """Where the state is kept."""
        return self.folder / "checkpoint.pt"

    def run(self) -> bool:
        """Train to the end of the schedule, or to a signal (returns False); either way the state is saved."""
        saved, begun, first = time.monotonic(), time.monotonic(), self.step
        with signals(self._ask_to_stop):
            while self.step < self.schedule.steps and not self._stop:
                self._one_step()
                done = self.step >= self.schedule.steps
                if self.step % self.config.log_every == 0 or done:
                    self._log(seconds=(time.monotonic() - begun) / (self.step - first))
                if self.evaluate and (self.step % self.config.evaluate_every == 0 or done):
                    with self.using_average():
                        values = self.evaluate()
                    self._log(**{f"val_{k}": v for k, v in values.items()})
                if time.monotonic() - saved > self.config.save_seconds:
                    self.save()
                    saved = time.monotonic()
        self.save()
        return self.step >= self.schedule.steps

    def _one_step(self) -> None:
        factor = self.schedule.factor(self.step)
        for group, peak in zip(self.optimizer.param_groups, self._peaks, strict=True):
            group["lr"] = peak * factor
        torch.manual_seed(self.config.seed * 1_000_003 + self.step)
        loss, parts = self.step_loss(self.step)
        if not torch.isfinite(loss):
            raise FloatingPointError(
                f"the loss of step {self.step} is {loss.item()}: lower the learning rate and start again"
            )
        self.backward(loss)
        torch.nn.utils.clip_grad_norm_(self.params.values(), self.config.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        for name, average in self.averaged.items():
            average.lerp_(self.params[name].detach(), 1 - self.config.average)
        for name, value in {"loss": loss.item(), **parts}.items():
            old = self.running.get(name, value)
            self.running[name] = self.config.memory * old + (1 - self.config.memory) * value
        self.step += 1

    @contextmanager
    def using_average(self) -> Iterator[None]:
        """Puts the averaged weights, if there are any, in the place of the parameters for a while."""
        mine = {n: self.params[n].detach().clone() for n in self.averaged}
        self._put(self.averaged)
        try:
            yield
        finally:
            self._put(mine)

    @torch.no_grad()
    def _put(self, values: Mapping[str, Tensor]) -> None:
        for name, value in values.items():
            self.params[name].copy_(value)

    def save(self) -> None:
        """Write the checkpoint beside the old one, then put it in its place."""
        if not self.main:
            return
        state = {
            "params": {k: v.detach() for k, v in self.params.items()},
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "schedule": asdict(self.schedule),
            "running": self.running,
        }
        if self.averaged:
            state["averaged"] = self.averaged
        beside = self.checkpoint.with_suffix(".tmp")
        torch.save(state, beside)
        beside.replace(self.checkpoint)

    def _restore(self) -> None:
        state: dict[str, Any] = torch.load(self.checkpoint, map_location="cpu", weights_only=True)
        if state["params"].keys() != self.params.keys():
            raise ValueError(f"{self.checkpoint} holds other parameters than this model trains: use another folder")
        self._put(state["params"])
        if self.averaged:  # a run that was not averaged so far starts from where it is
            self.averaged = {n: v.clone() for n, v in state.get("averaged", state["params"]).items()}
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.running = state["step"], state["running"]
        self.schedule = Schedule(**state["schedule"]).landing(self.step, self.config.steps)

    def _log(self, **values: float) -> None:
        if not self.main:
            return
        row = {
            "step": self.step,
            "steps": self.schedule.steps,
            "lr": self.schedule.factor(self.step - 1),
            **self.running,
            **values,
        }
        if any(k.startswith("val_") for k in values):
            row = {"step": self.step, **values}
        row = {k: round(v, 4) for k, v in row.items()}
        with (self.folder / "log.jsonl").open("a", encoding="utf-8") as f:
            f.write(json.dumps(row) + "\n")
        if self.sink:
            self.sink(row)
        print(time.strftime("%H:%M:%S"), " ".join(f"{k} {v:g}" for k, v in row.items()), flush=True)

    def _ask_to_stop(self, *_: object) -> None:
        self._stop = True


@contextmanager
def signals(
    handler: Callable[..., None], kinds: Sequence[signal.Signals] = (signal.SIGTERM, signal.SIGINT)
) -> Iterator[None]:
    """Ctrl-C and SIGTERM call `handler` in the block, such as one that asks for a clean end."""
    before = {kind: signal.signal(kind, handler) for kind in kinds}
    try:
        yield
    finally:
        for kind, old in before.items():
            signal.signal(kind, old)
