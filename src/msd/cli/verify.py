"""`msd verify`: a certificate that a method's output is the target's own."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from msd.cli import terminal
from msd.cli.options import (
    DataLines,
    DrafterFolder,
    Json,
    MaxNewTokens,
    Methods,
    Model,
    grouped,
    method_names,
    quiet,
    use_drafter,
)
from msd.cli.terminal import table
from msd.errors import InterruptedRunError, UserError


@grouped
def verify(
    model: Model,
    lines: DataLines,
    method: Methods = "all",
    drafter: DrafterFolder = None,
    max_new_tokens: MaxNewTokens = 32,
    draws: Annotated[int, typer.Option("--draws", min=1000, help="Draws per χ² cell of sampled candidates.")] = 100_000,
    outputs: Annotated[
        Path | None,
        typer.Option("--outputs", help="Audit another engine's answers: data lines with 'tokens' or 'text'."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Compare with transformers' generate(): greedy and same-seed tokens, and χ² where candidates are sampled."""
    from msd.bench.data import load_data, load_outputs

    use_drafter(drafter)
    methods = method_names(method, model.target)
    samples = load_outputs(outputs, lines.images) if outputs else load_data(lines.data, lines.images)
    samples = samples[: lines.limit]
    quiet()
    from msd.bench import conversation
    from msd.certify import certificate
    from msd.loading import load_target

    conversation.check_files(samples)
    loaded, processor = load_target(model.target, model.device)
    rows: list[certificate.Row] = []
    try:
        with terminal.status("verifying…") as status:
            if outputs:
                certificate.audit(loaded, processor, samples, status.update, rows)
            else:
                told = partial(status.console.print, highlight=False, markup=False, soft_wrap=True)
                certificate.certify(
                    loaded,
                    processor,
                    samples,
                    methods,
                    max_new_tokens,
                    draws,
                    status.update,
                    model.backend,
                    rows,
                    told,
                )
    except BaseException as error:
        if any(row.compared for row in rows):
            _show(rows, as_json)
        if isinstance(error, KeyboardInterrupt):
            raise InterruptedRunError(
                f"interrupted after {max((row.compared for row in rows), default=0)} comparisons; nothing has passed "
                "that was not compared to its end: run it again, perhaps with a lower --limit"
            ) from error
        raise
    _show(rows, as_json)
    failed = [row.method for row in rows if not row.passed]
    if failed:
        raise UserError(f"not lossless: {', '.join(failed)}; the first differences are in the rows above")


def _show(rows: list[Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps({"rows": [row.as_dict() for row in rows]}))
        return
    shown = table("method", "compared", "identical", "ties", "largest\ntie gap", "smallest\np", "passed")
    for row in rows:
        gap = f"{max(row.tie_gaps):.1e}" if row.tie_gaps else "-"
        p = f"{min(row.p_values):.3f}" if row.p_values else "-"
        counts = (str(row.compared), str(row.identical), str(len(row.tie_gaps)))
        shown.add_row(row.method, *counts, gap, p, _passed(row))
    Console().print(shown)
    for row in rows:
        for difference in row.differences:
            print(f"{row.method}: {difference}")


def _passed(row: Any) -> str:
    return "yes" if row.passed else "NO" if row.finished or row.differences else "not yet"
