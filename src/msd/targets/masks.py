"""Attention masks of trees and of whole rows, for full, sliding-window and chunked decoder layers.

A mask is built from three tables: `visible`, whether a query may attend to a key, `distance`, how many text columns the
key is before the query, and `column`, the query's column, counted from the first one after the padding. Full layers use
the first; sliding layers also exclude keys at a distance of the window or more, and chunked layers those in an earlier
chunk of columns. A tree node of depth d is d columns after the prefix, whatever its cache slot is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from msd.core.tree import DraftTree
from msd.errors import UserError

FULL, SLIDING, CHUNKED = "full_attention", "sliding_attention", "chunked_attention"
Windows = dict[str | None, int | None]  # layer type -> columns of its window or chunk, None: it attends to all
Tables = tuple[Tensor, Tensor, Tensor]  # visible, distance, column
Mask = Tensor | Mapping[str | None, Tensor | None]


def attention_windows(text_config: Any) -> Windows:
    """The layer types of a text model with their windows.

    The only key is None where the model expects one mask for all layers. UserError for an unknown layer type.
    """
    kinds = set(getattr(text_config, "layer_types", None) or ())
    window = getattr(text_config, "sliding_window", None)
    sizes = {FULL: None, SLIDING: window, CHUNKED: getattr(text_config, "attention_chunk_size", None)}
    unknown = sorted(kinds - sizes.keys())
    if unknown:
        raise UserError(
            f"the text model '{text_config.model_type}' has layers of kind '{unknown[0]}', which no adapter masks yet; "
            f"supported: {', '.join(sizes)}"
        )
    if kinds - {FULL}:
        return {kind: sizes[kind] for kind in sorted(kinds)}
    return {None: None if kinds else window}


def tree_tables(tree: DraftTree, start: list[int], committed: list[int]) -> Tables:
    """(visible [B, N, S] bool, distance [B, N, S], column [B, N]) of trees over the S slots in use.

    A node attends to its row's prefix, the columns from `start` to `committed`, to its ancestors and to itself.
    """
    device = tree.tokens.device
    slots = torch.arange(max(committed) + tree.size, device=device)  # [S]
    first = torch.tensor(start, device=device)[:, None]
    base = torch.tensor(committed, device=device)[:, None]
    prefix = (slots >= first) & (slots < base)  # [B, S]
    node = (slots - base).clamp(0, tree.size - 1)  # the node in each slot, [B, S]
    in_tree = (slots >= base) & (slots < base + tree.size)
    ancestor = tree.ancestors().gather(2, node[:, None].expand(-1, tree.size, -1))  # [B, N, S]
    column = torch.where(in_tree, base + tree.depths.gather(1, node), slots)
    own = base + tree.depths
    return prefix[:, None] | (ancestor & in_tree[:, None]), own[:, :, None] - column[:, None], own - first


def without_first(tables: Tables, count: int) -> Tables:
    """The tables of all nodes but the first `count`."""
    visible, distance, column = tables
    return visible[:, count:], distance[:, count:], column[:, count:]


def row_tables(start: list[int], columns: int, device: torch.device) -> Tables:
    """(visible [B, S, S] bool, distance [1, S, S], column [B, S]) of whole left-padded rows.

    Causal, without padding columns.
    """
    column = torch.arange(columns, device=device)
    first = torch.tensor(start, device=device)[:, None, None]
    distance = column[:, None] - column[None, :]
    return (distance >= 0) & (column >= first), distance[None], column - first[:, :, 0]


def masks(tables: Tables, windows: Windows, dtype: torch.dtype) -> Tensor | dict[str | None, Tensor]:
    """Additive masks [B, 1, N, S], one per layer type, or a single tensor where the model expects one.

    Additive, because `eager` attention adds a boolean mask without an error.
    """
    found = {kind: additive(_within(tables, kind, size), dtype) for kind, size in windows.items()}
    return found.get(None, found)


def _within(tables: Tables, kind: str | None, size: int | None) -> Tensor:
    """[B, N, S] bool: the visible keys inside the window or chunk of a layer type."""
    visible, distance, column = tables
    if size is None:
        return visible
    if kind == CHUNKED:
        return visible & ((column[:, :, None] - distance) // size == column[:, :, None] // size)
    return visible & (distance < size)


def additive(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where visible, the dtype's minimum elsewhere: [B, N, S] -> [B, 1, N, S]."""
    mask = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
    return mask.masked_fill_(~visible, torch.finfo(dtype).min)[:, None]
