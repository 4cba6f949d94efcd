"""`msd bench`: times methods against each other in one run."""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from msd.cli import bench_server, options, terminal
from msd.cli.connection import Connection
from msd.errors import InterruptedRunError, UserError
from msd.system.files import check_place, exclusive, make_folder

if TYPE_CHECKING:
    from msd.bench.data import Sample
    from msd.bench.measure import Bench

MAIN_FIGURES = {
    "method": "method",
    "speedup_vs_ar": "vs ar",
    "speedup_vs_ar_interval": "95%",
    "speedup_vs_ar_paired_median": "median",
    "speedup_vs_transformers": "vs trans-\nformers",
    "tokens_per_second": "tokens\n/s",
    "mean_acceptance_length": "τ",
}


@dataclass(frozen=True)
class Measurement:
    """What is measured besides the methods, and how."""

    suite: Annotated[
        str,
        typer.Option(
            "--suite",
            help="Only these tasks of the data, separated by commas; by default all. 'unseen' adds rendered pictures.",
        ),
    ] = ""
    label_thresholds: Annotated[
        Path | None,
        typer.Option("--cuts", help="Label thresholds of the target, from 'msd capture'; built in for 'reference'."),
    ] = None
    baselines: Annotated[
        str,
        typer.Option(
            "--baselines",
            help="Decoding methods of transformers, separated by commas; by default all. The plain one always runs.",
        ),
    ] = ""
    batch: Annotated[int, typer.Option("--batch", min=1, help="Prompts of a task that are answered together.")] = 1
    warm: Annotated[
        bool, typer.Option("--warm", help="Also time every answer a second time, with its images already encoded.")
    ] = False
    temperature: options.Temperature = 0.0


