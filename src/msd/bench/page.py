"""The report as one web page that needs nothing else: pictures first, then a table per task and the comparisons."""

from __future__ import annotations

import html
from typing import Any

from msd.bench import plots
from msd.bench.report import comparisons, described, tables

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
figure { display: inline-block; margin: 0 1rem 1rem 0; vertical-align: top } figcaption { font-weight: 600 }
svg { max-width: 100%; height: auto } .wide { overflow-x: auto }
table { border-collapse: collapse; margin: .5rem 0 1.5rem } td, th { padding: .25rem .6rem; text-align: right }
td:first-child, th:first-child { text-align: left } th { border-bottom: 2px solid #999; font-weight: 600 }
tr:nth-child(even) td { background: #f4f4f4 }
"""


def page(results: dict[str, Any]) -> str:
    """HTML of `results`, as `measure.run` gives them."""
    figures = "".join(
        f"<figure><figcaption>{_text(title)}</figcaption>{svg}</figure>\n"
        for title, svg in plots.all_of(results).items()
    )
    parts = [f"<p>{_text(described(results['environment']))}</p>", figures]
    for title, head, rows in (*tables(results), *comparisons(results)):
        parts.append(f"<h2>{_text(title)}</h2><div class='wide'><table><tr>{_cells(head, 'th')}</tr>")
        parts += [f"<tr>{_cells(row, 'td')}</tr>" for row in rows]
        parts.append("</table></div>")
    return (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'><title>msd bench</title>"
        f"<style>{STYLE}</style></head><body><h1>msd bench</h1>\n" + "\n".join(parts) + "\n</body></html>\n"
    )


def _cells(values: list[str], tag: str) -> str:
    return "".join(f"<{tag}>{_text(value)}</{tag}>" for value in values)


def _text(words: str) -> str:
    """Escaped, with `code` marks turned into tags."""
    pieces = html.escape(words).split("`")
    return "".join(f"<code>{piece}</code>" if i % 2 else piece for i, piece in enumerate(pieces))
