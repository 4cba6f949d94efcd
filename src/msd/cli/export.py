"""`msd export`: writes a trained drafter in the format of another project."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from msd.cli.options import quiet
from msd.system.files import check_place


def export(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write.")],
    to: Annotated[
        str,
        typer.Option(
            "--to", help="For an engine (vllm, sglang), or in a layout (speculators, specforge, eagle, eagle2, dflash)."
        ),
    ],
    drafter: Annotated[
        Path | None, typer.Option("--drafter", help="Folder of a head, or a hub id; for an engine by default 'eagle3'.")
    ] = None,
) -> None:
    """Write a drafter for other engines. Refused where the layout cannot express its network."""
    check_place(out, folder=True)
    quiet()
    from msd import formats
    from msd.drafters import registry

    name = "eagle3" if to in formats.ENGINES else registry.DEFAULT
    head = drafter or registry.folders().get(name) or Path(name)
    print(f"{out}: format {formats.export(head, to, out)}")
    for remark in formats.check(out, to).remarks if to in formats.ENGINES else ():
        print(f"  {remark}")
