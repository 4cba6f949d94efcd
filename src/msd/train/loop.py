"""A resumable training loop: learning-rate schedule, checkpoints, log file and learning curves."""

from __future__ import annotations

import errno
import io
import json
import math
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from msd.drafters.toolkit import processes
from msd.errors import UserError
from msd.system.files import append, make_folder, read_bytes, read_rows, write_whole

CHECKPOINT_FIELDS = {"params": dict, "optimizer": dict, "step": int, "schedule": dict, "running": dict}
REMEDY = "start the run again"  # for a checkpoint that cannot be read
SMOOTHING = 0.98  # of the running means of losses
NOT_LOSSES = ("step", "steps", "lr", "answer_tokens_per_second", "peak_gb", "acceptance", "seconds")

StepLoss = Callable[[int], tuple[Tensor, Mapping[str, float]]]
Evaluate = Callable[[], Mapping[str, float]]
Sink = Callable[[Mapping[str, float]], None]  # receives each row of the log


@dataclass(frozen=True)
class Schedule:
    """A learning-rate schedule: linear warm-up, then cosine decay. Rates are fractions of the peak.

    The cosine falls from `level` at step `start` to `floor` at step `steps`. The warm-up covers the `warmup` steps
    from step `warm_from`.
    """

    steps: int
    start: int = 0
    level: float = 1.0
    warmup: int = 50
    floor: float = 0.03
    warm_from: int = 0

    def factor(self, step: int) -> float:
        """Returns the learning rate of `step` as a fraction of the peak."""
        part = min(1.0, max(0.0, (step - self.start) / max(1, self.steps - self.start)))
        cosine = self.floor + (self.level - self.floor) * 0.5 * (1 + math.cos(math.pi * part))
        return min(1.0, (step - self.warm_from + 1) / max(1, self.warmup)) * cosine

    def resumed(self, step: int, steps: int) -> Schedule:
        """Returns the schedule of a run that resumes at `step` and ends at `steps`.

        An unfinished run decays from its current rate. A finished run warms up to the peak again.
        """
        if steps == self.steps:
            return self
        if steps <= step:
            raise UserError(
                f"the run is already at step {step}: it cannot end at step {steps}; "
                "give more steps, or use another folder"
            )
        if step >= self.steps:
            return replace(self, steps=steps, start=step, level=1.0, warm_from=step)
        return replace(self, steps=steps, start=step, level=self.factor(max(step, self.warm_from + self.warmup)))


@dataclass(frozen=True)
class LoopConfig:
    """Length of a run and its intervals, in steps. save_seconds: time between checkpoints; it changes no result.

    clip: largest norm of the gradients. average: decay of the averaged weights per step; 0 keeps no average.
    """

    steps: int
    seed: int = 0
    warmup: int = 50
    clip: float = 1.0
    log_every: int = 10
    evaluate_every: int = 200
    save_seconds: float = 300.0
    average: float = 0.0


