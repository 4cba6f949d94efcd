"""`msd capture`: answers written by the target itself, with the image gain of every token, to train a drafter on."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress

from msd.cli import terminal
from msd.cli.options import DataLines, Json, MaxNewTokens, Model, grouped, quiet
from msd.errors import InterruptedRunError, UserError
from msd.system.files import as_text, check_place
from msd.system.machine import share_cores

if TYPE_CHECKING:
    from msd.bench.data import Sample
    from msd.labels.label_thresholds import ModalityThresholds
    from msd.train.capture import Prompt


@grouped
def capture(
    out: Annotated[Path, typer.Option("--out", help="File for the answers (jsonl); an earlier run there goes on.")],
    lines: DataLines,
    model: Model,
    max_new_tokens: MaxNewTokens = 128,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Prompts answered together.")] = 16,
    as_json: Json = False,
) -> None:
    """Let the target answer prompts greedily, and label what it says by how much the image mattered."""
    from msd.bench.data import BUNDLED, image_folder, load_data
    from msd.train.capture import capture as write_all
    from msd.train.capture import pending

    begin = time.perf_counter()
    check_place(out)
    every = load_data(lines.data, lines.images)
    samples = every[: lines.limit]
    folder = image_folder(lines.data or BUNDLED / "prompts.jsonl", lines.images)
    prompts = [_prompt(sample, folder) for sample in samples]
    places = {(p.images, p.text): s.where for p, s in zip(prompts, samples, strict=True)}
    pending(prompts, out)  # an --out that cannot be continued fails before any model loads
    quiet()
    share_cores()
    from msd.labels.label_thresholds import ModalityThresholds
    from msd.loading import load_target
    from msd.targets.registry import fingerprint
    from msd.train.capture import check_labelled, fit_label_thresholds, label_thresholds_path
    from msd.train.target_writer import TargetWriter

    frozen = label_thresholds_path(out)
    thresholds = ModalityThresholds.load(frozen) if frozen.exists() else None

    console = Console(file=sys.stderr)
    with terminal.status("loading the target…"):
        loaded, processor = load_target(model.target, model.device)
        name = fingerprint(loaded)
    if thresholds is not None:
        thresholds.check_target(name)
    writer = TargetWriter(loaded, processor, folder, max_new_tokens, model.backend)
    lossy = writer.engine.target.backend.lossy
    marks = {"target": name} | ({"backend": model.backend} if lossy else {})
    todo = pending(prompts, out, marks)
    with Progress(console=console, disable=not console.is_terminal) as progress:
        for prompt in progress.track(todo, description="checking"):
            _check(writer, prompt, places[prompt.images, prompt.text])
        bar = progress.add_task("capturing", total=None)

        def show(done: int, total: int) -> None:
            progress.update(bar, completed=done, total=total)

        records = _written(lambda: write_all(prompts, writer, out, batch, show, marks), out)
    check_labelled(records, out)
    # thresholds are fitted on the whole data and on exact gains only
    if thresholds is None and not lossy and len(samples) == len(every):
        thresholds = fit_label_thresholds(records, name)
        if thresholds is not None:
            thresholds.save(frozen)
    summary = _summary(records, out, len(todo), name, None if thresholds is None else (frozen, thresholds))
    summary["seconds"] = round(time.perf_counter() - begin, 3)
    print(json.dumps(summary) if as_json else _told(summary))


def _summary(
    records: list[dict[str, Any]],
    out: Path,
    written: int,
    target: str,
    thresholds: tuple[Path, ModalityThresholds] | None,
) -> dict[str, Any]:
    """What was captured, JSON-ready."""
    return {
        "out": str(out),
        "records": len(records),
        "written": written,
        "tokens": sum(len(r["gain"]) for r in records),
        "finished": sum(r["finished"] for r in records) / len(records),
        "target": target,
        "cuts": None if thresholds is None else {"path": str(thresholds[0]), **thresholds[1].model_dump()},
    }


def _prompt(sample: Sample, folder: Path) -> Prompt:
    """What a data line asks; UserError for a line that is no single prompt about images."""
    from msd.train.capture import Prompt

    if sample.before:
        raise UserError(f"{sample.where}: a conversation; 'msd capture' asks single prompts, so give its first turn")
    if not all(isinstance(shown, Path) for shown in sample.images):
        raise UserError(f"{sample.where}: a video; 'msd capture' asks about images, so leave the line out")
    images = tuple(_name(path, folder) for path in sample.images if isinstance(path, Path))
    events = None if sample.events is None else _name(sample.events, folder)
    return Prompt(sample.prompt, images, sample.task, sample.split, events)


def _written(write: Callable[[], list[dict[str, Any]]], out: Path) -> list[dict[str, Any]]:
    """The records, or how to go on after an interrupt."""
    try:
        return write()
    except KeyboardInterrupt as stop:
        raise InterruptedRunError(
            f"interrupted; what is written is kept in {out}, and the same command goes on from there"
        ) from stop


def _check(writer: Any, prompt: Any, place: str) -> None:
    """What is wrong with a prompt, with its file and line."""
    try:
        writer.check(prompt)
    except UserError as error:
        raise UserError(f"{place}: {error}") from error


def _name(path: Path, folder: Path) -> str:
    """An image as the data names it."""
    return as_text(path.relative_to(folder) if path.is_relative_to(folder) else path)


def _told(summary: dict[str, object]) -> str:
    """The summary in words."""
    thresholds = summary["cuts"]
    told = f"{summary['out']}: {summary['records']} answers, {summary['tokens']} tokens, {summary['written']} new"
    if not isinstance(thresholds, dict):
        return f"{told}; no label thresholds (they are fitted on all lines of the train part that have images)"
    edges = f"language ≤ {thresholds['language_max']:.4f}, vision ≥ {thresholds['vision_min']:.4f} nats"
    if thresholds["events"] is not None:
        edges += f"; events: language ≤ {thresholds['events']['least']:.4f} nats"
    return f"{told}\n{thresholds['path']}: {edges}, fitted on {thresholds['tokens']} tokens"
