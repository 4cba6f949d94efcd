"""An EventGPT drafter on disk (see `msd.drafters.stored`), with its piece table and perhaps a vocabulary map."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from msd.drafters import stored
from msd.drafters.eventgpt import vocabulary
from msd.drafters.eventgpt.config import EventGPTConfig
from msd.drafters.eventgpt.network import EventGPT
from msd.drafters.eventgpt.vocabulary import Pieces, VocabularyMap
from msd.errors import UserError
from msd.files import write_whole

PIECES = "pieces.json"


def save(
    network: EventGPT,
    pieces: Pieces,
    folder: Path,
    words: VocabularyMap | None = None,
    training: dict[str, Any] | None = None,
) -> None:
    """Writes the drafter. words: a map that ties it to one target; without one it takes any that shares pieces."""
    stored.save(network, network.config, folder, training)
    write_whole(folder / PIECES, pieces.as_json() + "\n")
    if words is not None:
        words.save(folder / vocabulary.FILE)


def load(folder: Path | str, dtype: torch.dtype = torch.float32) -> tuple[EventGPT, Pieces, VocabularyMap | None]:
    """What `EventGPTDrafter` is made of, on the CPU. UserError says what is wrong with the folder."""
    folder = Path(folder)
    network = stored.load(folder, lambda text: EventGPT(EventGPTConfig.from_json(text)), dtype)
    try:
        pieces = Pieces.from_json((folder / PIECES).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, UserError) as error:
        raise UserError(f"drafter '{folder}': its piece table {PIECES} cannot be read ({error})") from error
    saved = folder / vocabulary.FILE
    return network, pieces, VocabularyMap.load(saved) if saved.exists() else None
