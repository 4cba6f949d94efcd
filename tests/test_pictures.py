"""The README's picture is drawn from committed results, and stays small."""

from __future__ import annotations

import io

import pytest
from PIL import Image
from tools import pictures


@pytest.mark.parametrize("name", pictures.THEMES)
def test_the_picture_is_drawn_from_committed_results(name: str) -> None:
    drawn = pictures.draw(pictures.THEMES[name])
    assert Image.open(io.BytesIO(drawn)).size == (1600, 910)
    committed = pictures.OUT / f"overview-{name}.png"
    assert max(len(drawn), committed.stat().st_size) < 150_000


def test_no_two_nodes_of_a_column_share_a_row() -> None:
    def node(parent: int, depth: int, accepted: bool = False) -> dict[str, object]:
        return {"parent": parent, "depth": depth, "accepted": accepted}

    nodes = [node(0, 1), node(0, 1, True), node(1, 2), node(2, 2), node(2, 2, True), node(3, 3)]
    row = pictures.rows(nodes)
    assert [row[n] for n in (0, 2, 5)] == [0, 0, 0], "the accepted path is the first row"
    assert len({(row[n], d["depth"]) for n, d in enumerate(nodes, 1)}) == len(nodes)
