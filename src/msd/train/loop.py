"""The state of a training run on disk, the newest and the one before, so that one damaged file costs little."""

from __future__ import annotations

import errno
import io
import json
import math
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from msd.errors import UserError
from msd.system.files import LFS, append, make_folder, read_rows, write_whole

FIELDS = {"params": dict, "optimizer": dict, "step": int, "schedule": dict, "running": dict}
SCHEDULE = {"steps", "start", "level", "warmup", "floor", "warm_from"}


class Damaged(Exception):  # noqa: N818
    """A checkpoint that cannot be gone on from; the message says which file it is, and why."""


def write(state: dict[str, Any], path: Path, previous: Path) -> None:
    """Writes `state`, of tensors and plain values, to `path`; what was there becomes `previous`.

    UserError when it cannot be written; the files are then as they were.
    """

    def put(beside: Path) -> None:
        try:
            torch.save(state, beside)
        except RuntimeError as error:  # of the library's own writer, which does not tell why
            raise OSError(errno.EIO, f"{str(error).splitlines()[0]} (is the disk full?)") from error

    write_whole(path, put, previous)


def read(path: Path) -> dict[str, Any]:
    """What `write` wrote, on the CPU. Damaged: no such file, cut short, anything else, or weights not finite."""
    if not path.is_file():
        raise Damaged(f"there is no '{path}'")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what bytes that are no checkpoint may raise has no bounds
        raise Damaged(f"'{path}' is damaged: {_reason(path, error)}") from error
    if not isinstance(state, dict) or not all(isinstance(state.get(name), kind) for name, kind in FIELDS.items()):
        raise Damaged(f"'{path}' is damaged: it is no checkpoint of a run")
    if state["schedule"].keys() != SCHEDULE:
        raise Damaged(f"'{path}' has a schedule of other fields; was it written by another version of msd?")
    moments = [value for each in state["optimizer"].get("state", {}).values() for value in each.values()]
    tensors = [*state["params"].values(), *state.get("averaged", {}).values(), *moments]
    if not all(bool(t.isfinite().all()) for t in tensors if isinstance(t, Tensor)):
        raise Damaged(f"'{path}' is damaged: its weights are not finite")
    return state


def _reason(path: Path, error: Exception) -> str:
    size = path.stat().st_size
    if size == 0:
        return "it is empty"
    with path.open("rb") as file:
        if file.read(len(LFS)) == LFS:
            return "it is a git-lfs pointer"
    return f"it is cut short, or no checkpoint ({(str(error).splitlines() or [''])[0][:100]})"


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
            raise UserError(
                f"the run is at step {step} already: it cannot end at step {steps}; "
                "ask for more steps, or take another folder"
            )
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
    `config.steps` differs from the checkpoint's, the schedule lands at the new end. The checkpoint before stays beside
    it, as `checkpoint.previous.pt`, and is gone on from when the newer one is damaged. With several processes each runs
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
        make_folder(folder)
        if self.checkpoint.exists() or self.previous.exists():
            self._restore()
        if main:
            self._trim_log()

    @property
    def checkpoint(self) -> Path:
        """Where the state is kept."""
        return self.folder / "checkpoint.pt"

    @property
    def previous(self) -> Path:
        """Where the state that was saved before it is kept."""
        return self.folder / "checkpoint.previous.pt"

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
            raise self._diverged(f"the loss of step {self.step} is {loss.item()}")
        self.backward(loss)
        norm = torch.nn.utils.clip_grad_norm_(self.params.values(), self.config.clip)
        if not torch.isfinite(norm):  # before they spoil the weights
            raise self._diverged(f"the gradients of step {self.step} are not finite")
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        for name, average in self.averaged.items():
            average.lerp_(self.params[name].detach(), 1 - self.config.average)
        for name, value in {"loss": loss.item(), **parts}.items():
            old = self.running.get(name, value)
            self.running[name] = self.config.memory * old + (1 - self.config.memory) * value
        self.step += 1

    def _diverged(self, what: str) -> UserError:
        return UserError(f"{what}: the run in '{self.folder}' diverged; start again in another folder, at a lower rate")

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
        """Puts a new checkpoint in the place of the old one, which is kept as the one before."""
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
        write(state, self.checkpoint, self.previous)

    def _restore(self) -> None:
        """Goes on from the newest checkpoint that is whole; UserError when none is, or when it is of another model."""
        wrong = []
        for path in (self.checkpoint, self.previous):
            try:
                state = read(path)
            except Damaged as error:
                wrong.append(str(error))
                continue
            self._take(state, path)
            if wrong:
                print(f"msd: {wrong[0]}; going on from '{path.name}', step {self.step}", file=sys.stderr)
            return
        raise UserError(f"{', and '.join(wrong)}; delete what there is of the two, and the run begins anew")

    def _take(self, state: dict[str, Any], path: Path) -> None:
        params = state["params"]
        shapes = [{name: tuple(v.shape) for name, v in values.items()} for values in (params, self.params)]
        if shapes[0] != shapes[1]:
            raise UserError(f"'{path}' holds other parameters than this model trains; use another folder")
        self._put(params)
        if self.averaged:  # a run that was not averaged so far starts from where it is
            self.averaged = {n: v.clone() for n, v in state.get("averaged", params).items()}
        try:
            self.optimizer.load_state_dict(state["optimizer"])
        except (ValueError, KeyError) as error:
            raise UserError(f"'{path}' was written with another optimizer ({error}); use another folder") from error
        self.step, self.running = state["step"], state["running"]
        self.schedule = Schedule(**state["schedule"]).landing(self.step, self.config.steps)

    def _trim_log(self) -> None:
        """Leaves the rows up to this step: a killed process wrote more of them, the last one perhaps by half."""
        log = self.folder / "log.jsonl"
        if log.is_file():
            rows, _ = read_rows(log, "delete it: only the learning curves so far are lost")
            kept = [row for row in rows if isinstance(row.get("step"), int) and row["step"] <= self.step]
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept)
            if text.encode() != log.read_bytes():
                write_whole(log, text)

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
        append(self.folder / "log.jsonl", json.dumps(row, ensure_ascii=False) + "\n")
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


