"""The drafter's own prompt: the target's words in its own vocabulary, and event tokens where pictures stood."""

from __future__ import annotations

import torch
from torch import Tensor

from msd.drafters.eventgpt.network import EventGPT
from msd.drafters.eventgpt.vocabulary import VocabularyMap
from msd.drafters.msd.context import pick
from msd.errors import UserError
from msd.layout import Layout
from msd.modality import LANGUAGE

NOWHERE = torch.iinfo(torch.long).max


def inputs(
    network: EventGPT, words: VocabularyMap, layout: Layout, columns: int, beside: Tensor | None
) -> tuple[Tensor, list[int]]:
    """(inputs [B, S, H] of the first `columns` of a layout, left-aligned; how many are real in each row).

    Columns of pictures are left out. A row's event tokens (`beside` [B, E, H], all zero in rows without any) stand
    where its first picture stood, or after the first token of a row without one. UserError for another number of them.
    """
    E, H = network.config.tokens, network.config.hidden
    column = torch.arange(columns, device=layout.tokens.device)
    start = torch.tensor(layout.start, device=column.device)
    real = column >= start[:, None]
    shown = real & (layout.modality[:, :columns] != LANGUAGE.id)
    kept, place = real & ~shown, (2 * column).expand_as(real)
    entries = network.embed(words.read(layout.tokens[:, :columns]))
    if beside is not None:
        if beside.shape[1:] != (E, H):
            raise UserError(
                f"the drafter takes {E} event tokens of {H} numbers a recording, not {list(beside.shape[1:])}; make "
                "them with its `beside`"
            )
        first = torch.where(shown.any(1), shown.long().argmax(1), start + 1)[:, None]
        given = beside.flatten(1).any(1, keepdim=True)
        kept = torch.cat([given.expand(-1, E), kept], 1)
        place = torch.cat([(2 * first - 1).expand(-1, E), place], 1)  # between two columns
        entries = torch.cat([beside.to(entries), entries], 1)
    count = kept.sum(1).clamp_min(1)
    order = place.masked_fill(~kept, NOWHERE).argsort(dim=1, stable=True)[:, : int(count.max())]
    return pick(entries, order), count.tolist()
