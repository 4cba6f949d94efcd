"""Measures what a draft costs: `python -m recipes.floors.drafts results`.

The methods describe bundled photos in turn with `ar`. Every draft has all levels of its method. Times are real, so the
machine should do nothing else; operators and reads by the host are counted in runs of their own. About three minutes.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from msd import SpeculativeConfig, SpeculativeVLM
from msd.loading import load_target
from msd.reference import sample_photos
from msd.system import machine
from msd.system.files import write_whole

METHODS = ("msd", "msd:ar", "standard", "eagle2", "eagle3", "vispec", "dflash", "dspark")
BLOCKS = ("msd", "dflash", "dspark")  # draft all levels in one pass
PROMPT, TOKENS = "Describe the image in detail.", 48
READS = ("_local_scalar_dense", "nonzero", "equal")  # operators that wait for a tensor's values


class Operators(TorchDispatchMode):
    """Counts operators, views included, and reads of values by the host."""

    def __init__(self) -> None:
        super().__init__()
        self.operators = self.reads = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operators += 1
        self.reads += func.overloadpacket.__name__ in READS
        return func(*args, **(kwargs or {}))

    def __enter__(self) -> Operators:
        plain = self._tolist = Tensor.tolist

        def tolist(tensor: Tensor) -> Any:
            self.reads += 1
            return plain(tensor)

        Tensor.tolist = tolist  # type: ignore[method-assign]
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        Tensor.tolist = self._tolist  # type: ignore[method-assign]


def engine(model: Any, processor: Any, method: str) -> SpeculativeVLM:
    """An engine that drafts in every step, to the full depth of its method."""
    vlm = SpeculativeVLM(model, processor, SpeculativeConfig(frozen_weights=True), method)
    cost = getattr(vlm.drafter, "cost", None)
    if cost is not None:
        vlm.plan.learn = lambda *_: None  # type: ignore[method-assign]
        cost.levels = lambda deepest, *_: deepest
    return vlm


def watched(vlm: SpeculativeVLM, photo: Path, call: Callable[..., Any]) -> list[int]:
    """Describes a photo; each draft runs through `call(propose, *arguments)`. Returns the tokens."""
    propose = vlm.drafter.propose
    vlm.drafter.propose = lambda *args: call(propose, *args)  # type: ignore[method-assign]
    try:
        return list(vlm.generate(photo, PROMPT, max_new_tokens=TOKENS, do_sample=False).tokens)
    finally:
        del vlm.drafter.propose


def counted(vlm: SpeculativeVLM, photo: Path) -> dict[str, float]:
    """Operators and reads of a draft, medians of all but the first, which reads the prompt."""
    counts: list[tuple[int, int]] = []

    def call(propose: Callable[..., Any], *args: Any) -> Any:
        with Operators() as mode:
            tree = propose(*args)
        if tree.height:
            counts.append((mode.operators, mode.reads))
        return tree

    watched(vlm, photo, call)
    operators, reads = zip(*counts[1:], strict=True)
    return {"operators": median(operators), "reads": median(reads)}


def timed(vlm: SpeculativeVLM, photo: Path) -> tuple[list[float], list[int]]:
    """Milliseconds of each draft but the first, and the tokens."""
    found: list[float] = []

    def call(propose: Callable[..., Any], *args: Any) -> Any:
        start = time.perf_counter()
        tree = propose(*args)
        if tree.height:
            found.append(1000 * (time.perf_counter() - start))
        return tree

    tokens = watched(vlm, photo, call)
    return found[1:], tokens


def passes(vlm: SpeculativeVLM, photo: Path) -> tuple[list[float], list[int]]:
    """Milliseconds of each one-row pass of plain decoding, and the tokens."""
    found: list[float] = []
    score = vlm.target.score

    def scored(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        out = score(*args, **kwargs)
        found.append(1000 * (time.perf_counter() - start))
        return out

    vlm.target.score = scored  # type: ignore[method-assign]
    try:
        return found, list(vlm.generate(photo, PROMPT, max_new_tokens=TOKENS, do_sample=False).tokens)
    finally:
        del vlm.target.score


def run(methods: list[str], photos: list[Path], rounds: int) -> dict[str, Any]:
    """All measurements."""
    model, processor = load_target("reference")
    plain = SpeculativeVLM(model, processor, SpeculativeConfig(frozen_weights=True), "ar")
    engines = {name: engine(model, processor, name) for name in methods}
    rows: dict[str, dict[str, Any]] = {name: counted(vlm, photos[0]) for name, vlm in engines.items()}
    drafts: dict[str, list[float]] = {name: [] for name in methods}
    levels: dict[str, list[float]] = {name: [] for name in methods}
    single: list[float] = []
    identical = True
    for photo in photos * rounds:
        ms, answer = passes(plain, photo)
        single += ms
        for name, vlm in engines.items():
            ms, tokens = timed(vlm, photo)
            drafts[name] += ms
            levels[name].append(1000 * vlm.drafter.cost.seconds)
            identical &= tokens == answer
    one = median(single)
    for name, row in rows.items():
        row |= {"draft_ms": median(drafts[name]), "level_ms": median(levels[name]), "block": name in BLOCKS}
        row |= {"draft_of_pass": row["draft_ms"] / one, "level_of_pass": row["level_ms"] / one}
    return {"pass_ms": one, "identical": identical, "methods": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--photos", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=2)
    args = parser.parse_args()
    quiet, found = machine.quietly(lambda: run(args.methods, sample_photos()[: args.photos], args.rounds))
    environment = {
        "cpu": machine.processor(), "threads": torch.get_num_threads(), "torch": torch.__version__, "quiet": quiet,
    }  # fmt: skip
    args.out.mkdir(parents=True, exist_ok=True)
    write_whole(args.out / "drafts.json", json.dumps({"environment": environment, **found}, indent=1) + "\n")
    print(f"one-row pass {found['pass_ms']:.1f} ms, answers identical: {found['identical']}, quiet: {quiet}")
    for name, row in found["methods"].items():
        print(
            f"{name:9} {row['operators']:.0f} operators, {row['reads']:.0f} reads, draft {row['draft_ms']:.2f} ms = "
            f"{row['draft_of_pass']:.1%} of a pass, level {row['level_ms']:.2f} ms = {row['level_of_pass']:.1%}"
        )


if __name__ == "__main__":
    main()
