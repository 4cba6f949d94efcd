"""Plots the results of a benchmark as SVG texts."""

from __future__ import annotations

import importlib.util
import io
from typing import Any

from msd.bench import errors

Results = dict[str, Any]
COLOURS = {
    "vision": "tab:blue", "language": "tab:orange", "fusion": "tab:green",
    "event_sparse": "tab:cyan", "event_dense": "tab:purple", "video_reasoning": "tab:red",
}  # fmt: skip
PARTS = {"prefill": "0.75", "draft": "tab:orange", "verify": "tab:blue", "host": "tab:red"}


def all_of(results: Results) -> dict[str, str]:
    """Returns title -> SVG of every plot that the results allow; empty without matplotlib (the `bench` extra)."""
    if importlib.util.find_spec("matplotlib") is None:
        return {}
    import matplotlib

    with matplotlib.rc_context({"svg.hashsalt": "msd", "font.size": 9}):  # equal results give equal files
        svgs = {
            "Speedup over `ar`, end to end, with 95% intervals": speedups(results),
            "Acceptance by depth of the draft": by_depth(results),
            "Rejected drafts": rejections(results),
            "Time per token by part": time_split(results),
            "Time of a target pass by number of nodes": cost_curve(results),
        }
    return {title: svg for title, svg in svgs.items() if svg}


def speedups(results: Results) -> str | None:
    """Plots a panel per task, with a point and an interval per method."""
    rows = [r for r in results["rows"] if r["method"] != "transformers"]
    tasks, methods = (list(dict.fromkeys(r[key] for r in rows)) for key in ("task", "method"))
    figure, panels = _panels(1.6 + 1.5 * len(tasks), 1.0 + 0.22 * len(methods), len(tasks))
    for axes, task in zip(panels, tasks, strict=True):
        of_task = [r for r in rows if r["task"] == task]
        values = [r["speedup_vs_ar"] for r in of_task]
        edges = [r.get("speedup_vs_ar_interval") or [v, v] for r, v in zip(of_task, values, strict=True)]
        bars = [[max(0.0, v - low) for v, (low, _) in zip(values, edges, strict=True)],
                [max(0.0, high - v) for v, (_, high) in zip(values, edges, strict=True)]]  # fmt: skip
        heights = [methods.index(r["method"]) for r in of_task]
        axes.errorbar(values, heights, xerr=bars, fmt="o", markersize=4, capsize=2)
        axes.axvline(1, color="black", linewidth=0.8)
        axes.set(title=task, xlabel="times `ar`")
    panels[0].set(yticks=range(len(methods)), ylim=(len(methods) - 0.5, -0.5))
    panels[0].set_yticklabels(methods)
    return _svg(figure)


def by_depth(results: Results) -> str | None:
    """Plots a line per modality for the method with the largest τ, and faint lines for the other methods."""
    rows = [r for r in results["rows"] if r["task"] == "all" and r.get("acceptance_by_depth")]
    if not rows:
        return None
    best = max(rows, key=lambda r: r["mean_acceptance_length"])
    figure, (axes,) = _panels(5)
    for row in rows:
        for name, rates in row["acceptance_by_depth"].items():
            points = [(d, rate) for d, rate in enumerate(rates, 1) if rate is not None]
            if points:
                axes.plot(
                    *zip(*points, strict=True), color=COLOURS.get(name), marker="." if row is best else None,
                    alpha=1.0 if row is best else 0.25, label=f"{row['method']}, {name}" if row is best else None,
                )  # fmt: skip
    axes.set(xlabel="depth of the drafted token (all parents accepted)", ylabel="accepted", ylim=(0, 1))
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(fontsize=7)
    return _svg(figure)


def rejections(results: Results) -> str | None:
    """Plots the rejected share of drafted positions: a row per method, a column per modality, depth or kind of word."""
    measured = errors.methods(results)
    if not measured:
        return None
    groups = errors.groups(results)
    columns = [column for group in groups for column in group]
    counts = [[errors.rate(pattern, **fields) for _, fields in columns] for _, pattern in measured]
    shares = [[r / n if n else float("nan") for r, n in row] for row in counts]
    figure, (axes,) = _panels(1.6 + 0.6 * len(columns), 1.2 + 0.22 * len(measured))
    axes.imshow(shares, cmap="YlOrRd", vmin=0, vmax=1, aspect="auto")
    for y, row in enumerate(counts):
        for x, (rejected, drafted) in enumerate(row):
            if drafted:
                colour = "white" if rejected > 0.6 * drafted else "black"
                axes.text(x, y, f"{rejected / drafted:.0%}", ha="center", va="center", color=colour, fontsize=7)
    at = 0.0
    for group in groups[:-1]:
        at += len(group)
        axes.axvline(at - 0.5, color="white", linewidth=4)
    axes.set(xticks=range(len(columns)), yticks=range(len(measured)))
    axes.set_xticklabels([name for name, _ in columns], rotation=30, ha="right")
    axes.set_yticklabels([method for method, _ in measured])
    return _svg(figure, grid=False)


def time_split(results: Results) -> str | None:
    """Plots a stacked bar per method: milliseconds per token."""
    rows = [r for r in results["rows"] if r["task"] == "all" and r.get("verify_s") is not None and r["tokens"]]
    if not rows:
        return None
    figure, (axes,) = _panels(6, 1.2 + 0.3 * len(rows))
    left = [0.0] * len(rows)
    for part, colour in PARTS.items():
        share = [1000 * (r.get(f"{part}_s") or 0.0) / r["tokens"] for r in rows]
        axes.barh([r["method"] for r in rows], share, left=left, color=colour, label=part)
        left = [a + b for a, b in zip(left, share, strict=True)]
    axes.invert_yaxis()
    axes.set(xlabel="ms per emitted token")
    axes.legend(fontsize=7)
    return _svg(figure)


def cost_curve(results: Results) -> str | None:
    """Plots milliseconds of a target pass against nodes, a line per context length."""
    costs = results["environment"].get("costs")
    if not costs:
        return None
    figure, (axes,) = _panels(5)
    for context, seconds in zip(costs["contexts"], costs["seconds"], strict=True):
        axes.plot(costs["nodes"], [1000 * s for s in seconds], marker=".", label=f"after {context} tokens")
    axes.set(xlabel="nodes in the tree, root included", ylabel="ms", ylim=(0, None))
    axes.legend(fontsize=7)
    return _svg(figure)


def _panels(width: float, height: float = 3.2, count: int = 1) -> tuple[Any, Any]:
    """Returns a figure, its size in inches, and its `count` axes side by side, which share their y axis."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, count, figsize=(width, height), sharey=True, squeeze=False, constrained_layout=True)
    return figure, axes[0]


def _svg(figure: Any, grid: bool = True) -> str:
    """Returns a figure as SVG, and closes it."""
    import matplotlib.pyplot as plt

    for axes in figure.axes:
        axes.grid(grid, **({"alpha": 0.3} if grid else {}))
        axes.set_axisbelow(True)
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None})
    plt.close(figure)
    svg = text.getvalue()
    return svg[svg.index("<svg") :]
