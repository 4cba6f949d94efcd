"""`msd verify`: certifies that the output of a method is that of the target alone."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console

from msd.cli import options, terminal
from msd.errors import InterruptedRunError, UserError

ANSWER, DRAWS = 32, 100_000  # defaults of --max-new-tokens and --draws


@options.grouped
def verify(
    model: options.Model,
    lines: options.DataLines,
    compared: options.Compared,
    max_new_tokens: options.MaxNewTokens = ANSWER,
    draws: Annotated[int, typer.Option("--draws", min=1000, help="Draws per χ² cell of sampled candidates.")] = DRAWS,
    outputs: Annotated[
        Path | None,
        typer.Option("--outputs", help="Audit another engine's answers: data lines with 'tokens' or 'text'."),
    ] = None,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"],
        typer.Option("--dtype", help="Precision of the target; in half precision answers are not always identical."),
    ] = "float32",
    as_json: options.Json = False,
) -> None:
    """Compare with transformers' generate(): greedy and same-seed tokens, and χ² where candidates are sampled."""
    import torch

    from msd.bench.data import load_data, load_outputs

    if outputs:
        _check_audit(model, compared, max_new_tokens != ANSWER, draws != DRAWS, dtype)
    kind = getattr(torch, dtype)
    methods = [] if outputs else compared.names(model, dtype=kind)
    samples = load_outputs(outputs, lines.images) if outputs else load_data(lines.data, lines.images)
    samples = samples[: lines.limit]
    options.quiet()
    from msd.bench import conversation
    from msd.certify import certificate
    from msd.loading import load_target

    conversation.check_files(samples)
    target, processor = load_target(model.target, model.device, dtype=kind)
    rows: list[certificate.Row] = []
    try:
        with terminal.status("verifying…") as status:
            if outputs:
                certificate.audit(target, processor, samples, status.update, rows)
            else:
                line = partial(status.console.print, highlight=False, markup=False, soft_wrap=True)
                certificate.certify(
                    target, processor, samples, methods, max_new_tokens, draws, status.update, model.backend, rows, line
                )
    except BaseException as error:
        if any(row.compared for row in rows):
            _show(rows, as_json, dtype)
        if isinstance(error, KeyboardInterrupt):
            raise InterruptedRunError(
                f"interrupted after {max((row.compared for row in rows), default=0)} comparisons; nothing has passed "
                "that was not compared to its end: run it again, perhaps with a lower --limit"
            ) from error
        raise
    _show(rows, as_json, dtype)
    failed = [row.method for row in rows if not row.passed]
    if failed:
        raise UserError(f"not lossless: {', '.join(failed)}; the first differences are in the rows above")


def _check_audit(model: options.Model, compared: options.Compared, length: bool, draws: bool, dtype: str) -> None:
    """Raises UserError for an option that has no effect on an audit. length, draws: whether these were given."""
    others = {"max-new-tokens": length, "draws": draws, "dtype": dtype != "float32"}
    name = options.changed(options.Model(backend=model.backend), compared)
    name = name or next((name for name, given in others.items() if given), None)
    if name is not None:
        raise UserError(f"--outputs audits answers that exist, in float32; leave out --{name}")


def _show(rows: list[Any], as_json: bool, dtype: str = "float32") -> None:
    """Prints the certificate as a table or as JSON."""
    yardstick = rows[0].yardstick if rows else None
    if as_json:
        report: dict[str, Any] = {"rows": [row.as_dict() for row in rows], "dtype": dtype}
        if yardstick is not None:
            report["yardstick"] = {k: v for k, v in yardstick.as_dict().items() if k != "passed"}
        print(json.dumps(report))
        return
    Console().print(_table(rows, yardstick))
    for row in rows:
        for difference in row.differences:
            print(f"{row.method}: {difference}")
    if yardstick is not None:
        print(
            f"in {dtype}, rounding changes some answers; yardstick: generate() with each prompt in a batch of two; "
            "a method passes if its answers do not differ more often, but for ties"
        )


def _table(rows: list[Any], yardstick: Any) -> Any:
    """One line per method; in half precision the yardstick comes first."""
    half = yardstick is not None
    columns = ("agreeing\ntokens", "largest gap\n(roundings)") if half else ("largest\ntie gap", "smallest\np")
    shown = terminal.table("method", "compared", "identical", "ties", *columns, "passed")
    for row in [yardstick, *rows] if half else rows:
        if half:
            cells = f"{row.agreeing_share:.0%}", f"{max(row.relative_gaps, default=0.0):.1f}"
        else:
            gap = f"{max(row.tie_gaps):.1e}" if row.tie_gaps else "-"
            cells = gap, f"{min(row.p_values):.3f}" if row.p_values else "-"
        counts = (str(row.compared), str(row.identical), str(len(row.tie_gaps)))
        passed = "yes" if row.passed else "NO" if row.finished or row.differences else "not yet"
        shown.add_row(row.method, *counts, *cells, "-" if row is yardstick else passed)
    return shown
