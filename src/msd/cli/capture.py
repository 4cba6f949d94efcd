"""`msd capture`: writes the target's own answers, with the image gain of each token, as training data for a drafter."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress

from msd.cli import terminal
from msd.cli.options import DataLines, Json, MaxNewTokens, Model, grouped, quiet
from msd.errors import InterruptedRunError, UserError, named
from msd.system.files import as_text, check_place
from msd.system.machine import share_cores

if TYPE_CHECKING:
    from msd.bench.data import Sample
    from msd.train.capture import Prompt


@grouped
def capture(
    out: Annotated[Path, typer.Option("--out", help="File for the answers (jsonl); an earlier run there is resumed.")],
    lines: DataLines,
    model: Model,
    max_new_tokens: MaxNewTokens = 128,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Prompts answered together.")] = 16,
    as_json: Json = False,
) -> None:
    """Generate the target's greedy answers, and label each token by how much the image changes its probability."""
    from msd.bench.data import BUNDLED, image_folder, load_data
    from msd.train.capture import pending

    begin = time.perf_counter()
    check_place(out)
    every = load_data(lines.data, lines.images)
    samples = every[: lines.limit]
    folder = image_folder(lines.data or BUNDLED / "prompts.jsonl", lines.images)
    prompts = [_prompt(sample, folder) for sample in samples]
    places = {p.key: s.where for p, s in zip(prompts, samples, strict=True)}
    pending(prompts, out)  # an --out that cannot be resumed fails before any model loads
    quiet()
    share_cores()
    from msd.labels.label_thresholds import ModalityThresholds
    from msd.loading import load_target
    from msd.targets.registry import fingerprint
    from msd.train.capture import check_labelled, fit_label_thresholds, label_thresholds_path
    from msd.train.target_writer import TargetWriter

    path = label_thresholds_path(out)
    thresholds = ModalityThresholds.load(path) if path.exists() else None
    with terminal.status("loading the target…"):
        loaded, processor = load_target(model.target, model.device)
        name = fingerprint(loaded)
    if thresholds is not None:
        thresholds.check_target(name)
    writer = TargetWriter(loaded, processor, folder, max_new_tokens, model.backend)
    lossy = writer.engine.target.backend.lossy
    metadata = {"target": name} | ({"backend": model.backend} if lossy else {})
    todo = pending(prompts, out, metadata)
    records = _write(prompts, todo, places, writer, out, batch, metadata)
    check_labelled(records, out)
    if thresholds is None and not lossy and len(samples) == len(every):  # only exact gains of all data lines are fitted
        thresholds = fit_label_thresholds(records, name)
        if thresholds is not None:
            thresholds.save(path)
    summary = {
        "out": str(out), "records": len(records), "written": len(todo),
        "tokens": sum(len(r["gain"]) for r in records),
        "finished": sum(r["finished"] for r in records) / len(records), "target": name,
        "cuts": None if thresholds is None else {"path": str(path), **thresholds.model_dump()},
        "seconds": round(time.perf_counter() - begin, 3),
    }  # fmt: skip
    print(json.dumps(summary) if as_json else _text(summary))


def _prompt(sample: Sample, folder: Path) -> Prompt:
    """Returns the prompt of a data line. Raises UserError unless it is a single prompt about images."""
    from msd.train.capture import Prompt

    if sample.before:
        raise UserError(f"{sample.where}: a conversation; 'msd capture' needs single prompts, so give its first turn")
    if not all(isinstance(shown, Path) for shown in sample.images):
        raise UserError(f"{sample.where}: a video; 'msd capture' needs prompts about images, so leave the line out")
    images = tuple(_name(path, folder) for path in sample.images if isinstance(path, Path))
    events = None if sample.events is None else _name(sample.events, folder)
    return Prompt(sample.prompt, images, sample.task, sample.split, events)


def _name(path: Path, folder: Path) -> str:
    """Returns the name of an image as the data gives it."""
    return as_text(path.relative_to(folder) if path.is_relative_to(folder) else path)


def _write(
    prompts: list[Prompt],
    todo: list[Prompt],
    places: dict[Any, str],
    writer: Any,
    out: Path,
    batch: int,
    metadata: dict[str, str],
) -> list[dict[str, Any]]:
    """Checks the prompts `todo`, then writes their answers, with a progress bar. Returns all records."""
    from msd.train.capture import capture as write_answers

    console = Console(file=sys.stderr)
    with Progress(console=console, disable=not console.is_terminal) as progress:
        for prompt in progress.track(todo, description="checking"):
            with named(places[prompt.key]):
                writer.check(prompt)
        bar = progress.add_task("capturing", total=None)
        try:
            return write_answers(
                prompts, writer, out, batch, lambda done, n: progress.update(bar, completed=done, total=n), metadata
            )
        except KeyboardInterrupt as stop:
            raise InterruptedRunError(
                f"interrupted; finished answers are kept in {out}, and the same command resumes"
            ) from stop


def _text(summary: dict[str, object]) -> str:
    """Formats the summary as text."""
    thresholds = summary["cuts"]
    text = f"{summary['out']}: {summary['records']} answers, {summary['tokens']} tokens, {summary['written']} new"
    if not isinstance(thresholds, dict):
        return f"{text}; no label thresholds (they are fitted on all train lines with images, without --limit)"
    limits = f"language ≤ {thresholds['language_max']:.4f}, vision ≥ {thresholds['vision_min']:.4f} nats"
    if thresholds["events"] is not None:
        limits += f"; events: language ≤ {thresholds['events']['least']:.4f} nats"
    return f"{text}\n{thresholds['path']}: {limits}, fitted on {thresholds['tokens']} tokens"
