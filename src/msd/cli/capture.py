"""`msd capture`: writes the target's own answers, with the image gain of each token, as training data for a drafter."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress

from msd.cli import terminal
from msd.cli.connection import Connection
from msd.cli.options import DataLines, Json, MaxNewTokens, Model, Temperature, grouped, quiet
from msd.errors import InterruptedRunError, UserError, named
from msd.system.files import as_text, check_place
from msd.system.machine import share_cores

BATCH = 16
SPLITS = ("train", "val", "test")  # parts of a data set; training reads the first
KEPT = "finished answers are kept in {}, and the same command resumes"

if TYPE_CHECKING:
    from msd.bench.data import Sample
    from msd.train.capture import Decoding, Metadata, Prompt


@dataclass(frozen=True)
class Served(Connection):
    """Answers from a server, or answers that one wrote before."""

    concurrency: Annotated[int, typer.Option("--concurrency", min=1, help="Requests to the server at a time.")] = 32
    shard: Annotated[
        str | None, typer.Option("--shard", help="I/N: only every N-th prompt from the I-th, written to OUT-I-of-N.")
    ] = None
    answers: Annotated[
        list[Path] | None,
        typer.Option("--answers", help="Label the answers that --server wrote to this file; repeatable."),
    ] = None

    def check(self, model: Model, batch: int, sampled: bool) -> None:
        """Raises UserError for options without effect."""
        if sampled and self.answers:
            raise UserError(
                "--answers labels answers that are there; give --temperature to the command that writes them"
            )
        if self.server is not None:
            if self.answers:
                raise UserError("--server writes answers and --answers labels them; do one after the other")
            if model != Model() or batch != BATCH:
                raise UserError(
                    "--server answers by itself; --target, --backend, --device and --batch are for --answers"
                )
            return
        default = Served(api_key=self.api_key, answers=self.answers)
        changed = next((f.name for f in fields(self) if getattr(self, f.name) != getattr(default, f.name)), None)
        if changed:
            raise UserError(f"--{changed.replace('_', '-')} is for --server; leave it out")

    def chosen(self, prompts: list[Prompt], out: Path) -> tuple[list[Prompt], Path]:
        """Returns the prompts of the shard, and its file."""
        if self.shard is None:
            return prompts, out
        number, slash, count = self.shard.partition("/")
        if not (slash and number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
            raise UserError(f"--shard '{self.shard}' is not I/N with 1 ≤ I ≤ N, such as 1/8")
        first = list({p.key: p for p in prompts}.values())  # equal prompts are answered in one shard
        return first[int(number) - 1 :: int(count)], out.with_name(f"{out.stem}-{number}-of-{count}{out.suffix}")


@grouped
def capture(
    out: Annotated[Path, typer.Option("--out", help="File for the answers (jsonl); an earlier run there is resumed.")],
    lines: DataLines,
    model: Model,
    served: Served,
    max_new_tokens: MaxNewTokens = 128,
    temperature: Temperature = 0.0,
    seed: Annotated[
        int | None,
        typer.Option("--seed", help="Of sampled answers; another one gives other answers.", show_default="0"),
    ] = None,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Prompts answered together.")] = BATCH,
    as_json: Json = False,
) -> None:
    """Generate the target's answers, and label each token by how much the image changes its probability."""
    from msd.train.capture import Decoding, pending

    if seed is not None and temperature == 0:
        raise UserError("--seed has no effect on greedy answers; set --temperature above 0")
    decoding = Decoding(temperature, seed or 0)
    served.check(model, batch, decoding.sampled)
    check_place(out)
    work = _work(lines, out, max_new_tokens, decoding)
    if served.server is not None:
        summary = _from_server(served, work)
        print(
            json.dumps(summary) if as_json else "{out}: {records} answers, {written} new, of {model}".format(**summary)
        )
        return
    pending(work.prompts, out, work.decoding.metadata)  # an --out that cannot be resumed fails before any model loads
    from msd.train import launched, split_target

    with launched.ending_together(), split_target.own_copy(out, model.device) as place:
        summary = _from_target(served, model, replace(work, out=place), batch)
    if place == out:
        print(json.dumps(summary) if as_json else _text(summary))


