"""First use: quiet commands, uncut tables, pages with draft trees, and short answers that cost no drafting."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

import rivals
import tiny
import tiny_checkpoint
from bench_environment import ENVIRONMENT
from msd import drafters
from msd.bench import timing
from msd.certify.certificate import Row
from msd.cli import app, bench, demo, verify
from msd.config import SpeculativeConfig
from msd.core.tree import DraftTree, Scores
from msd.drafters import Drafter
from msd.drafters.algorithms import eventgpt as eventgpt_module
from msd.drafters.algorithms import prompt_lookup
from msd.drafters.algorithms.combined import Combined
from msd.drafters.algorithms.eventgpt import EventGPT, EventGPTDrafter, VocabularyMap
from msd.drafters.algorithms.msd import MSD, MSDConfig, MSDNetwork
from msd.drafters.algorithms.prompt_lookup import Repeats
from msd.drafters.toolkit import drafter as toolkit_memory
from msd.drafters.toolkit.drafter import DecodedStates, TrainedDrafter
from msd.model import SpeculativeVLM
from msd.planning.plan import Governor
from msd.targets import State, adapt
from training_command import run

MODEL = tiny.llava()
WIDE = 80
INPUTS = tiny.llava_inputs(1, images=1)


def network() -> MSDNetwork:
    torch.manual_seed(0)
    made = MSDNetwork(MSDConfig.for_target(MODEL.config.text_config, 60, rank=4, parent_rank=8))
    made.heads.ids = torch.arange(4, 64)
    return made.attach(MODEL).eval()


def eventgpt() -> EventGPTDrafter:
    text = MODEL.config.text_config
    torch.manual_seed(0)
    return EventGPTDrafter(EventGPT.for_text(text), None, VocabularyMap.identity(text.vocab_size))


# ---------------------------------------------------------------- what is written


def test_timing_the_kernels_writes_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    """`torch.profiler` would write two lines per pass from C++, past `sys.stderr`."""
    shares = timing.outside_kernels(adapt(MODEL, backend="plain"))
    assert shares is not None and set(shares) == {"1", "9"} and all(0 <= share < 1 for share in shares.values())
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "")


def whole(text: str, *words: str) -> None:
    """Asserts that the text fits a terminal, is not cut, and holds every word."""
    assert "…" not in text and max(map(len, text.splitlines())) <= WIDE
    for word in words:
        assert word in text, word


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(WIDE))


def test_the_demos_table_is_whole(capsys: pytest.CaptureFixture[str], narrow: None) -> None:
    names = [method.name for method in drafters.catalogue()]
    figures = {"speedup_vs_transformers": 12.34, "tokens_per_second": 123.4, "mean_acceptance_length": 12.34}
    results = {"rows": [{"method": name, "task": "all", "identical": 1.0, **figures} for name in names]}
    demo._show(results, Console())
    whole(capsys.readouterr().out, *names, "mean acceptance", "12.34x")


def test_the_benchmarks_table_is_whole(
    capsys: pytest.CaptureFixture[str], narrow: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A terminal gets a table, a pipe Markdown, and `--json` gives JSON."""
    names = ["transformers:prompt-lookup", *(method.name for method in drafters.catalogue())]
    figures = {
        "samples": 9, "speedup_vs_ar": 1.23, "speedup_vs_ar_interval": [1.01, 1.45],
        "speedup_vs_ar_paired_median": 1.18, "speedup_vs_transformers": 12.34, "tokens_per_second": 123.4,
        "mean_acceptance_length": 2.34, "identical": 1.0,
    }  # fmt: skip
    rows = [{"method": name, "task": task, **figures} for task in ("all", "vqa") for name in names]
    rows[1]["identical"] = 0.5
    bench._print({"environment": ENVIRONMENT, "rows": rows}, None, False)
    assert "| method | vs `ar` |" in (piped := capsys.readouterr().out) and "1.18" in piped
    monkeypatch.setenv("TERM", "dumb")  # without colours
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    bench._print({"environment": ENVIRONMENT, "rows": rows}, tmp_path, False)
    shown = capsys.readouterr().out
    whole(shown.replace(str(tmp_path), "OUT"), *names, "1.01–1.45", "1.18", "123.40", "all, except", "OUT/report.md")
    assert shown.count("msd+eagle3") == 1 and "|" not in shown
    bench._print({"environment": ENVIRONMENT, "rows": rows}, tmp_path, True)
    assert len(json.loads(capsys.readouterr().out)["rows"]) == len(rows)


