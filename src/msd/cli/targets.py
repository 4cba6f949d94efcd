"""`msd targets`: the architectures that a target may have, and what is tested of each."""

from __future__ import annotations

import json

from rich.console import Console

from msd.cli.options import Json, quiet
from msd.cli.terminal import table

# by tests/targets, for every family, on tiny random models in float32
TESTED = (
    "greedy and same-seed tokens identical with generate(): one, two, no image; video, or its frames; batch of 3",
    "scores of trees, and of answers in training, those of each path alone (1e-4)",
    "other pictures or sounds, other answers; video and sound files by the front door",
    "turns of a chat: only new rows computed, answers those of fresh requests",
    "a drafter trained, saved, loaded and used",
)


def targets(as_json: Json = False) -> None:
    """List the supported architectures, what their prompts take, and what is tested."""
    quiet()
    from msd.targets import families

    found = families()
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
            for name, family in found.items()
        ]
        print(json.dumps({"targets": rows}))
        return
    shown = table("architecture", "models", "takes", "processor\nneeds", "note", wrapped=("note",))
    for name, family in found.items():
        shown.add_row(name, family.models, ", ".join(family.modalities), ", ".join(family.packages), family.note)
    console = Console()
    console.print(shown)
    console.print("Tested for each, on tiny random models:")
    for check in TESTED:
        console.print(f"  - {check}", soft_wrap=True)
    console.print("How to add one: docs/targets.md")
