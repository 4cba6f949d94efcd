"""`msd export`: writes a trained drafter in the format of another project."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from msd.cli.options import quiet
from msd.system.files import check_place


def export(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write.")],
    to: Annotated[str, typer.Option("--to", help="Layout: eagle (EAGLE-3), eagle2, speculators, sglang or dflash.")],
    drafter: Annotated[
        Path | None, typer.Option("--drafter", help="Folder of a head, or a hub id; by default the shipped drafter.")
    ] = None,
) -> None:
    """Write a drafter for other engines. Refused where the layout cannot express its network."""
    check_place(out, folder=True)
    quiet()
    from msd import formats
    from msd.drafters import registry

    head = drafter or registry.folders().get(registry.DEFAULT) or Path(registry.DEFAULT)
    print(f"{out}: format {formats.export(head, to, out)}")
