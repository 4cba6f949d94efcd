"""What the tests of vLLM share: its answers, our chain's, and their comparison."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from recipes.scale import vllm_process

from msd import SpeculativeConfig, SpeculativeVLM, formats
from msd.bench.served import speculation
from msd.core.statistics import Statistics
from msd.formats.format import OURS

needs_vllm = pytest.mark.skipif(not vllm_process.INSTALLED.exists(), reason=vllm_process.MISSING)
patient = pytest.mark.timeout(3600)  # vLLM starts slowly where others use the cores
HEAD = vllm_process.ROOT / "weights" / "eagle3"
DRAFTED = 4  # tokens of a chain
NEAR = 0.05  # of a mean acceptance length


@dataclass(frozen=True)
class Run:
    """The answers of a run of vLLM, as token ids, and its figures of speculation; None: nothing was drafted."""

    answers: list[list[int]]
    figures: dict[str, Any] | None


def served(model: Path, prompts: Sequence[dict[str, Any]], *heads: dict[str, Any] | None, **more: Any) -> list[Run]:
    """A run of vLLM for each way of speculating. more: fields of the job; `engine` is added to the usual arguments."""
    engine = vllm_process.SETTINGS | {"model": str(model)} | more.pop("engine", {})
    job = {"engine": engine, "speculative": list(heads), "prompts": list(prompts)} | more
    runs = [run[0] for run in vllm_process.answers(job, more.pop("path", ""))["runs"]]
    return [Run([answer["ids"] for answer in run["rounds"][-1]], speculation(run["counts"])) for run in runs]


def head(folder: Path, method: str = "eagle3", tokens: int = DRAFTED) -> dict[str, Any]:
    """vLLM's way of speculating with an exported head."""
    return {"method": method, "model": str(folder), "num_speculative_tokens": tokens}


def chain(model: Any, processor: Any, folder: Path, tokens: int = DRAFTED) -> SpeculativeVLM:
    """Our engine with the same head, drafting chains of the same length."""
    network = formats.load(folder)
    settings = SpeculativeConfig(nodes=tokens, depth=tokens, width=1, adaptive=False, calibrate=False, backend="plain")
    return SpeculativeVLM(model, processor, settings, type(network).drafter(network))


def with_placeholders(folder: Path, out: Path) -> Path:
    """A copy of a head that reads the placeholder's embedding at image positions, as vLLM lets every head do."""
    shutil.copytree(folder, out)
    config = json.loads((out / "config.json").read_text())
    config[OURS]["placeholders"] = True
    (out / "config.json").write_text(json.dumps(config))
    return out


def acceptance(results: Sequence[Any]) -> float:
    """Our mean acceptance length as vLLM counts it: the last step of an answer may be cut by its end."""
    total = Statistics()
    for result in results:
        total.add(result.statistics)
    return 1 + total.num_accepted_draft_tokens / total.num_spec_steps