def test_the_certificates_table_is_whole(capsys: pytest.CaptureFixture[str], narrow: None) -> None:
    names = [method.name for method in drafters.catalogue()]
    verify._show([Row(name, 1000, 998, [1.2e-5, 9.9e-5], [], [0.123]) for name in names], as_json=False)
    whole(capsys.readouterr().out, *names, "9.9e-05", "0.123", "1000")


def test_the_other_tables_are_whole(capsys: pytest.CaptureFixture[str], narrow: None) -> None:
    code, out, err = run(capsys, "targets")
    assert code == 0, err
    table = out.split("Tested for each")[0]
    whole(table, "LLaVA-OneVision", "mistral-common", "PaliGemma 1 and 2", "qwen2_5_vl")
    code, out, err = run(capsys, "estimate", "--target", "llava-1.5-7b", "--acceptance", "60=4.7")
    assert code == 0, err
    table = "\n".join(line for line in out.splitlines() if not line.startswith(("llava", "prefill,", "τ was", "The")))
    whole(table, "prefill", "tokens/s", "answer")


def test_help_is_quick_and_whole() -> None:
    told = CliRunner().invoke(app, ["--help"], env={"COLUMNS": str(WIDE)}).output
    assert "generate" in told and "..." not in told.split("Commands:")[1]
    heavy = "import sys, msd.cli; print(sorted({'torch', 'transformers', 'scipy', 'matplotlib'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", heavy], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# ---------------------------------------------------------------- msd inspect


def test_inspect_drafts_whatever_the_governor_says(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Governor, "drafts", lambda self: False)
    target = tiny_checkpoint.write(tmp_path / "target")
    page, asked = tmp_path / "page.html", "say it again, say it again, say it"
    code, _, err = run(
        capsys, "inspect", "-p", asked, "--target", target, "--method", "prompt-lookup", "-o", page,
        "--max-new-tokens", 24,
    )  # fmt: skip
    assert code == 0, err
    text = page.read_text(encoding="utf-8")
    assert text.count('class="step"') and text.count('class="yes"') + text.count('class="no"') > 0


# ---------------------------------------------------------------- a short answer costs the drafter nothing


def methods() -> dict[str, Drafter]:
    """One drafter of every kind that reads prompts."""
    made = network()
    found: dict[str, Drafter] = {
        "msd": MSD(made),
        "repeats": Repeats(MSD(made)),
        "combined": Combined(rivals.network(MODEL, "eagle3"), made),
        "eagle2": TrainedDrafter(rivals.network(MODEL, "eagle2")),
        "prompt-lookup": prompt_lookup.PromptLookup(),
        "eventgpt": eventgpt(),
    }
    return found