@options.grouped
def bench(
    model: options.Model,
    lines: options.DataLines,
    measurement: Measurement,
    policy: options.Policy,
    compared: options.Compared,
    connection: Connection,
    max_new_tokens: options.MaxNewTokens = 96,
    out: Annotated[Path | None, typer.Option("--out", help="Folder for results.json and the reports.")] = None,
    exported: Annotated[
        Path | None,
        typer.Option("--export", help="Only write the prompts to this file, in the form of MMSpec and Spec-Bench."),
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Time methods, plain decoding and transformers' generate() on the same prompts, interleaved."""
    from msd.bench import unseen
    from msd.bench.data import in_suites, load_data

    if out is not None:
        check_place(out, folder=True)
    tasks = [name.strip() for name in measurement.suite.split(",") if name.strip()]
    rendered, tasks = unseen.requested(tasks)
    samples = in_suites([*load_data(lines.data, lines.images), *rendered], tasks)[: lines.limit]
    if exported is not None:
        unused = options.changed(model, policy, compared, connection, replace(measurement, suite=""))
        return _export(samples, exported, lines.data, out, unused, as_json)
    others = model, policy, compared, replace(measurement, suite="", temperature=0.0)
    if bench_server.wanted(connection, *others):
        return bench_server.measure(connection, samples, max_new_tokens, measurement.temperature, out, as_json)
    verification = policy.checked()
    methods = compared.names(model, greedy=measurement.temperature == 0)
    if measurement.label_thresholds is not None and measurement.temperature > 0:
        raise UserError("--cuts labels greedy answers; leave --temperature at 0")
    options.quiet()
    from msd.bench import conversation, measure, modality
    from msd.config import SpeculativeConfig
    from msd.drafters.toolkit import checkpoint
    from msd.loading import load_target
    from msd.targets.registry import fingerprint

    conversation.check_files(samples)
    baselines = _baselines(measurement.baselines, list(measure.LIBRARY))
    label_thresholds = modality.find_label_thresholds(model.target, measurement.label_thresholds)
    loaded, processor = load_target(model.target, model.device)
    if label_thresholds is not None:
        label_thresholds.check_target(fingerprint(loaded))
    settings = measure.BenchSettings(
        tuple(methods), max_new_tokens, measurement.temperature, label_thresholds,
        SpeculativeConfig(**verification, backend=model.backend, frozen_weights=True), measurement.warm,
        measurement.batch, baselines,
        {
            "drafter": None if compared.drafter is None else checkpoint.digest(compared.drafter),
            "draft_model": compared.draft_model, "draft_sees": compared.draft_sees,
        },
    )  # fmt: skip
    if out is not None:
        make_folder(out)
    return _run(measure.Bench(loaded, processor, samples, settings, out), out, as_json)


def _export(
    samples: list[Sample], file: Path, data: Path | None, out: Path | None, unused: str | None, as_json: bool
) -> None:
    """Writes the prompts for tools of other projects. UserError with a folder for results, or an `unused` option."""
    from msd.bench import data_export

    if unused is not None:
        raise UserError(f"'{unused}' is no option of --export, which measures nothing")
    if out is not None:
        raise UserError("--export measures nothing; leave out --out")
    if data is not None and file.exists() and file.samefile(data):
        raise UserError(f"--export '{file}' is the data file itself; name another file")
    count = data_export.export(samples, file)
    print(json.dumps({"export": str(file), "lines": count}) if as_json else f"{file}: {count} lines")


def _run(work: Bench, out: Path | None, as_json: bool) -> None:
    """Measures, then writes and prints the results. An interrupted run keeps what it has measured."""
    from msd.bench import report

    with exclusive(out) if out else nullcontext(), terminal.status("measuring…") as status:
        try:
            work.measure(status.update)
        except BaseException as error:
            _keep(work, out, as_json, error)
            raise
        results = work.results()
        assert results is not None  # data has at least one line
        if out is not None:
            report.write(results, out)
            work.unfinished.remove()
    _print(results, out, as_json)


def _keep(work: Bench, out: Path | None, as_json: bool, error: BaseException) -> None:
    """Writes or prints the results of an interrupted run, and adds to the error how to resume it."""
    from msd.bench import report

    results = work.results()
    if results is not None and out is not None:
        with suppress(UserError):  # such as the full disk that caused the error; the parts are saved anyway
            report.write(results, out)
    elif results is not None:
        _print(results, out, as_json)
    if out is None:
        advice = f"{work.done} are measured; with --out an interrupted run is saved and can be resumed"
    else:
        advice = f"{work.done} are measured and kept in '{out}'; run the same command to resume"
    if isinstance(error, KeyboardInterrupt):
        raise InterruptedRunError(f"interrupted; {advice}") from error
    if isinstance(error, UserError):
        raise UserError(f"{error}; {advice}") from error
    error.add_note(advice)


def _print(results: dict[str, Any], out: Path | None, as_json: bool) -> None:
    """Prints JSON, a table that fits a terminal, or the Markdown report."""
    from msd.bench import report

    if as_json:
        print(json.dumps(results))
    elif sys.stdout.isatty():
        _show(results, out, Console())
    else:
        print(report.markdown(results))


def _show(results: dict[str, Any], out: Path | None, console: Console) -> None:
    """Prints the main figures over all tasks, at most 80 columns wide, and where the full report is."""
    from msd.bench import report

    rows = [row for row in results["rows"] if row["task"] == "all"]
    table = terminal.table(*MAIN_FIGURES.values())
    for row in rows:
        table.add_row(*(report.cell(row[key]) for key in MAIN_FIGURES))
    different = ", ".join(f"{r['method']} ({r['identical']:.0%})" for r in rows if r["identical"] not in (None, 1.0))
    compared = "not compared" if rows[0]["identical"] is None else f"all, except {different}" if different else "all"
    lines = (
        report.described(results["environment"]),
        f"{rows[0]['samples']} samples. Median: of the speedups per sample. τ: mean acceptance length.",
        f"Answers identical to generate(): {compared}.",
        f"Full report, by task: {f'{out}/report.md and report.html' if out else 'add --out FOLDER'}",
    )
    console.print(lines[0], highlight=False, markup=False)
    console.print(table)
    for line in lines[1:]:
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def _baselines(names: str, known: list[str]) -> list[str]:
    """Returns the library's methods to measure, plain `generate()` first. Raises UserError for an unknown one."""
    chosen = [name.strip() for name in names.split(",") if name.strip()]
    for name in chosen:
        if name not in known:
            raise UserError(f"--baselines '{name}' is unknown; choose from {', '.join(known)}")
    return list(dict.fromkeys([known[0], *chosen])) if chosen else known
