"""Writes the generated tables of README and docs from the committed result files: `python tools/tables.py`.

With `--check` it writes nothing; the exit code is 1 if a page is out of date.
"""

from __future__ import annotations

import math
import re
import sys
from pathlib import Path
from statistics import fmean
from typing import Any

from msd.bench import pairwise, report
from msd.errors import UserError
from msd.system.files import read_json, write_whole

ROOT = Path(__file__).parents[1]
KINDS = ("vision", "language", "fusion")
EVENT_KINDS = ("event_sparse", "event_dense", "video_reasoning", "language")
TASKS = {
    "detail": "long description",
    "caption": "caption",
    "yesno": "yes/no question",
    "question": "open question",
    "vqa": "one-word answer",
    "all": "all of these",
}
MIXED = {  # folder of results/ -> what its run measured, on the first 60 of the same prompts
    "val-T1": "T = 1, same seed",
    "batch-4": "batches of 4",
    "batch-16": "batches of 16",
}
LOOKUP = "+prompt-lookup"
RACE = "recipes/race/results"
COMPARED = {
    "detail": "detail",
    "caption": "caption",
    "vqa": "VQA",
    "cocoqa": "COCO-QA",
    "chat": "chat",
    "ocr": "OCR",
    "text": "text",
}
VERIFY_HALF = "msd verify --method ar,msd,prompt-lookup --limit 8"
COMMANDS = {
    "results/verify.json": "`msd verify --method all --limit 3 --json`",
    **{f"results/verify_{d}.json": f"`{VERIFY_HALF} --dtype {d} --json`" for d in ("bfloat16", "float16")},
    "results/val/results.json": "`make floors`",
    "results/val-T1/results.json": "`make floors`",
    **{f"results/batch-{n}/results.json": "`make floors`" for n in (2, 4, 8, 16)},
    **{f"results/noise-{n}/results.json": "`make floors`" for n in (1, 2, 4, 8, 16)},
    "results/unseen/results.json": "`make floors`",
    **{
        f"results/avx2/{run}/results.json": "`make floors`, without the library's assisted generation"
        for run in ("val", "val-T1")
    },
    "results/comparison/results.json": "`make comparison`",
    "results/long/results.json": "`python -m recipes.msd.long bench`",
    "results/draft_tree.json": "`python tools/pictures.py --record`",
    "results/forecasts.json": "`python -m recipes.floors.forecasts results`",
    "results/estimate.json": "`python -m recipes.estimate.validate --out results/estimate.json`",
    "results/gpu.json": "`python tools/gpu_check.py`",
    "results/drafts.json": "`python -m recipes.floors.drafts results`",
    "results/foresight.json": "`python -m recipes.floors.foresight results`",
    "results/kernels.json": "`python -m recipes.floors.kernels results`",
    "results/kernels-bfloat16.json": "`python -m recipes.floors.kernels results --bfloat16`",
    "results/neighbour.json": "`python -m recipes.floors.neighbour results --photos 2 --rounds 2`",
    "results/engines.json": "[vllm.md](vllm.md#speed)",
    "recipes/reference_vlm/results/evaluation.json": "[recipes/reference_vlm](../recipes/reference_vlm/README.md)",
    "recipes/msd/results/trained.json": "`python -m recipes.msd.rows tell`",
    "recipes/msd/results/results.json": "`python -m recipes.msd.rows bench`",
    "recipes/msd/results/policies.json": "`python -m recipes.msd.policies --drafter src/msd/weights/msd --photos 100`",
    "recipes/race/results/trained.json": "`python -m recipes.race tell`",
    "recipes/race/results/equal-time/results.json": "`python -m recipes.race bench --state equal-time`",
    "recipes/race/results/equal-answers/results.json": "`python -m recipes.race bench --state equal-answers`",
    "recipes/events/results/trained.json": "[recipes/events](../recipes/events/README.md)",
    "recipes/events/results/results.json": "[recipes/events](../recipes/events/README.md)",
}


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    first, *others = (f"| {' | '.join(row)} |" for row in (head, *rows))
    return "\n".join([first, "|---" * len(head) + "|", *others])


