"""Writes the two tables of the race: drafters of equal training time, and of equally many answers seen."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from msd.bench.report import cell
from msd.drafters.toolkit import checkpoint
from msd.errors import UserError
from msd.system.files import make_folder, read_json, write_whole
from recipes.race.measuring import finished
from recipes.race.plan import ANSWERS, CONTESTS, TIME, step_times

TITLES = {TIME: "Equal training time", ANSWERS: "Equally many answers seen"}
HELD_OUT = ("acceptance", "vision", "language", "fusion", "event_sparse", "event_dense", "video_reasoning", "text")
SPEED = {
    "speedup_vs_best_plain": "vs best plain",
    "speedup_vs_best_plain_interval": "95%",
    "speedup_vs_best_plain_paired_median": "median of the ratios per sample",
    "mean_acceptance_length": "τ",
    "target_passes": "target passes",
}
DETAIL = "vs best plain, detail"
AGAIN = "run `python -m recipes.race bench` again"


def tell_runs(args: argparse.Namespace) -> None:
    """Writes `trained.json` and `race.md` from the training records and, once they exist, the benchmarks' results."""
    records = {state: _records(args, state) for state in TITLES}
    make_folder(args.results)
    document = {"step_times": step_times(CONTESTS[args.contest]), **records}
    write_whole(args.results / "trained.json", json.dumps(document, indent=1, ensure_ascii=False) + "\n")
    text = markdown(document, {state: args.results / state / "results.json" for state in TITLES})
    write_whole(args.results / "race.md", text)
    print(text)


def _records(args: argparse.Namespace, state: str) -> dict[str, dict[str, Any]]:
    """Returns name -> steps, answers seen, minutes of one core, learning rate, and held-out acceptance, in a state."""
    return {
        name: {
            "steps": run.steps(state),
            "answers": run.answers(state),
            "roots": run.settings.anchors,
            "minutes": round(run.minutes_at(state), 2),
            "rate": round(run.rate(state), 2),
            "digest": checkpoint.digest(folder),
            "held_out": checkpoint.training(folder)["held_out"],
        }
        for name, (run, folder) in finished(args, state).items()
    }


def markdown(document: dict[str, Any], benchmarks: dict[str, Path]) -> str:
    """Returns both tables; a state whose benchmark has not run has no speeds. document: content of `trained.json`."""
    times = document["step_times"]
    lines = [
        "Written by `python -m recipes.race tell`. Minutes are those of one core: steps times the seconds of a step on "
        f"an idle machine ({times['cpu']}, {times['threads']} thread, {times['precision']}). Roots are the positions "
        "of an answer that a step drafts from. Answers are those seen in training; an answer seen twice counts twice. "
        "In the second table each drafter is a copy from within the run of the first. Rate is its last learning rate "
        "as a fraction of the highest: where it has not decayed, drafters are worse, whatever the method, so the "
        "second table does not rank methods. Held-out acceptance is that of chains of 5 tokens, or of 4 where a method "
        "drafts 4.",
    ]
    for state, title in TITLES.items():
        digests = {name: record["digest"] for name, record in document[state].items()}
        speeds = _speeds(benchmarks[state], digests)
        missing = ["–"] * (len(SPEED) + 1) if speeds else []
        records = document[state].values()
        kinds = [kind for kind in HELD_OUT if any(kind in record["held_out"] for record in records)]
        head = ["drafter", "minutes", "rate", "roots", "answers", *(f"held-out {kind}" for kind in kinds)]
        head += [*SPEED.values(), DETAIL] if speeds else []
        lines += ["", f"**{title}**", "", _line(head), _line(["---"] * len(head))]
        for name, record in document[state].items():
            held_out = [f"{record['held_out'][kind]:.3f}" if kind in record["held_out"] else "–" for kind in kinds]
            own = speeds.pop(name, missing)
            cost = [f"{record['minutes']:.1f}", f"{record['rate']:.2f}", f"{record['roots']}", f"{record['answers']:,}"]
            lines.append(_line([name, *cost, *held_out, *own]))
        for name, own in speeds.items():  # other ways of decoding with the same drafters, and plain decoding
            lines.append(_line([name, *["–"] * (4 + len(kinds)), *own]))
    return "\n".join(lines) + "\n"


def _speeds(path: Path, digests: dict[str, str]) -> dict[str, list[str]]:
    """Returns method -> cells of a benchmark; empty if it has not run. digests: name -> hash of the weights.

    UserError if it measured other weights.
    """
    if not path.exists():
        return {}
    results = read_json(path, AGAIN)
    measured = results["environment"]["drafters"]
    for name in digests:
        if measured.get(name, digests[name]) != digests[name]:
            raise UserError(f"'{path}' has measured other weights of '{name}'; {AGAIN}")
    rows = results["rows"]
    detail = {row["method"]: row["speedup_vs_best_plain"] for row in rows if row["task"] == "detail"}
    overall = [row for row in rows if row["task"] == "all"]
    return {r["method"]: [*(cell(r[key]) for key in SPEED), cell(detail.get(r["method"]))] for r in overall}


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"
