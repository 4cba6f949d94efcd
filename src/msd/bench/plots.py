"""What a benchmark says, as pictures: SVG texts, one per question a reader has."""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Callable
from typing import Any

from msd.bench import errors

Results = dict[str, Any]
COLOURS = {
    "vision": "tab:blue", "language": "tab:orange", "fusion": "tab:green",
    "event_sparse": "tab:cyan", "event_dense": "tab:purple", "video_reasoning": "tab:red",
}  # fmt: skip
PARTS = {"prefill": "0.75", "draft": "tab:orange", "verify": "tab:blue", "host": "tab:red"}


def all_of(results: Results) -> dict[str, str]:
    """Title -> SVG, those for which there are figures; none where matplotlib (the `bench` extra) is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        return {}
    found = {
        "Speedup over `ar`, end to end, with 95% intervals": speedups(results),
        "Acceptance by depth of the draft": by_depth(results),
        "Which drafts are rejected": rejections(results),
        "Where the time of a token goes": time_split(results),
        "What a target pass costs": cost_curve(results),
    }
    return {title: svg for title, svg in found.items() if svg}


def speedups(results: Results) -> str | None:
    """A bar per task and method."""
    rows = [r for r in results["rows"] if r["method"] != "transformers"]
    tasks, methods = (list(dict.fromkeys(r[key] for r in rows)) for key in ("task", "method"))
    width = 0.8 / len(methods)

    def draw(axes: Any) -> None:
        for i, method in enumerate(methods):
            mine = {r["task"]: r for r in rows if r["method"] == method}
            places = [t + i * width for t, task in enumerate(tasks) if task in mine]
            heights = [mine[task]["speedup_vs_ar"] for task in tasks if task in mine]
            found = [mine[task].get("speedup_vs_ar_interval") for task in tasks if task in mine]
            edges = [edge or [h, h] for edge, h in zip(found, heights, strict=True)]
            bars = [[max(0.0, h - low) for h, (low, _) in zip(heights, edges, strict=True)],
                    [max(0.0, high - h) for h, (_, high) in zip(heights, edges, strict=True)]]  # fmt: skip
            axes.bar(places, heights, width * 0.9, yerr=bars, capsize=2, label=method)
        axes.axhline(1, color="black", linewidth=0.8)
        axes.set(xticks=[t + width * (len(methods) - 1) / 2 for t in range(len(tasks))], ylabel="times `ar`")
        axes.set_xticklabels(tasks)
        axes.legend(fontsize=7, ncols=2)

    return _drawn(draw, 1.6 + 1.4 * len(tasks))


def by_depth(results: Results) -> str | None:
    """A line per modality, for the method with the longest acceptance; the others as thin lines."""
    rows = [r for r in results["rows"] if r["task"] == "all" and r.get("acceptance_by_depth")]
    if not rows:
        return None
    best = max(rows, key=lambda r: r["mean_acceptance_length"])

    def draw(axes: Any) -> None:
        for row in rows:
            for name, rates in row["acceptance_by_depth"].items():
                points = [(d, rate) for d, rate in enumerate(rates, 1) if rate is not None]
                if points:
                    mine = row is best
                    axes.plot(
                        *zip(*points, strict=True), color=COLOURS.get(name), marker="." if mine else None,
                        alpha=1.0 if mine else 0.25, label=f"{row['method']}, {name}" if mine else None,
                    )  # fmt: skip
        axes.set(xlabel="depth of the drafted token, those above accepted", ylabel="accepted", ylim=(0, 1))
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.legend(fontsize=7)

    return _drawn(draw, 5)


def rejections(results: Results) -> str | None:
    """A bar per method and modality, depth or kind of word: rejected share of the drafted positions."""
    measured = errors.methods(results)
    if not measured:
        return None
    told = [column for group in errors.groups(results).values() for column in group]
    width = 0.8 / len(measured)

    def draw(axes: Any) -> None:
        for i, (method, pattern) in enumerate(measured):
            counts = [errors.rate(pattern, **which) for _, which in told]
            places = [c + i * width for c, (_, drafted) in enumerate(counts) if drafted]
            axes.bar(places, [r / n for r, n in counts if n], width * 0.9, label=method)
        at = 0
        for group in list(errors.groups(results).values())[:-1]:  # a line after each group
            at += len(group)
            axes.axvline(at - 0.5 + width * (len(measured) - 1) / 2, color="black", linewidth=0.8)
        axes.set(xticks=[c + width * (len(measured) - 1) / 2 for c in range(len(told))], ylabel="rejected", ylim=(0, 1))
        axes.set_xticklabels([name for name, _ in told], rotation=30, ha="right")
        axes.legend(fontsize=7, ncols=2)

    return _drawn(draw, 1.6 + 0.6 * len(told), 3.6)


def time_split(results: Results) -> str | None:
    """A stacked bar per method: milliseconds per token."""
    rows = [r for r in results["rows"] if r["task"] == "all" and r.get("verify_s") is not None and r["tokens"]]
    if not rows:
        return None

    def draw(axes: Any) -> None:
        left = [0.0] * len(rows)
        for part, colour in PARTS.items():
            share = [1000 * (r.get(f"{part}_s") or 0.0) / r["tokens"] for r in rows]
            axes.barh([r["method"] for r in rows], share, left=left, color=colour, label=part)
            left = [a + b for a, b in zip(left, share, strict=True)]
        axes.invert_yaxis()
        axes.set(xlabel="ms per emitted token")
        axes.legend(fontsize=7)

    return _drawn(draw, 6, 1.2 + 0.3 * len(rows))


def cost_curve(results: Results) -> str | None:
    """Milliseconds of a target pass by nodes, a line per length of context."""
    costs = results["environment"].get("costs")
    if not costs:
        return None

    def draw(axes: Any) -> None:
        for context, seconds in zip(costs["contexts"], costs["seconds"], strict=True):
            axes.plot(costs["nodes"], [1000 * s for s in seconds], marker=".", label=f"after {context} tokens")
        axes.set(xlabel="nodes in the tree, root included", ylabel="ms", ylim=(0, None))
        axes.legend(fontsize=7)

    return _drawn(draw, 5)


def _drawn(draw: Callable[[Any], None], width: float, height: float = 3.2) -> str:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with matplotlib.rc_context({"svg.hashsalt": "msd", "font.size": 9}):  # the same figures, the same file
        figure, axes = plt.subplots(figsize=(width, height), constrained_layout=True)
        draw(axes)
        axes.grid(alpha=0.3)
        axes.set_axisbelow(True)
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None})
        plt.close(figure)
    svg = text.getvalue()
    return svg[svg.index("<svg") :]
