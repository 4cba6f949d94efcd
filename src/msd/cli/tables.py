"""Tables that fit a terminal of 80 columns with every cell whole."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.table import Column, Table


def table(*heads: str, wrapped: Sequence[str] = ()) -> Table:
    """An empty table. heads: of the columns, with line breaks where they may be broken; a name or number never is.

    wrapped: heads of the columns whose text may take several lines.
    """
    columns = [Column(head, no_wrap=head not in wrapped, overflow="fold") for head in heads]
    return Table(*columns, box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