def cells(results: dict[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    """(method, task) -> row of a benchmark."""
    return {(row["method"], row["task"]): row for row in results["rows"]}


def interval(row: dict[str, Any]) -> str:
    """The 95% interval of the speedup over `ar`."""
    return "–".join(f"{edge:.2f}" for edge in row["speedup_vs_ar_interval"])


def headline_table(folder: str = "results") -> str:
    """Speedups of `msd`: by task, then sampled and in batches, as far as these runs are in the folder."""
    runs = [("val", task, name) for task, name in TASKS.items()] + [(run, "all", name) for run, name in MIXED.items()]
    rows = []
    for run, task, name in runs:
        if not (ROOT / folder / run).is_dir():
            continue
        row = cells(read(f"{folder}/{run}/results.json"))["msd", task]
        rows.append(
            [
                name,
                str(row["samples"]),
                f"{row['mean_answer_tokens']:.0f}",
                f"{row['speedup_vs_transformers']:.2f}x",
                f"{row['speedup_vs_ar']:.2f}x ({interval(row)})",
                f"{row['mean_acceptance_length']:.2f}",
                f"{row['identical']:.0%}",
            ]
        )
    head = ["task", "prompts", "tokens per answer", "vs `generate()`", "vs no drafting (95%)", "τ", "identical"]
    return table(head, rows)


def methods_table(results: dict[str, Any]) -> str:
    """Speedups over `ar` of every method of a benchmark, by task, the fastest first."""
    found = cells(results)
    tasks = {task: name for task, name in COMPARED.items() if ("ar", task) in found}
    overall = [row for row in results["rows"] if row["task"] == "all"]
    rows = [
        [f"`{row['method']}`", f"**{row['speedup_vs_ar']:.2f}**", interval(row), f"{row['mean_acceptance_length']:.2f}"]
        + [f"{found[row['method'], task]['speedup_vs_ar']:.2f}" for task in tasks]
        for row in sorted(overall, key=lambda row: -row["speedup_vs_ar"])
    ]
    return table(["method", "all tasks", "95%", "τ", *tasks.values()], rows)


def unseen_table(results: dict[str, Any]) -> str:
    """Speedups over `ar` and τ of every method on pictures and texts unlike the training data, by kind."""
    found = cells(results)
    tasks = ["all", *(task for method, task in found if method == "ar" and task != "all")]
    tokens = [f"{found['ar', task]['mean_answer_tokens']:.0f}" for task in tasks]
    lines = [["", "tokens per answer", *tokens, ""]]
    for method in [method for method, task in found if task == "all" and method != "ar"]:
        rows = [found[method, task] for task in tasks]
        speeds = [f"{row['speedup_vs_ar']:.2f}" for row in rows]
        lines.append([f"`{method}`", "vs `ar`", *speeds, interval(rows[0])])
        if method != "transformers":
            lines.append(["", "τ", *(f"{row['mean_acceptance_length']:.2f}" for row in rows), ""])
    return table(["method", "", *(task.removeprefix("unseen-") for task in tasks), "all, 95%"], lines)


def repeats_table(results: dict[str, Any]) -> str:
    """Speedups over `ar` of the methods that were measured with lookups of long repeats too, without and with them."""
    found, seconds = cells(results), results["sample_seconds"]
    rows = []
    for name in [n.removesuffix(LOOKUP) for n in seconds if n.endswith(LOOKUP)]:
        low, high = pairwise.ratio_interval(seconds[name], seconds[name + LOOKUP]) or (math.nan, math.nan)
        figures = [found[n, task]["speedup_vs_ar"] for task in ("all", "detail", "ocr") for n in (name, name + LOOKUP)]
        gain = f"{sum(seconds[name]) / sum(seconds[name + LOOKUP]):.2f}"
        rows.append([f"`{name}`", *(f"{figure:.2f}" for figure in figures), gain, f"{low:.2f}–{high:.2f}"])
    tasks = [f"{task}, {kind}" for task in ("all tasks", "detail", "OCR") for kind in ("without", "with")]
    return table(["method", *tasks, "gain", "95%"], sorted(rows, key=lambda row: row[2], reverse=True))


def race_table(state: str) -> str:
    """Training and speed of every method of the race in a state, the seeds of one together, and `msd` over it.

    With lookups, `msd` has them too. Only training, where the benchmark has not run.
    """
    trained = read(f"{RACE}/trained.json")[state]
    if not (ROOT / RACE / state / "results.json").is_file():
        return race_training_table(trained)
    results = read(f"{RACE}/{state}/results.json")
    found, seconds = cells(results), results["sample_seconds"]
    groups = {name: runs for name, runs in pairwise.grouped(seconds).items() if name not in ("ar", "transformers")}
    means = {name: pairwise.mean_seconds(seconds, runs) for name, runs in groups.items()}
    rows = []
    for name, runs in sorted(groups.items(), key=lambda group: sum(means[group[0]])):
        records = [trained[run] for run in runs if run in trained]  # none of a run with lookups
        acceptance = fmean(r["held_out"]["acceptance"] for r in records) if records else math.nan
        cost = [f"{records[0][key]:,.0f}" for key in ("minutes", "answers")] if records else ["–", "–"]
        first, *others = _speeds(results, runs)
        seeds = ", ".join(f"{found[run, 'all']['speedup_vs_best_plain']:.2f}" for run in runs)
        ours = f"msd seed 0{LOOKUP}" if name.endswith(LOOKUP) else "msd"
        over = "" if name == ours else _over(means[name], means[ours])
        held_out = f"{acceptance:.3f}" if records else "–"
        rows.append([f"`{name}`", *cost, held_out, first, seeds, *others, over])
    head = ["method", "minutes", "answers", "held-out", "all tasks (95%)", "by seed", "median", "τ", *COMPARED.values()]
    made = results["environment"]
    return table([*head, "`msd` over it"], rows) + f"\n\n{made['cpu']}, threads: {made['threads']}."


def long_table() -> str:
    """Speed of the drafters that were trained for longer than the race, and `msd` over each."""
    results = read("results/long/results.json")
    seconds, made = results["sample_seconds"], results["environment"]
    rows = []
    for name in sorted(set(seconds) - {"ar", "transformers"}, key=lambda name: sum(seconds[name])):
        ours = "msd long" + (LOOKUP if name.endswith(LOOKUP) else "")
        over = "" if name == ours else _over(seconds[name], seconds[ours])
        rows.append([f"`{name}`", *_speeds(results, [name]), over])
    head = ["method", "all tasks (95%)", "median", "τ", *COMPARED.values(), "`msd long` over it"]
    return table(head, rows) + f"\n\n{made['cpu']}, threads: {made['threads']}."


def _speeds(results: dict[str, Any], runs: list[str]) -> list[str]:
    """Of the seeds of one method, over the best plain decoding: of all tasks, median, τ, and of each task."""
    found, seconds = cells(results), results["sample_seconds"]
    own = pairwise.mean_seconds(seconds, runs)
    return [
        _over(seconds[found[runs[0], "all"]["best_plain"]], own),
        f"{fmean(found[run, 'all']['speedup_vs_best_plain_paired_median'] for run in runs):.2f}",
        f"{fmean(found[run, 'all']['mean_acceptance_length'] for run in runs):.2f}",
        *(f"{fmean(found[run, task]['speedup_vs_best_plain'] for run in runs):.2f}" for task in COMPARED),
    ]


def race_training_table(trained: dict[str, dict[str, Any]]) -> str:
    """Training and held-out acceptance of every method of the race; trained: run -> record of `tell`."""
    lines = []
    for name, runs in pairwise.grouped(trained).items():
        first, rates = trained[runs[0]], [trained[run]["held_out"]["acceptance"] for run in runs]
        figures = [f"{first['minutes']:,.0f}", f"{first['answers']:,}", f"{first['rate']:.2f}"]
        lines.append([f"`{name}`", *figures, ", ".join(f"{rate:.3f}" for rate in rates)])
    return table(["method", "minutes", "answers", "learning rate", "held-out acceptance, by seed"], lines)


def _over(base: list[float], own: list[float]) -> str:
    """The ratio of summed seconds with its 95% interval."""
    low, high = pairwise.ratio_interval(base, own) or (math.nan, math.nan)
    return f"{sum(base) / sum(own):.2f} ({low:.2f}–{high:.2f})"


def verify_table(rows: list[dict[str, Any]]) -> str:
    """The certificate, a row per method."""
    lines = []
    for row in rows:
        ties = f"{row['ties']} ({max(row['tie_gaps']):.0e})" if row["ties"] else "0"
        p = f"{min(row['p_values']):.2f}" if row["p_values"] else "–"
        passed = "yes" if row["passed"] else "no"
        lines.append([f"`{row['method']}`", str(row["compared"]), str(row["identical"]), ties, p, passed])
    return table(["method", "compared", "identical", "ties (largest gap)", "smallest χ² p-value", "passed"], lines)


def certificate(rows: list[dict[str, Any]]) -> str:
    """The totals of the certificate, as a sentence."""
    compared, identical, ties = (sum(row[key] for row in rows) for key in ("compared", "identical", "ties"))
    differences = sum(len(row["differences"]) for row in rows)
    passed = "all passed" if all(row["passed"] for row in rows) else "**not all passed**"
    return (
        f"> {len(rows)} methods and variants, {compared} answers compared: {identical} identical, {ties} ties, "
        f"{differences} differences; {passed}."
    )


def half_precision_table(certificates: dict[str, dict[str, Any]]) -> str:
    """The certificates in half precision: dtype -> JSON of `msd verify`."""
    lines = [
        "| dtype | method | compared | identical | agreeing tokens | ties | largest gap (roundings) | passed |",
        "|---" * 8 + "|",
    ]
    for dtype, certificate in certificates.items():
        for row in (certificate["yardstick"], *certificate["rows"]):
            gap = f"{max(row['relative_gaps']):.2f}" if row["relative_gaps"] else "–"
            shares = f"{row['identical']} | {row['agreeing_share']:.0%} | {row['ties']}"
            passed = "–" if "passed" not in row else "yes" if row["passed"] else "no"
            name = f"`{row['method']}`" if "passed" in row else row["method"]
            lines.append(f"| {dtype} | {name} | {row['compared']} | {shares} | {gap} | {passed} |")
    return "\n".join(lines)


def policies_table(measured: dict[str, dict[str, dict[str, Any]]]) -> str:
    """Speed and divergence of every verification policy, by temperature."""
    lines = []
    for temperature, policies in measured.items():
        for name, row in policies.items():
            spent = row["divergence"] or {}
            kinds = (spent.get("by_modality") or {}).items()
            each = ", ".join(f"{kind} {value['per_token']:.3f}" for kind, value in kinds) or "–"
            lines.append(
                [
                    temperature,
                    f"`{name}`",
                    f"{row['speedup_vs_ar']:.2f}",
                    f"{row['mean_acceptance_length']:.2f}",
                    *([f"{spent['per_token']:.4f}", each] if spent else ["0", "–"]),
                    f"{row['answers_equal_to_lossless']:.0%}",
                    f"{row['tokens_equal_to_lossless']:.0%}",
                    f"{row['cider']:.2f}",
                ]
            )
    head = ["T", "policy", "vs `ar`", "τ", "TV per token", "by modality", "same answer", "same tokens", "CIDEr"]
    return table(head, lines)


def trained_table(rows: dict[str, dict[str, Any]], modalities: tuple[str, ...]) -> str:
    """Held-out acceptance of drafters with equal training time, best first.

    A drafter that was trained with other modalities has no figures for `modalities`.
    """
    kinds = ("acceptance", *modalities)
    lines = []
    for name, row in sorted(rows.items(), key=lambda item: -item[1]["held_out"]["acceptance"]):
        rates = row["held_out"]
        complete = set(modalities) <= rates.keys()
        lines.append([f"`{name}`", f"{row['steps']:,}", *(f"{rates[kind]:.3f}" if complete else "–" for kind in kinds)])
    return table(["row", "steps", *kinds], lines)


def clips_table(results: dict[str, Any]) -> str:
    """Speed of every method on event clips, the fastest first, and acceptance by modality."""
    rows = []
    for row in sorted(results["rows"], key=lambda row: -row["speedup_vs_ar"]):
        if row["task"] == "all":
            rates = row["acceptance_by_modality"] or {}
            figures = (row[key] for key in ("speedup_decode_only", "speedup_vs_transformers", "mean_acceptance_length"))
            acceptance = (f"{rates[kind]:.2f}" if rates.get(kind) is not None else "–" for kind in EVENT_KINDS)
            speed = [f"{row['speedup_vs_ar']:.2f}", interval(row), *(f"{figure:.2f}" for figure in figures)]
            rows.append([f"`{row['method']}`", *speed, *acceptance])
    head = ["method", "vs `ar`", "95%", "decode only, vs `ar`", "vs `transformers`", "τ", *EVENT_KINDS]
    return table(head, rows)


def kernels_table(measured: dict[str, Any]) -> str:
    """Milliseconds of products and passes by code and number of rows, with the choice, and `ar` over `generate()`."""
    made, answers = measured["environment"], measured["answers"]
    lines = [
        [name, kernel, *(f"**{t:.2f}**" if kernel == c else f"{t:.2f}" for t, c in zip(times, chosen, strict=True))]
        for name, kernels in measured["products"].items()
        for chosen in [measured["choice"][name]]
        for kernel, times in kernels.items()
    ]
    rest = len(measured["rows"]) - len(measured["nodes"])
    for name, times in measured["passes"].items():
        lines.append(["pass", name, *(f"{t:.1f}" for t in times), *["–"] * rest])
    speed = ", ".join(f"{name} {ratio:.2f}x" for name, ratio in answers["ar_over_transformers"].items())
    return (
        table(["product", "code", *map(str, measured["rows"])], lines)
        + f"\n\n{made['cpu']} ({made['cpu_capability']}), threads: {made['threads']}"
        + ("" if made["quiet"] else ", **disturbed by other processes**")
        + f". First load with measurements: {measured['first_load_seconds']:.1f} s. `ar` over `transformers`, "
        + f"{answers['tokens']} tokens: {speed}."
    )


def drafts_table(measured: dict[str, Any]) -> str:
    """Operators, host reads and milliseconds of a draft and of a level, and their shares of a one-row pass."""
    made = measured["environment"]
    lines = [
        [
            f"`{name}`", f"{m['operators']:.0f}", f"{m['reads']:.0f}", f"{m['draft_ms']:.1f}",
            f"{m['draft_of_pass']:.0%}", f"{m['level_ms']:.1f}", f"{m['level_of_pass']:.0%}",
        ]
        for name, m in measured["methods"].items()
    ]  # fmt: skip
    head = ["method", "operators", "reads", "a draft (ms)", "of a pass", "a further level (ms)", "of a pass"]
    disturbed = "" if made["quiet"] else ", **disturbed by other processes**"
    return (
        table(head, lines)
        + f"\n\n{made['cpu']}, threads: {made['threads']}{disturbed}. A one-row pass: {measured['pass_ms']:.1f} ms."
    )


def forecasts_table(measured: dict[str, Any]) -> str:
    """Accepted nodes of a draft, expected and real, and the nodes of its tree, without trust and with it."""
    lines = []
    for name, ways in measured["sets"].items():
        cells = [f"{ways[way][what]:.2f}" for way in ("without", "with") for what in ("expected", "accepted", "nodes")]
        lines.append([name, *cells])
    head = ["answers", "expected", "accepted", "nodes", "expected, with trust", "accepted", "nodes"]
    return table(head, lines) + f"\n\n`{measured['method']}`, {measured['environment']['cpu']}."


def engines_table(path: str = "results/engines.json") -> str:
    """Tokens per second of this engine and vLLM, and how `msd` compares with the fastest way of vLLM."""
    results = read(path)
    by_setting: dict[tuple[str, str, bool], dict[int, dict[str, Any]]] = {}
    for row in results["rows"]:
        by_setting.setdefault((row["engine"], row["dtype"], row["compiled"]), {})[row["batch"]] = row
    sizes = sorted({row["batch"] for row in results["rows"]})
    lines = []
    for (engine, dtype, compiled), found in by_setting.items():
        first = found[sizes[0]]
        tau = (first["speculation"] or {}).get("mean_acceptance_length")
        speeds = [f"{found[size]['tokens_per_second']:.1f}" for size in sizes]
        same = [f"{found[size]['same']}/{found[size]['samples']}" for size in sizes]
        name = f"`{engine}`" + (", compiled" if compiled else "")
        lines.append([name, dtype, *speeds, "–" if tau is None else f"{tau:.2f}", *same])
    head = [*(f"tokens/s, batch {size}" for size in sizes), "τ", *(f"same answers, batch {size}" for size in sizes)]
    compared = [
        _against_vllm(results["rows"], dtype, size) for dtype in _kinds(results["rows"], "dtype") for size in sizes
    ]
    return table(["engine", "precision", *head], lines) + "\n\n" + "\n".join(compared)


def _kinds(rows: list[dict[str, Any]], name: str) -> list[Any]:
    return list(dict.fromkeys(row[name] for row in rows))


def _against_vllm(rows: list[dict[str, Any]], dtype: str, size: int) -> str:
    """A line that compares `msd` with the fastest way of vLLM in the same precision."""
    speeds = {}
    for row in rows:
        if (row["dtype"], row["batch"]) == (dtype, size):
            speeds[row["engine"] + (", compiled" if row["compiled"] else "")] = row["tokens_per_second"]
    best = max((name for name in speeds if name.startswith("vllm")), key=speeds.__getitem__)
    return f"- {dtype}, batch {size}: `msd` has {speeds['msd'] / speeds[best]:.2f} times the speed of `{best}`."


def files_table() -> str:
    """Every result file here, the command that makes it, and the machine it was made on."""
    rows = []
    for path, command in COMMANDS.items():
        if not (ROOT / path).is_file():  # not measured yet
            continue
        results = read(path)
        made = results.get("environment", results)
        threads, version = (str(made.get(name, "–")) for name in ("threads", "torch"))
        instructions = f" ({made['cpu_capability']})" if "cpu_capability" in made else ""
        cpu = made.get("cpu", "not recorded") + instructions
        rows.append([f"[{path}](../{path})", command, cpu, threads, version])
    return table(["file", "command", "CPU", "threads", "torch"], rows)


def read(path: str) -> Any:
    """A committed result file."""
    return read_json(ROOT / path, "restore it, or make it again with the command in docs/results.md", finite=False)


def tables() -> dict[str, dict[str, str]]:
    """Page -> mark in it -> table."""
    compared = read("results/comparison/results.json")
    verified = read("results/verify.json")["rows"]
    return {
        "README.md": {"headline": headline_table(), "certificate": certificate(verified)},
        "docs/results.md": {
            "files": files_table(),
            "verify": verify_table(verified),
            "floors": (ROOT / "results/floors.md").read_text(encoding="utf-8"),
            "headline-avx2": headline_table("results/avx2"),
            "bench": report.markdown(read("results/val/results.json")),
            "unseen": unseen_table(read("results/unseen/results.json")),
            "comparison": report.markdown(compared, ("all",)),
        },
        "docs/comparison.md": {
            **{state: race_table(state) for state in ("equal-time", "equal-answers")},
            "long": long_table(),
            "methods": methods_table(compared),
            "repeats": repeats_table(compared),
            "trained": trained_table(read("recipes/msd/results/trained.json"), KINDS),
        },
        "docs/performance.md": {
            "kernels": kernels_table(read("results/kernels.json")),
            "kernels-bfloat16": kernels_table(read("results/kernels-bfloat16.json")),
            "drafts": drafts_table(read("results/drafts.json")),
        },
        "docs/plan.md": {"forecasts": forecasts_table(read("results/forecasts.json"))},
        "docs/vllm.md": {"engines": engines_table()},
        "docs/verification.md": {
            "half precision": half_precision_table(
                {dtype: read(f"results/verify_{dtype}.json") for dtype in ("bfloat16", "float16")}
            )
        },
        "docs/modality_verification.md": {"policies": policies_table(read("recipes/msd/results/policies.json"))},
        "docs/events.md": {
            "trained": trained_table(read("recipes/events/results/trained.json"), EVENT_KINDS),
            "clips": clips_table(read("recipes/events/results/results.json")),
        },
    }


def main() -> int:
    """Returns 0 when all pages agree with the files (after writing them, unless `--check`)."""
    stale = 0
    for name, blocks in tables().items():
        page = ROOT / name
        text = fresh = page.read_text(encoding="utf-8")
        for mark, content in blocks.items():
            block = f"<!-- {mark} -->\n{content.strip()}\n<!-- /{mark} -->"
            fresh = re.sub(rf"<!-- {mark} -->(.*?<!-- /{mark} -->)?", lambda _, b=block: b, fresh, count=1, flags=re.S)
        stale += fresh != text
        if "--check" not in sys.argv and fresh != text:
            write_whole(page, fresh)
    return int("--check" in sys.argv and stale > 0)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        sys.exit(f"tables: {error}")
