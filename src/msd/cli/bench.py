"""`msd bench`: methods side by side, in one run."""

from __future__ import annotations

import json
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from msd.cli import terminal
from msd.cli.options import (
    DrafterFolder,
    Json,
    Lines,
    MaxNewTokens,
    Methods,
    Model,
    Policy,
    chosen_methods,
    grouped,
    quiet,
    use_drafter,
)
from msd.errors import InterruptedRunError, UserError
from msd.system.files import check_place, exclusive, make_folder

if TYPE_CHECKING:
    from msd.bench.measure import Bench


@dataclass(frozen=True)
class Measured:
    """What is measured beside the methods, and how."""

    suite: Annotated[
        str, typer.Option("--suite", help="Only these tasks of the data, separated by commas; all by default.")
    ] = ""
    label_thresholds: Annotated[
        Path | None,
        typer.Option("--cuts", help="Label thresholds of the target, from 'msd capture'; the reference model's own."),
    ] = None
    baselines: Annotated[
        str,
        typer.Option(
            "--baselines",
            help="transformers' own ways to decode, separated by commas; all by default. Plain always runs.",
        ),
    ] = ""
    batch: Annotated[int, typer.Option("--batch", min=1, help="Prompts of a task that are answered together.")] = 1
    warm: Annotated[
        bool, typer.Option("--warm", help="Also time every answer again with its photos encoded already.")
    ] = False
    temperature: Annotated[float, typer.Option("--temperature", min=0.0, help="0 is greedy decoding.")] = 0.0


@grouped
def bench(
    model: Model,
    lines: Lines,
    measured: Measured,
    policy: Policy,
    method: Methods = "all",
    drafter: DrafterFolder = None,
    max_new_tokens: MaxNewTokens = 96,
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder for results.json, report.md and report.html.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Time methods, plain decoding and transformers' generate() on the same prompts, interleaved."""
    from msd.bench.data import in_suites, load_data

    if out is not None:
        check_place(out, folder=True)
    checked = policy.checked()
    use_drafter(drafter)
    methods = chosen_methods(method, model.target, greedy=measured.temperature == 0)
    tasks = [name.strip() for name in measured.suite.split(",") if name.strip()]
    samples = in_suites(load_data(lines.data, lines.images), tasks)[: lines.limit]
    if measured.label_thresholds is not None and measured.temperature > 0:
        raise UserError("--cuts labels greedy answers; leave --temperature at 0")
    quiet()
    from msd.bench import conversation, measure, modality
    from msd.config import SpeculativeConfig
    from msd.drafters.toolkit import checkpoint
    from msd.loading import load_target
    from msd.targets.registry import fingerprint

    conversation.check_files(samples)
    ways = _ways(measured.baselines, list(measure.LIBRARY))
    known = modality.find_label_thresholds(model.target, measured.label_thresholds)
    loaded, processor = load_target(model.target, model.device)
    if known is not None:
        known.check_target(fingerprint(loaded))
    asked = measure.Asked(
        tuple(methods), max_new_tokens, measured.temperature, known,
        SpeculativeConfig(**checked, backend=model.backend), measured.warm, measured.batch, ways,
        {"drafter": None if drafter is None else checkpoint.digest(drafter)},
    )  # fmt: skip
    if out is not None:
        make_folder(out)
    _run(measure.Bench(loaded, processor, samples, asked, out), out, as_json)


def _run(work: Bench, out: Path | None, as_json: bool) -> None:
    """Measures, then writes and prints; what a broken-off run has measured is kept."""
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
            work.kept.remove()
    print(json.dumps(results) if as_json else report.markdown(results))


def _keep(work: Bench, out: Path | None, as_json: bool, error: BaseException) -> None:
    """Writes or prints what a broken-off run has measured, and says how to go on."""
    from msd.bench import report

    results = work.results()
    if results is not None and out is not None:
        with suppress(UserError):  # such as a full disk, which broke it off: the parts are kept
            report.write(results, out)
    elif results is not None:
        print(json.dumps(results) if as_json else report.markdown(results))
    if out is None:
        told = f"{work.done} are measured; with --out a broken-off run is kept, and can be gone on with"
    else:
        told = f"{work.done} are measured and kept in '{out}', and the same command goes on from there"
    if isinstance(error, KeyboardInterrupt):
        raise InterruptedRunError(f"interrupted; {told}") from error
    if isinstance(error, UserError):
        raise UserError(f"{error}; {told}") from error
    error.add_note(told)


def _ways(names: str, known: list[str]) -> list[str]:
    """Ways of the library to measure, plain `generate()` first; UserError for an unknown one."""
    chosen = [name.strip() for name in names.split(",") if name.strip()]
    for name in chosen:
        if name not in known:
            raise UserError(f"--baselines '{name}' is no way of transformers; known: {', '.join(known)}")
    return list(dict.fromkeys([known[0], *chosen])) if chosen else known