@pytest.fixture
def readings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A list that grows by one each time a drafter reads a prompt."""
    found: list[str] = []
    begins = toolkit_memory.Memory.begin.__func__, eventgpt_module.begin  # type: ignore[attr-defined]

    def noted(begin: Any, *args: Any, **kwargs: Any) -> Any:
        found.append(begin.__module__)
        return begin(*args, **kwargs)

    monkeypatch.setattr(toolkit_memory.Memory, "begin", classmethod(partial(noted, begins[0])))
    monkeypatch.setattr(eventgpt_module, "begin", partial(noted, begins[1]))
    read = prompt_lookup.PromptLookup._read

    def indexed(self: prompt_lookup.PromptLookup, state: State) -> None:
        found.append("prompt_lookup")
        read(self, state)

    monkeypatch.setattr(prompt_lookup.PromptLookup, "_read", indexed)
    return found


def answer(drafter: Drafter, tokens: int, **settings: Any) -> Any:
    engine = SpeculativeVLM(MODEL, None, SpeculativeConfig(backend="plain", label=True, **settings), drafter)
    return engine.generate(**INPUTS, max_new_tokens=tokens, do_sample=False, suppress_tokens=[tiny.IMAGE])


@pytest.mark.parametrize("name", methods())
def test_a_drafter_reads_no_prompt_for_a_short_answer(name: str, readings: list[str]) -> None:
    """One token needs no draft, and the second comes from the target; labels exist nevertheless."""
    drafter = methods()[name]
    for tokens in (1, 2):
        given = answer(drafter, tokens)
        assert len(given.tokens) == tokens and readings == [], name
        if name in ("msd", "repeats", "combined") and tokens == 2:
            assert given.predicted_modality[0] is None and given.predicted_modality[1] is not None
    plain = answer(drafters.create("ar"), 12)
    assert answer(drafter, 12, adaptive=False).tokens == plain.tokens and readings


@pytest.mark.parametrize("name", [n for n in methods() if n != "eventgpt"])
def test_a_paused_governor_costs_no_reading(name: str, readings: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Governor, "drafts", lambda self: False)
    given = answer(methods()[name], 12)
    assert len(given.tokens) == 12 and given.statistics.num_draft_tokens == 0 and readings == []


def test_a_prompt_can_be_read_late() -> None:
    """A drafter that starts late drafts the same trees as one that started at once."""
    for name, drafter in methods().items():
        trees: dict[bool, list[list[int]]] = {}
        for late in (False, True):
            steps: list[list[int]] = []
            engine = SpeculativeVLM(MODEL, None, SpeculativeConfig(backend="plain", adaptive=False, width=1), drafter)
            budget = engine.plan.budget

            def limited(*arguments: Any, late: bool = late, budget: Any = budget, steps: Any = steps) -> Any:
                given = budget(*arguments)
                hold = late and len(steps) < 3
                return replace(given, nodes=0, depth=[0] * len(given.depth)) if hold else given

            propose = drafter.propose

            def noting(state: State, b: Any, s: Any, propose: Any = propose, steps: Any = steps) -> DraftTree:
                tree: DraftTree = propose(state, b, s)
                steps.append([int(state.layout.end[0]), *tree.tokens[0].tolist()])
                return tree

            engine.plan.budget = limited  # type: ignore[method-assign]
            drafter.propose = noting  # type: ignore[method-assign]
            engine.generate(**INPUTS, max_new_tokens=12, do_sample=False, suppress_tokens=[tiny.IMAGE])
            del drafter.propose
            trees[late] = steps
        drafted = {step[0]: step for step in trees[True] if len(step) > 2}
        same = [step for step in trees[False] if step[0] in drafted and step == drafted[step[0]]]
        both = [step for step in trees[False] if step[0] in drafted and len(step) > 2]
        assert same == both and (both or name == "prompt-lookup"), name


def test_the_newest_state_is_known_after_it_was_read() -> None:
    """`msd+NAME` routes by the newest hidden state, not by the last one of the prompt."""
    made = Combined(rivals.network(MODEL, "eagle3"), network())
    seen: list[torch.Tensor] = []
    observe, routers = DecodedStates.observe, Combined._router_states
    asked: list[tuple[int, torch.Tensor]] = []

    def noting(self: DecodedStates, scores: Scores, accepted: Any) -> None:
        observe(self, scores, accepted)
        assert scores.taps is not None
        seen.append(scores.taps[0, [0, *accepted.nodes[0]][len(accepted.tokens[0]) - 1]])

    def routing(self: Combined, state: State) -> torch.Tensor:
        found = routers(self, state)
        asked.append((len(seen), found))
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DecodedStates, "observe", noting)
        patch.setattr(Combined, "_router_states", routing)
        answer(made, 16, adaptive=False)
    part = made._select(made.msd.taps)
    later = [(n, found) for n, found in asked if n]
    assert len(later) > 4
    for n, found in later:
        torch.testing.assert_close(found[0], part(seen[n - 1]))


def test_labels_change_no_answer() -> None:
    for drafter in (MSD(network()), Repeats(MSD(network()))):
        labelled = answer(drafter, 12)
        engine = SpeculativeVLM(MODEL, None, SpeculativeConfig(backend="plain"), drafter)
        plain = engine.generate(**INPUTS, max_new_tokens=12, do_sample=False, suppress_tokens=[tiny.IMAGE])
        assert plain.tokens == labelled.tokens and plain.predicted_modality is None
        assert labelled.predicted_modality[1:].count(None) == 0
