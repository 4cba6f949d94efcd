"""The report files: a self-contained page, and the same figures in every file."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from msd.bench import plots, report
from msd.bench.report import page


def row(method: str, task: str, speedup: float, **more: Any) -> dict[str, Any]:
    return {
        "method": method, "task": task, "samples": 3, "tokens": 30, "speedup_vs_ar": speedup,
        "speedup_vs_ar_interval": [speedup - 0.1, speedup + 0.1], "mean_acceptance_length": 2 * speedup,
        "prefill_s": 0.1, "draft_s": 0.1, "verify_s": 0.5, "host_s": 0.01, **more,
    }  # fmt: skip


def results() -> dict[str, Any]:
    depth = {"vision": [0.7, None], "language": [0.8, 0.6], "fusion": [None, None]}
    rows = [row(m, t, s) for t in ("all", "a<b") for m, s in (("transformers", 0.5), ("ar", 1.0))]
    rows += [row("msd", t, 2.0, acceptance_by_depth=depth) for t in ("all", "a<b")]
    costs = {"nodes": [1, 2, 4], "contexts": [64, 512], "seconds": [[0.03, 0.03, 0.04], [0.04, 0.04, 0.06]]}
    machine = {"threads": 2, "cpu_capability": "X", "dtype": "float32", "torch": "2", "transformers": "5"}
    environment = {**machine, "settings": {"max_new_tokens": 8}, "costs": costs}
    return {"environment": environment, "target_top_mass": {"all": {"1": 0.5, "4": 0.75, "8": 0.9}}, "rows": rows}


class Reader(HTMLParser):
    """Collects open tags, links and table cells."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.cells: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta",):
            self.open.append(tag)
        self.links += [v or "" for k, v in attrs if k in ("src", "href") and not (v or "").startswith("#")]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("td", "th"):
            self.cells.append(data)


def test_the_page_is_self_contained_and_holds_every_cell(tmp_path: Path) -> None:
    report.write(results(), tmp_path)
    text = (tmp_path / "report.html").read_text()
    reader = Reader()
    reader.feed(text)
    assert reader.open == [] and reader.links == []
    for _, head, rows in report.tables(results()):
        for cell in (*(h for h in head if "`" not in h), *(c for r in rows for c in r)):
            assert cell in reader.cells
    assert "a&lt;b (3 samples)" in text and "hold 0.50 / 0.75 / 0.90" in text
    assert text.count("<svg") == 4
    assert json.loads((tmp_path / "results.json").read_text()) == results()
    assert page(results()) == text, "the same figures give the same file"


def test_plots_need_their_figures() -> None:
    bare = results()
    bare["environment"].pop("costs")
    for r in bare["rows"]:
        r |= {"acceptance_by_depth": None, "verify_s": None}
    assert list(plots.all_of(bare)) == ["Speedup over `ar`, end to end, with 95% intervals"]


def test_without_matplotlib_there_are_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    text = page(results())
    assert "<svg" not in text and "<table>" in text
