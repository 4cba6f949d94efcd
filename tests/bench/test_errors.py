"""Rejected drafts and the comparison of MSD with `standard`, on invented data."""

from __future__ import annotations

from typing import Any

import pytest

from bench_environment import ENVIRONMENT
from msd.bench import errors, pairwise, plots, report
from msd.bench.errors import KINDS, kind_of, kinds_of
from msd.bench.report import page
from msd.core.modality import FUSION, LANGUAGE, VISION
from msd.core.statistics import RowStep
from msd.labels import EVENT_DENSE, EVENT_SPARSE


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("object", "dog Dogs beach guitar man's building ceiling frisbee bed kite."),
        ("colour", "red Blue grey, orange white"),
        ("number", "two 3 12th 1,000 seventeen pair"),
        ("verb", "running sits wearing parked is-not-a-verb-but-jumped holds"),
        ("function word", "the of And with, their is behind it"),
        ("other", ". , </s> ! large beautiful slowly 狗 tallest"),
    ],
)
def test_kinds_of_words(kind: str, words: str) -> None:
    assert {word: kind_of(word) for word in words.split()} == dict.fromkeys(words.split(), kind)


def test_pieces_have_the_kind_of_their_word() -> None:
    pieces = ["A", " bro", "wn", " d", "og", " runs", ",", " 1", "2", " fris", "bees", ".", "\n", "Nice", "", "</s>"]
    expected = ["function word", *["colour"] * 2, *["object"] * 2, "verb", "other", *["number"] * 2, *["object"] * 2]
    assert kinds_of(pieces) == [*expected, "other", "other", "other", "other", "other"]
    assert kinds_of([]) == []


L, V, F = LANGUAGE.id, VISION.id, FUSION.id


def test_every_drafted_position_counts_once() -> None:
    labels = [L, V, V, F, L, L, V, L]
    kinds = ["other", "colour", "object", "verb", "function word", "object", "number", "object"]
    # a draft of 5 from token 1: two accepted, the third rejected; of 2 from token 4: both; one beyond the end
    steps = [RowStep(0, 1, 5, 2), RowStep(0, 4, 2, 2), RowStep(0, 7, 5, 1)]
    found = errors.pattern([(steps, labels, kinds), ([RowStep(0, 1, 1, 0)], [L, V], ["other", "colour"])])
    table = {(e["modality"], e["depth"], e["word"]): (e["rejected"], e["drafted"]) for e in found}
    assert table == {
        ("vision", 1, "colour"): (1, 2), ("vision", 2, "object"): (0, 1), ("fusion", 3, "verb"): (1, 1),
        ("language", 1, "function word"): (0, 1), ("language", 2, "object"): (0, 1), ("language", 1, "object"): (0, 1),
    }  # fmt: skip
    assert errors.rate(found, modality="vision") == (1, 3)
    assert errors.rate(found) == (2, 7) and errors.rate(found, word="number") == (0, 0)


def row(method: str, task: str, speedup: float, rates: tuple[float, ...] | None = None, **more: Any) -> dict[str, Any]:
    accepted = None if rates is None else dict(zip(("vision", "language", "fusion"), rates, strict=True))
    return {
        "method": method, "task": task, "samples": 3, "tokens": 30, "speedup_vs_ar": speedup,
        "mean_acceptance_length": 2.0, "acceptance_by_modality": accepted, **more,
    }  # fmt: skip