class Loop:
    """Trains named parameters. State is saved in `folder/checkpoint.pt`, the log in `folder/log.jsonl`.

    `step_loss(step)` returns the loss to minimise and named losses to log. A folder with a checkpoint is resumed; if
    `config.steps` differs from the checkpoint's, the schedule ends at the new number. The previous checkpoint stays in
    `checkpoint.previous.pt` and is used if the newest one is damaged. With several processes, each runs the loop:
    `backward` averages their gradients (accelerate's), the log holds averages over them, a signal to one of them stops
    all after the same step, and only the `main` process writes.
    keep: number of steps -> what to call when the run has made so many.
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
        sink: Sink | None = None,
        keep: Mapping[int, Callable[[], None]] | None = None,
    ):
        self.params, self.optimizer, self.step_loss, self.config = dict(params), optimizer, step_loss, config
        self.folder, self.evaluate = folder, evaluate
        self.checkpoint, self.previous = folder / "checkpoint.pt", folder / "checkpoint.previous.pt"
        self.backward, self.main, self.sink = backward, main, sink
        self.keep = dict(keep or {})
        self.step, self.running = 0, dict[str, float]()  # running: the running mean of each logged loss
        self.averaged = {n: p.detach().clone() for n, p in self.params.items()} if config.average else {}
        self.schedule = Schedule(config.steps, warmup=config.warmup)
        self._peaks = [g["lr"] for g in optimizer.param_groups]
        self._stop, self.device = False, next(iter(self.params.values())).device
        make_folder(folder)
        if self.checkpoint.exists() or self.previous.exists():
            self._restore()
        if main:
            self._trim_log()

    def run(self) -> bool:
        """Trains to the end of the schedule, or until a signal stops it (returns False). Both save the state."""
        saved, begun, first = time.monotonic(), time.monotonic(), self.step
        with on_signals(self._request_stop):
            while self.step < self.schedule.steps and not processes.anywhere(self._stop, self.device):
                self._one_step()
                done = self.step >= self.schedule.steps
                if self.step % self.config.log_every == 0 or done:
                    lr, seconds = self.schedule.factor(self.step - 1), (time.monotonic() - begun) / (self.step - first)
                    self._log({"steps": self.schedule.steps, "lr": lr, **self.running, "seconds": seconds})
                if self.evaluate and (self.step % self.config.evaluate_every == 0 or done):
                    with self.using_average():
                        values = self.evaluate()
                    self._log({f"val_{k}": v for k, v in values.items()})
                if self.step in self.keep:
                    self.keep[self.step]()
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
        if not torch.isfinite(norm):  # checked before the update, so that the weights stay finite
            raise self._diverged(f"the gradients of step {self.step} are not finite")
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        for name, average in self.averaged.items():
            average.lerp_(self.params[name].detach(), 1 - self.config.average)
        for name, value in processes.averaged({"loss": loss.item(), **parts}, loss.device).items():
            self.running[name] = SMOOTHING * self.running.get(name, value) + (1 - SMOOTHING) * value
        self.step += 1

    def _diverged(self, what: str) -> UserError:
        return UserError(
            f"{what}: the run in '{self.folder}' diverged; start again in another folder, with a lower learning rate"
        )

    def _request_stop(self, *_: object) -> None:
        self._stop = True

    @contextmanager
    def using_average(self) -> Iterator[None]:
        """Replaces the parameters by the averaged weights, if there are any, inside the block."""
        current = {n: self.params[n].detach().clone() for n in self.averaged}
        self._assign(self.averaged)
        try:
            yield
        finally:
            self._assign(current)

    @torch.no_grad()
    def _assign(self, values: Mapping[str, Tensor]) -> None:
        for name, value in values.items():
            self.params[name].copy_(value)

    def save(self) -> None:
        """Writes the checkpoint; the one before becomes `previous`. Raises UserError if it cannot be written."""
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

        def write(path: Path) -> None:
            try:
                torch.save(state, path)
            except RuntimeError as error:  # from torch's own writer, which does not give the cause
                raise OSError(errno.EIO, f"{str(error).splitlines()[0]} (is the disk full?)") from error

        write_whole(self.checkpoint, write, self.previous)

    def _restore(self) -> None:
        """Loads the newest intact checkpoint. Raises UserError if neither is intact, or if it is of another model."""
        problems = []
        for path in (self.checkpoint, self.previous):
            try:
                state = read_checkpoint(path)
            except UserError as error:
                problems.append(str(error).removesuffix(f"; {REMEDY}"))
                continue
            self._load_state(state, path)
            if problems:
                print(f"msd: {problems[0]}; going on from '{path.name}', step {self.step}", file=sys.stderr)
            return
        raise UserError(f"{', and '.join(problems)}; delete both files to start the run again")

    def _load_state(self, state: dict[str, Any], path: Path) -> None:
        params = state["params"]
        shapes = [{name: tuple(v.shape) for name, v in values.items()} for values in (params, self.params)]
        if shapes[0] != shapes[1]:
            raise UserError(f"'{path}' holds other parameters than this model trains; use another folder")
        self._assign(params)
        if self.averaged:  # a run without averaged weights so far starts the average from its parameters
            self.averaged = {n: v.clone() for n, v in state.get("averaged", params).items()}
        try:
            self.optimizer.load_state_dict(state["optimizer"])
        except (ValueError, KeyError) as error:
            raise UserError(f"'{path}' was written with another optimizer ({error}); use another folder") from error
        self.step, self.running = state["step"], state["running"]
        self.schedule = Schedule(**state["schedule"]).resumed(self.step, self.config.steps)

    def _trim_log(self) -> None:
        """Removes rows after the current step, and incomplete ones, which a killed process may have left."""
        log = self.folder / "log.jsonl"
        if log.is_file():
            rows, _ = read_rows(log, "delete it: only the learning curves so far are lost")
            kept = [row for row in rows if isinstance(row.get("step"), int) and row["step"] <= self.step]
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept)
            if text.encode() != log.read_bytes():
                write_whole(log, text)

    def _log(self, values: Mapping[str, float]) -> None:
        if not self.main:
            return
        row = {k: round(v, 4) for k, v in {"step": self.step, **values}.items()}
        append(self.folder / "log.jsonl", json.dumps(row, ensure_ascii=False) + "\n")
        if self.sink:
            self.sink(row)
        print(time.strftime("%H:%M:%S"), " ".join(f"{k} {v:g}" for k, v in row.items()), flush=True)


@contextmanager
def on_signals(handler: Callable[..., None]) -> Iterator[None]:
    """Calls `handler` on SIGINT (Ctrl-C) and SIGTERM inside the block."""
    before = {kind: signal.signal(kind, handler) for kind in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for kind, old in before.items():
            signal.signal(kind, old)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Loads a checkpoint onto the CPU. Raises UserError if it is missing, damaged, or not finite."""
    data = read_bytes(path, REMEDY)
    try:
        state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # arbitrary bytes may raise any exception
        cause = (str(error).splitlines() or [""])[0][:100]
        raise UserError(f"'{path}' is damaged: it is incomplete, or no checkpoint ({cause})") from error
    if not isinstance(state, dict) or not all(isinstance(state.get(k), kind) for k, kind in CHECKPOINT_FIELDS.items()):
        raise UserError(f"'{path}' is damaged: it is no checkpoint of a run")
    if state["schedule"].keys() != {f.name for f in fields(Schedule)}:
        raise UserError(f"'{path}' has a schedule of other fields; was it written by another version of msd?")
    moments = [value for each in state["optimizer"].get("state", {}).values() for value in each.values()]
    tensors = [*state["params"].values(), *state.get("averaged", {}).values(), *moments]
    if not all(bool(t.isfinite().all()) for t in tensors if isinstance(t, Tensor)):
        raise UserError(f"'{path}' is damaged: its weights are not finite")
    return state


def read_log(path: Path) -> tuple[list[dict[str, float]], list[dict[str, float]]]:
    """Reads a `log.jsonl`, without damaged lines: (training rows, held-out rows without their `val_` prefix).

    Raises UserError if the file cannot be read.
    """
    found, _ = read_rows(path, "give the log that a run wrote")
    rows = [row for row in found if all(isinstance(value, int | float) for value in row.values()) and "step" in row]
    training = [r for r in rows if "lr" in r]
    held_out = [{k.removeprefix("val_"): v for k, v in r.items()} for r in rows if any(k.startswith("val_") for k in r)]
    return training, held_out


def tensorboard(folder: Path) -> Sink:
    """Returns a sink that writes log rows for TensorBoard to `folder`. Raises UserError if it is not installed."""
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
    """Plots a log in two panels: training losses, and held-out acceptance, per modality."""
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
    content = io.BytesIO()
    figure.savefig(content, dpi=110, format="png")
    plt.close(figure)
    write_whole(picture, content.getvalue())
