"""`msd reference`: the embedded model on this computer: assemble it, check it, say where it is."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from msd.cli import terminal

app = typer.Typer(help="The embedded reference model: assemble it, check it, find it.")

Cache = Annotated[
    Path | None, typer.Option("--cache", help="Folder to keep the model in, instead of the user's cache.")
]
Video = Annotated[bool, typer.Option("--video", help="Of 'reference-video', the target for clips, instead.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]


@app.command()
def install(
    force: Annotated[bool, typer.Option("--force", help="Assemble anew, even if the model is there.")] = False,
    cache: Cache = None,
    video: Video = False,
    as_json: Json = False,
) -> None:
    """Assemble the reference model if needed, and compare every byte with its checksum."""
    from msd import reference

    started = time.perf_counter()
    place = _with_spinner(lambda: reference.install(cache, force, video))
    size = sum(file.stat().st_size for file in place.iterdir())
    if as_json:
        print(json.dumps({"path": str(place), "bytes": size, "seconds": round(time.perf_counter() - started, 3)}))
    else:
        print(f"{place}: complete, {size / 1e6:.0f} MB")


@app.command()
def path(cache: Cache = None, video: Video = False, as_json: Json = False) -> None:
    """Print the folder of the reference model, assembling it first if needed."""
    from msd import reference

    place = _with_spinner(lambda: reference.path(cache, video))
    print(json.dumps({"path": str(place)}) if as_json else place)


def _with_spinner(work: Callable[[], Path]) -> Path:
    """Run `work` under a spinner on stderr; without a terminal nothing is shown."""
    with terminal.status("Preparing the reference model (half a minute the first time)…"):
        return work()
