"""`msd push`: uploads a draft head with a model card to the hub."""

from __future__ import annotations

from typing import Annotated

import typer

from msd.cli.options import quiet


def push(
    head: Annotated[str, typer.Argument(metavar="HEAD", help="Folder of a head, ours or exported.")],
    repo: Annotated[str, typer.Argument(metavar="USER/NAME", help="Its hub id; created if it is not there.")],
    target: Annotated[
        str | None, typer.Option("--target", help="The model that it drafts for, a hub id, for the model card.")
    ] = None,
    private: Annotated[bool | None, typer.Option("--private/--public", help="Of a new repository.")] = None,
) -> None:
    """Upload a draft head; the card has its measured acceptance. The token is that of 'hf auth login'."""
    quiet()
    from msd import formats

    print(formats.push_to_hub(head, repo, target, private))
