"""Who sees whom: attention masks of trees and of whole rows, for every kind of decoder layer.

A mask starts as two tables: `seen`, whether a query may see a key, and `back`, how many columns before the query the
key stands. Full layers use the first; sliding layers also forget keys that are a window or more back. Distances are
counted in text columns, so a tree node stands as far behind the prefix as it is deep, wherever its cache slot is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from msd.core.tree import DraftTree
from msd.errors import UserError

FULL, SLIDING = "full_attention", "sliding_attention"
Windows = dict[str | None, int | None]
Mask = Tensor | dict[str | None, Tensor]


def windows(text_config: Any) -> Windows:
    """The kinds of attention layers of a text model, with the columns each sees (None: all).

    The only kind is None where the model takes one mask for all layers. UserError for a kind unknown here.
    """
    kinds = set(getattr(text_config, "layer_types", None) or ())
    window = getattr(text_config, "sliding_window", None)
    unknown = sorted(kinds - {FULL, SLIDING})
    if unknown:
        raise UserError(
            f"the text model '{text_config.model_type}' has layers of kind '{unknown[0]}', which no adapter masks yet; "
            f"supported: {FULL}, {SLIDING}"
        )
    if SLIDING in kinds:
        return {kind: window if kind == SLIDING else None for kind in sorted(kinds)}
    return {None: None if kinds else window}


def tree_view(tree: DraftTree, start: list[int], committed: list[int]) -> tuple[Tensor, Tensor]:
    """(seen [B, N, S] bool, back [B, N, S]) of trees over the S slots in use: the prefix of a row and ancestors."""
    device = tree.tokens.device
    slots = torch.arange(max(committed) + tree.size, device=device)  # [S]
    first = torch.tensor(start, device=device)[:, None]
    base = torch.tensor(committed, device=device)[:, None]
    prefix = (slots >= first) & (slots < base)  # [B, S]
    index = (slots - base).clamp(0, tree.size - 1)  # node written at each slot, [B, S]
    inside = (slots >= base) & (slots < base + tree.size)
    above = tree.ancestors().gather(2, index[:, None].expand(-1, tree.size, -1))  # [B, N, S]
    column = torch.where(inside, base + tree.depths.gather(1, index), slots)
    back = (base + tree.depths)[:, :, None] - column[:, None]
    return prefix[:, None] | (above & inside[:, None]), back


def row_view(start: list[int], columns: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(seen [B, S, S] bool, back [1, S, S]) of whole left-padded rows: causal, padding unseen."""
    column = torch.arange(columns, device=device)
    first = torch.tensor(start, device=device)[:, None, None]
    back = column[:, None] - column[None, :]
    return (back >= 0) & (column >= first), back[None]


def masks(seen: Tensor, back: Tensor, kinds: Windows, dtype: torch.dtype) -> Mask:
    """Additive float masks [B, 1, N, S] of those tables, by kind of layer; one alone where that is how it is taken.

    Additive, because a boolean mask is silently wrong under `eager` attention.
    """
    found = {
        kind: additive(seen if window is None else seen & (back < window), dtype) for kind, window in kinds.items()
    }
    return found.get(None, found)


def additive(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where seen, the type's least value elsewhere: [B, N, S] -> [B, 1, N, S]."""
    mask = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
    return mask.masked_fill_(~seen, torch.finfo(dtype).min)[:, None]
