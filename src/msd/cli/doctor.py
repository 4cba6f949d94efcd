"""`msd doctor`: what is installed, how passes run on this machine, what is missing, and the commands that mend it."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Annotated, Any

import typer

from msd.cli import terminal
from msd.cli.options import Json, quiet
from msd.errors import UserError


def doctor(
    target: Annotated[str, typer.Option("--target", help="The target whose backend is named.")] = "reference",
    quick: Annotated[bool, typer.Option("--quick", help="Load no model; the backend is not named then.")] = False,
    as_json: Json = False,
) -> None:
    """Say what is installed, what is missing and how to mend it; exit code 1 if msd cannot run without it."""
    try:
        from msd import doctor as checks
    except ImportError as error:
        raise UserError(f"{error}; run: pip install packaging") from error
    if not quick:
        with suppress(ImportError):  # transformers is missing, which the report says
            quiet()
    with terminal.status("examining this machine and loading the model…"):
        report = checks.examine(target, load=not quick)
    print(json.dumps(report) if as_json else _text(report))
    if checks.is_broken(report):
        raise typer.Exit(1)


def _text(report: dict[str, Any]) -> str:
    """The report for a reader."""
    program, machine, backend = report["msd"], report["machine"], report["backend"]
    gpus = ", ".join(machine["gpus"]) or "none that torch can use"
    busy = "unknown" if machine["busy_cores"] is None else f"{machine['busy_cores']:.1f} cores"
    versions = ", ".join(f"{row['name']} {row['version'] or 'MISSING'}" for row in report["packages"])
    rows = [
        ("msd", f"{program['version']} in {program['folder']}"),
        ("python", f"{program['python']} ({program['executable']}), {program['system']}"),
        ("packages", versions),
        *((f"[{name}]", _extra(part)) for name, part in report["extras"].items()),
        ("processor", f"{machine['processor']}, {machine['usable_cores']} of {machine['cores']} cores usable"),
        ("threads", f"{machine['threads']} (torch); other processes keep {busy} busy"),
        ("GPU", gpus),
        ("reference", _reference(report["reference"])),
        ("video", _reference(report["reference"].get("video", {"state": "not examined"}))),
        ("backend", f"{backend['name'] or '–'} for '{backend['target']}': {backend['reason']}"),
        ("drafters", ", ".join(report["drafters"]) or "none"),
        *(("cache", _cache(cache)) for cache in report["caches"]),
    ]
    lines = [f"{name:<12} {text}" for name, text in rows]
    missing = [f"- {row['what']}\n    {row['command']}" for row in report["missing"]]
    return "\n".join([*lines, "", *(["To mend:", *missing] if missing else ["Nothing is missing."])])


def _extra(part: dict[str, Any]) -> str:
    """One extra: installed, or what it lacks."""
    lacking = [row["name"] for row in part["packages"] if row["state"] != "ok"]
    return f"installed ({part['for']})" if not lacking else f"lacks {', '.join(lacking)} ({part['for']})"


def _reference(found: dict[str, Any]) -> str:
    """One reference model: its state, and its folder where it is complete."""
    return f"{found['state']}: {found['folder']}" if found["state"] == "complete" else str(found["state"])


def _cache(cache: dict[str, Any]) -> str:
    """One cache folder with its size."""
    offline = " (HF_HUB_OFFLINE is set: nothing is downloaded)" if cache.get("offline") else ""
    return f"{cache['path']}: {cache['bytes'] / 1e6:.0f} MB{offline}"