NOT_LOSSES = ("step", "steps", "lr", "answer_tokens_per_second", "peak_gb", "acceptance", "seconds")


def read_log(path: Path) -> tuple[list[dict[str, float]], list[dict[str, float]]]:
    """(training rows, held-out rows without their `val_`) of a `log.jsonl`; UserError when there is no such file.

    Lines that are damaged are left out.
    """
    if not path.is_file():
        raise UserError(f"'{path}' does not exist; it is written by the first steps of a run")
    found, _ = read_rows(path, "give the log that a run wrote")
    rows = [row for row in found if all(isinstance(value, int | float) for value in row.values()) and "step" in row]
    training = [r for r in rows if "lr" in r]
    held_out = [{k.removeprefix("val_"): v for k, v in r.items()} for r in rows if any(k.startswith("val_") for k in r)]
    return training, held_out


def tensorboard(folder: Path) -> Callable[[Mapping[str, float]], None]:
    """A sink of log rows for TensorBoard, which reads `folder`; UserError when it is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UserError("--tensorboard needs TensorBoard: pip install tensorboard") from error
    writer = SummaryWriter(folder)

    def sink(row: Mapping[str, float]) -> None:
        for name, value in row.items():
            if name != "step":
                writer.add_scalar(name, value, int(row["step"]))
        writer.flush()

    return sink


def draw(log: Path, picture: Path) -> None:
    """Two panels: losses per modality while training, and held-out chain acceptance per modality."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    training, held_out = read_log(log)
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), constrained_layout=True)
    for axes, rows, title in (
        (left, training, "loss, running mean"),
        (right, held_out, "acceptance on held-out answers"),
    ):
        names = sorted({k for r in rows for k in r} - {"step", *(NOT_LOSSES if axes is left else ())})
        for name in names:
            if not name.startswith("λ"):
                points = [(r["step"], r[name]) for r in rows if name in r]
                axes.plot(*zip(*points, strict=True), label=name, marker="." if axes is right else None)
        axes.set(title=title, xlabel="step")
        axes.grid(alpha=0.3)
        if names:
            axes.legend(fontsize=8)
    right.set_ylim(0, 1)
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=110, format="png")
    plt.close(figure)
    write_whole(picture, drawn.getvalue())
