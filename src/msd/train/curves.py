"""Learning curves of a run as a picture, from the log that `train.loop` writes."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from pathlib import Path

from msd.errors import UserError
from msd.system.files import write_whole
from msd.system.records import read_rows

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
