"""The options of commands that let an OpenAI-compatible server answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from msd.system.server import Server


@dataclass(frozen=True)
class Connection:
    """A server that answers instead of the target; none by default."""

    server: Annotated[
        str | None,
        typer.Option("--server", help="URL of an OpenAI-compatible server that answers instead of the target."),
    ] = None
    served_model: Annotated[
        str | None, typer.Option("--served-model", help="Name of the model there; by default the only one.")
    ] = None
    patience: Annotated[
        float, typer.Option("--patience", min=0.0, help="Seconds for which a failed request is repeated.")
    ] = 60.0
    api_key: Annotated[
        str | None, typer.Option("--api-key", envvar="OPENAI_API_KEY", help="Key of the server.", show_envvar=True)
    ] = None

    def open(self) -> Server:
        """Returns the server, which must be named."""
        from msd.system.server import Server

        assert self.server is not None
        return Server(self.server, self.api_key, self.patience)