@dataclass(frozen=True)
class Work:
    """The answers to write. places: where each prompt stands in the data, for messages. folder: of the images.

    complete: `prompts` are those of all data lines, so label thresholds are fitted.
    """

    prompts: list[Prompt]
    places: dict[Any, str]
    folder: Path
    out: Path
    max_new_tokens: int
    decoding: Decoding
    complete: bool


def _work(lines: DataLines, out: Path, max_new_tokens: int, decoding: Decoding) -> Work:
    """Reads the prompts. Raises UserError for a line that is not a single prompt about images."""
    from msd.bench.data import BUNDLED, image_folder, load_data

    every = load_data(lines.data, lines.images)
    if lines.data is None:  # the bundled prompts, without the later turns of conversations
        every = [sample for sample in every if not sample.before]
    samples = every[: lines.limit]
    folder = image_folder(lines.data or BUNDLED / "prompts.jsonl", lines.images)
    prompts = [_prompt(sample, folder) for sample in samples]
    places = {p.key: s.where for p, s in zip(prompts, samples, strict=True)}
    return Work(prompts, places, folder, out, max_new_tokens, decoding, len(samples) == len(every))


def _from_target(served: Served, model: Model, work: Work, batch: int) -> dict[str, Any]:
    """Writes and labels the target's answers, or labels given ones. Returns the summary."""
    begin = time.perf_counter()
    quiet()
    share_cores()
    from msd.labels.label_thresholds import ModalityThresholds
    from msd.targets.registry import fingerprint
    from msd.train import split_target
    from msd.train.capture import check_labelled, fit_label_thresholds, label_thresholds_path, pending, read_answers
    from msd.train.given_answers import AnswerLabeller
    from msd.train.target_writer import TargetWriter

    given = read_answers(served.answers or ())
    path = label_thresholds_path(work.out)
    thresholds = ModalityThresholds.load(path) if path.exists() else None
    with terminal.status("loading the target…"):
        loaded, processor = split_target.load(model.target, model.device)
        name = fingerprint(loaded)
    if split_target.is_split(loaded) and not given:
        raise UserError("a target that FSDP splits writes no answers; let a server write them, and give --answers")
    if thresholds is not None:
        thresholds.check_target(name)
    kind = partial(AnswerLabeller, given) if given else partial(TargetWriter, decoding=work.decoding)
    writer = kind(loaded, processor, work.folder, work.max_new_tokens, model.backend)
    lossy = writer.engine.target.backend.lossy
    metadata = {"target": name, "backend": model.backend if lossy else None, **work.decoding.metadata}
    todo = pending(work.prompts, work.out, metadata)
    records = _write(work, todo, writer, batch, metadata)
    check_labelled(records, work.out)
    if thresholds is None and not lossy and work.complete:  # only exact gains of all data lines are fitted
        thresholds = fit_label_thresholds(records, name)
        if thresholds is not None:
            thresholds.save(path)
    greedy = {"greedy": writer.greedy_share()} if isinstance(writer, AnswerLabeller) else {}
    return {
        "out": str(work.out), "records": len(records), "written": len(todo),
        "tokens": sum(len(r["gain"]) for r in records),
        "finished": sum(r["finished"] for r in records) / len(records), "target": name, **greedy,
        "cuts": None if thresholds is None else {"path": str(path), **thresholds.model_dump()},
        "seconds": round(time.perf_counter() - begin, 3),
    }  # fmt: skip


