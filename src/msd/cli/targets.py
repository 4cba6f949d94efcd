"""`msd targets`: lists the supported architectures, and what is tested for each."""

from __future__ import annotations

import json

from rich.console import Console

from msd.cli.options import Json, quiet
from msd.cli.terminal import table

# by tests/targets, for every family, on tiny random models in float32
TESTED = (
    "greedy and same-seed tokens equal those of generate(): one, two, no image; video or its frames; batch of 3",
    "scores of a tree, and of training answers, equal those of each path alone (within 1e-4)",
    "other images or sounds change the answer; video and sound files work in `generate`",
    "turns of a chat: only new tokens are computed, answers equal those of fresh requests",
    "a drafter is trained, saved, loaded and used",
)


def targets(as_json: Json = False) -> None:
    """List the supported architectures, their kinds of input, and what is tested."""
    quiet()
    from msd.targets import families

    supported = families()
    if as_json:
        rows = [
            {
                "architecture": name,
                "models": family.models,
                "takes": list(family.modalities),
                "adapter": family.adapter.__name__,
                "remembers": bool(family.pictures),
                "processor_needs": list(family.packages),
                "note": family.note,
                "tested": list(TESTED),
            }
            for name, family in supported.items()
        ]
        print(json.dumps({"targets": rows}))
        return
    shown = table("architecture", "models", "takes", "needs", "note", wrapped=("takes",))
    notes = list(dict.fromkeys(family.note for family in supported.values() if family.note))
    for name, family in supported.items():
        note = str(notes.index(family.note) + 1) if family.note else ""
        shown.add_row(name, family.models, ", ".join(family.modalities), ", ".join(family.packages), note)
    console = Console()
    console.print(shown)
    console.print("needs: packages of its processor. Notes:")
    for number, note in enumerate(notes, 1):
        console.print(f"  {number}  {note}", soft_wrap=True)
    console.print("Tested for each, on tiny random models:")
    for check in TESTED:
        console.print(f"  - {check}", soft_wrap=True)
    console.print("How to add one: docs/targets.md")