def results(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {"environment": ENVIRONMENT, "rows": rows}


def test_msd_is_compared_with_standard() -> None:
    rows = [row("ar", "all", 1.0), row("ar", "vqa", 1.0), row("standard", "all", 1.5, (0.5, 0.8, 0.6))]
    rows += [row("msd", "all", 1.8, (0.7, 0.84, 0.66)), row("standard", "vqa", 1.2), row("msd", "vqa", 1.2)]
    rows += [row("standard", "coco-qa", 2.0), row("msd", "coco-qa", 1.9), row("msd:sampled", "all", 9.0)]
    speed, accepted = pairwise.summary(results(rows))
    assert speed[2] == [
        ["all tasks", "1.50", "1.80", "+20%"], ["VQA", "1.20", "1.20", "+0%"],
        ["COCO-QA (in the place of GQA)", "2.00", "1.90", "-5%"],
    ]  # fmt: skip
    assert accepted[2] == [
        ["vision", "0.50", "0.70", "+40%"], ["language", "0.80", "0.84", "+5%"], ["fusion", "0.60", "0.66", "+10%"],
    ]  # fmt: skip
    text = report.markdown(results(rows))
    assert "| VQA | 1.20 | 1.20 | +0% |" in text and "| vision | 0.50 | 0.70 | +40% |" in text
    assert "+40%" in page(results(rows))


def test_seeds_are_averaged_and_one_method_makes_no_table() -> None:
    rows = [row(f"standard seed {s}", "all", 1.0 + s, (0.5, 0.5, 0.5)) for s in range(3)]
    rows += [row(f"msd:block seed {s}", "all", 2.0 + s, (0.75, 0.5, 0.5)) for s in range(3)]
    speed, accepted = pairwise.summary(results(rows))
    assert speed[2] == [["all tasks", "2.00", "3.00", "+50%"]] and accepted[2][0] == ["vision", "0.50", "0.75", "+50%"]
    other = [*rows, row("msd:ar", "all", 9.0, (0.9, 0.9, 0.9))]  # another form is not MSD's
    assert pairwise.summary(results(other)) == [speed, accepted]
    assert pairwise.summary(results(rows[:3])) == []
    longer = [row("standard", "all", 1.0), row("msd", "all", 3.0), row("msd:30min", "all", 2.0)]
    ((_, head, cells),) = pairwise.summary(results(longer))
    assert "`msd:30min`" in head[2] and cells == [["all tasks", "1.00", "2.00", "+100%"]], "as much training as it had"
    bare = [row("standard", "all", 1.0), row("msd", "all", 2.0)]
    assert [title for title, _, _ in pairwise.summary(results(bare))] == ["Speedup per task, end to end over `ar`"]


def test_error_tables_and_plot() -> None:
    some = errors.pattern([([RowStep(0, 1, 2, 1)], [L, V, F], ["other", "colour", "object"])])
    rows = [row("ar", "all", 1.0), row("msd", "all", 2.0, errors=some), row("eagle2", "all", 1.5, errors=some[:1])]
    rows.append(row("msd", "vqa", 2.0, errors=some))
    first, crossed = errors.tables(results(rows))
    assert first[1] == ["method", "vision", "fusion", "depth 1", "depth 2", *KINDS]
    assert first[2][0] == [
        "msd", "0 (of 1)", "100 (of 1)", "0 (of 1)", "100 (of 1)", "100 (of 1)", "0 (of 1)", "–", "–", "–", "–",
    ]  # fmt: skip
    assert [r[0] for r in first[2]] == ["msd", "eagle2"]
    assert crossed[2][1] == ["msd, fusion", "100 (of 1)", "–", "–", "–", "–", "–"]
    svg = plots.rejections(results(rows))
    assert svg is not None and svg.startswith("<svg")
    assert "Rejected drafts" in plots.all_of(results(rows))
    assert plots.rejections(results(rows[:1])) is None and errors.tables(results(rows[:1])) == []


def test_event_modalities_are_reported_as_all_others() -> None:
    steps = [RowStep(0, 1, 2, 1)]
    seen = errors.pattern([(steps, [EVENT_DENSE.id, LANGUAGE.id, EVENT_SPARSE.id], ["object", "verb", "other"])])
    rows = [row("standard", "all", 1.0), row("msd", "all", 2.0)]
    rates = {"vision": None, "language": 0.5, "fusion": None, "event_dense": 0.25}
    rows = [r | {"acceptance_by_modality": rates, "errors": seen} for r in rows]
    first, _ = errors.tables(results(rows))
    assert first[1][:3] == ["method", "language", "event_sparse"]
    _, accepted = pairwise.summary(results(rows))
    assert [cells[0] for cells in accepted[2]] == ["language", "event_dense"]
