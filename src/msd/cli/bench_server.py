"""`msd bench --server`: the speed of an OpenAI-compatible server on the same prompts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from msd.cli import terminal
from msd.cli.connection import Connection
from msd.cli.options import changed
from msd.errors import UserError
from msd.system.files import exclusive, make_folder, write_whole

if TYPE_CHECKING:
    from msd.bench.data import Sample

FIGURES = {
    "task": "task", "samples": "samples", "tokens_per_second": "tokens\n/s", "first_token_s": "first\ntoken (s)",
    "mean_acceptance_length": "τ", "draft_acceptance_rate": "accepted\ndrafts",
}  # fmt: skip


def wanted(connection: Connection, *groups: Any) -> bool:
    """Whether a server is to be measured. UserError for options that have no effect, in `groups` or the connection."""
    if connection.server is None:
        if replace(connection, api_key=None) != Connection():
            raise UserError("--served-model and --patience are for --server; leave them out")
        return False
    name = changed(*groups)
    if name is not None:
        raise UserError(f"'{name}' is no option of --server, which answers by itself")
    return True


def measure(
    connection: Connection, samples: Sequence[Sample], limit: int, temperature: float, out: Path | None, as_json: bool
) -> None:
    """Measures the server; with `out`, answers are kept as they come, and the results are written there."""
    from msd.bench import conversation
    from msd.bench.served import ServedBench

    conversation.check_files(samples)
    server = connection.open()
    model = server.model(connection.served_model)
    if out is not None:
        make_folder(out)
    with exclusive(out) if out else nullcontext(), terminal.status("measuring…") as status:
        work = ServedBench(server, model, samples, limit, temperature, out)
        try:
            work.measure(status.update)
        except UserError as error:
            kept = f"kept in '{out}'; the same command resumes" if out else "lost; with --out they are kept"
            raise UserError(f"{error}; {len(work.answers)} answers are {kept}") from error
        results: dict[str, Any] = {
            "rows": work.rows(), "server": connection.server, "max_new_tokens": limit, "temperature": temperature
        }  # fmt: skip
        if out is not None:
            _write(work, results, out)
    if as_json:
        print(json.dumps(results))
    else:
        _show(results["rows"], out, temperature)


def _write(work: Any, results: dict[str, Any], out: Path) -> None:
    write_whole(out / "results.json", json.dumps(results, indent=1) + "\n")
    write_whole(out / "outputs.jsonl", "".join(json.dumps(line) + "\n" for line in work.outputs()))
    work.kept.remove()


def _show(rows: list[dict[str, Any]], out: Path | None, temperature: float) -> None:
    table = terminal.table(*FIGURES.values())
    for row in rows:
        cells = (row[name] for name in FIGURES)
        table.add_row(*("-" if c is None else f"{c:.2f}" if isinstance(c, float) else str(c) for c in cells))
    console = Console()
    console.print(rows[0]["method"], highlight=False, markup=False)
    console.print(table)
    if out is not None and temperature == 0:
        console.print(f"Audit: msd verify --outputs {out}/outputs.jsonl --target ID", markup=False, soft_wrap=True)