def _prompt(sample: Sample, folder: Path) -> Prompt:
    """Returns the prompt of a data line. Raises UserError unless it is a single prompt about images."""
    from msd.train.capture import Prompt

    if sample.before:
        raise UserError(f"{sample.where}: a conversation; 'msd capture' needs single prompts, so give its first turn")
    if sample.split not in SPLITS:
        raise UserError(f"{sample.where}: 'split' is {', '.join(SPLITS[:-1])} or {SPLITS[-1]}, not '{sample.split}'")
    if not all(isinstance(shown, Path) for shown in sample.images):
        raise UserError(f"{sample.where}: a video; 'msd capture' needs prompts about images, so leave the line out")
    images = tuple(_name(path, folder) for path in sample.images if isinstance(path, Path))
    events = None if sample.events is None else _name(sample.events, folder)
    return Prompt(sample.prompt, images, sample.task, sample.split, events)


def _name(path: Path, folder: Path) -> str:
    """Returns the name of an image as the data gives it."""
    return as_text(path.relative_to(folder) if path.is_relative_to(folder) else path)


def _write(work: Work, todo: list[Prompt], writer: Any, batch: int, metadata: Metadata) -> list[dict[str, Any]]:
    """Checks the prompts `todo`, then writes their answers, with a progress bar. Returns all records."""
    from msd.train.capture import capture as write_answers

    console = Console(file=sys.stderr)
    with Progress(console=console, disable=not console.is_terminal) as progress:
        for prompt in progress.track(todo, description="checking"):
            with named(work.places[prompt.key]):
                writer.check(prompt)
        bar = progress.add_task("capturing", total=None)
        with _kept(work.out):
            return write_answers(
                work.prompts, writer, work.out, batch,
                lambda done, n: progress.update(bar, completed=done, total=n), metadata,
            )  # fmt: skip


@contextmanager
def _kept(out: Path) -> Iterator[None]:
    """Reports an interruption inside as one that loses nothing."""
    try:
        yield
    except KeyboardInterrupt as stop:
        raise InterruptedRunError(f"interrupted; {KEPT.format(out)}") from stop


def _from_server(served: Served, work: Work) -> dict[str, Any]:
    """Lets the server answer, with a progress bar. Returns the summary."""
    from msd.train.capture import keep, pending
    from msd.train.server_writer import ServerWriter

    begin = time.perf_counter()
    prompts, out = served.chosen(work.prompts, work.out)
    server = served.open()
    model = server.model(served.served_model)
    writer = ServerWriter(
        server, model, work.folder, work.max_new_tokens, served.concurrency, work.places, work.decoding
    )
    metadata, console = {"served_model": model, **work.decoding.metadata}, Console(file=sys.stderr)
    todo = pending(prompts, out, metadata)
    with Progress(console=console, disable=not console.is_terminal) as progress:
        bar = progress.add_task("capturing", total=None)
        with _kept(out):
            try:
                records = keep(
                    prompts, writer, out, lambda done, n: progress.update(bar, completed=done, total=n), metadata
                )
            except UserError as error:
                raise UserError(f"{error}; {KEPT.format(out)}") from error
    return {
        "out": str(out), "records": len(records), "written": len(todo), "model": model,
        "with_ids": sum(bool(r["ids"]) for r in records), "seconds": round(time.perf_counter() - begin, 3),
    }  # fmt: skip


def _text(summary: dict[str, object]) -> str:
    """Formats the summary as text."""
    thresholds = summary["cuts"]
    text = f"{summary['out']}: {summary['records']} answers, {summary['tokens']} tokens, {summary['written']} new"
    if summary.get("greedy") is not None:
        text += f"; {summary['greedy']:.2%} of the tokens are the target's greedy ones"
    if not isinstance(thresholds, dict):
        return f"{text}; no label thresholds (they are fitted on all train lines with images, without --limit)"
    limits = f"language ≤ {thresholds['language_max']:.4f}, vision ≥ {thresholds['vision_min']:.4f} nats"
    if thresholds["events"] is not None:
        limits += f"; events: language ≤ {thresholds['events']['least']:.4f} nats"
    return f"{text}\n{thresholds['path']}: {limits}, fitted on {thresholds['tokens']} tokens"
