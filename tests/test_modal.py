"""Acceptance by modality: counts on hand-made steps, and on real decodes against a simulation of them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
import tiny_checkpoint
from msd.bench import measure, modality, report
from msd.bench.data import Sample
from msd.bench.errors import pattern
from msd.cli import main
from msd.core.layout import Layout
from msd.core.modality import FUSION, LANGUAGE, VISION, get
from msd.core.statistics import RowStep
from msd.core.tree import DraftTree
from msd.labels.label_thresholds import ModalityThresholds
from msd.loading import load_target
from msd.model import SpeculativeVLM
from msd.planning.plan import Budget
from msd.result import Result
from msd.targets import State, Target
from msd.targets.registry import fingerprint
from random_drafter import RandomDrafter

L, V, F = LANGUAGE.id, VISION.id, FUSION.id
NEW = 24
OBJECTS = ["object"] * NEW  # kinds of words


def positions(errors: list[dict[str, Any]], kind: str = "drafted") -> Counter[tuple[int, int]]:
    """Counts by (modality id, depth). kind: "drafted" or "rejected"."""
    return Counter({(get(e["modality"]).id, e["depth"]): e[kind] for e in errors})


def test_counts_by_hand() -> None:
    labels = [L, V, V, L, F, F, V, L, L]
    steps = [
        RowStep(0, 1, 5, 2),  # tokens 1 and 2 accepted (V, V), token 3 rejected (L); tokens 4 and 5 do not count
        RowStep(0, 4, 1, 1),  # token 4 accepted (F), nothing below it was drafted
        RowStep(0, 6, 0, 0),  # nothing drafted
        RowStep(0, 7, 5, 2),  # tokens 7 and 8 accepted (L, L) and the answer ends: token 9 does not exist
    ]
    errors = pattern([(steps, labels, OBJECTS)])
    assert positions(errors) == Counter({(V, 1): 1, (V, 2): 1, (L, 3): 1, (F, 1): 1, (L, 1): 1, (L, 2): 1})
    assert modality.rates_by_depth(errors) == {
        "vision": [1.0, 1.0, None],
        "language": [1.0, 1.0, 0.0],
        "fusion": [1.0, None, None],
    }
    assert modality.rates(errors) == {"vision": 1.0, "language": 2 / 3, "fusion": 1.0}
    assert modality.counts(errors) == {"vision": 2, "language": 3, "fusion": 1}
    short = pattern([(steps, labels[:3], OBJECTS), (steps, [], OBJECTS)])
    assert modality.rates(short) == {"vision": 1.0, "language": None, "fusion": None}


def test_labels_end_at_the_first_difference() -> None:
    assert modality.labels_of_common_prefix([V, L, F], [5, 6, 7], [5, 6, 7]) == [V, L, F]
    assert modality.labels_of_common_prefix([V, L, F], [5, 6, 7], [5, 9, 7]) == [V]
    assert modality.labels_of_common_prefix([V, L], [5, 6, 7], [5, 6, 7]) == [V, L], "labels may end before the answer"
    assert modality.labels_of_common_prefix([V, L, F], [5, 6, 7], [5]) == [V]


class Guesses(RandomDrafter):
    """Drafts chains of guesses that depend only on the position: correct at two of three positions."""

    def guess(self, at: int, answer: Sequence[int]) -> int:
        return answer[at] if at % 3 and at < len(answer) else 63

    def _row(self, row: int, emitted: int, budget: Budget) -> tuple[list[int], list[int]]:
        assert budget.width == 1
        depth = min(budget.nodes, budget.depth[row])
        return [self.guess(emitted + i, self.answers[0]) for i in range(depth)], list(range(depth))


def greedy(model: Any, inputs: dict[str, torch.Tensor]) -> list[int]:
    return model.generate(**inputs, max_new_tokens=NEW)[0, inputs["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize("seed", range(4))
def test_acceptance_of_a_real_chain_equals_a_simulation(seed: int) -> None:
    model = tiny.llava(sharpness=10.0)
    inputs = tiny.llava_inputs(seed=seed)
    answer = greedy(model, inputs)
    labels = [int(i) for i in torch.randint(0, 3, (len(answer),), generator=torch.Generator().manual_seed(seed))]
    drafter = Guesses(0, 64, [answer])
    result = SpeculativeVLM(model, None, modality.CHAIN, drafter).generate(**inputs, max_new_tokens=NEW)
    assert isinstance(result, Result) and result.tokens == answer
    drafts: Counter[tuple[int, int]] = Counter()
    hits: Counter[tuple[int, int]] = Counter()
    at = 1  # the first token comes from prefill
    while at < len(answer):
        for level in range(6):
            if at == len(answer):
                break
            room = NEW - at  # the last token that fits is never drafted: the target gives it anyway
            drafted = level < min(5, room + level - 1)
            right = drafted and drafter.guess(at, answer) == answer[at]
            drafts[labels[at], level + 1] += drafted
            hits[labels[at], level + 1] += right
            at += 1
            if not right:
                break
    errors = pattern([(result.statistics.steps, labels, OBJECTS)])
    assert (+positions(errors), +(positions(errors) - positions(errors, "rejected"))) == (+drafts, +hits)
    assert sum(positions(errors).values()) >= len(answer) // 2


def looked_up(text: list[int], depth: int) -> list[int]:
    """The chain that prompt lookup drafts: at each level the heaviest continuation of all earlier occurrences."""
    found: dict[int, int] = {}  # end of an occurrence -> its longest match
    for n in (3, 2):
        for end in range(n, len(text)):
            if text[end - n : end] == text[-n:] and -1 not in text[-n:]:
                found.setdefault(end, n)
    chain: list[int] = []
    while len(chain) < depth:
        weights: Counter[int] = Counter()
        for end, n in found.items():
            if end + len(chain) < len(text) and text[end : end + len(chain)] == chain:
                weights[text[end + len(chain)]] += 4**n
        weights.pop(-1, None)
        if not weights:
            break
        chain.append(max(weights, key=lambda token: weights[token]))
    return chain


@pytest.mark.parametrize("seed", range(6))
def test_prompt_lookup_drafts_the_requested_chain(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.llava(vocab=12, seed=seed, sharpness=10.0)  # few words, many repetitions
    inputs = tiny.llava_inputs(seed=seed, vocab=12)
    chains: list[tuple[list[int], list[int]]] = []
    score = Target.score

    def recorded(self: Target, state: State, tree: DraftTree) -> Any:
        layout: Layout = state.layout
        text = layout.tokens[0, : layout.end[0]].where(layout.modality[0, : layout.end[0]] == L, -1).tolist()
        chains.append((text, tree.tokens[0, 1:].tolist()))
        assert tree.parents.tolist() == [list(range(-1, tree.size - 1))] and tree.size <= 6
        return score(self, state, tree)

    monkeypatch.setattr(Target, "score", recorded)
    result = SpeculativeVLM(model, None, modality.CHAIN, "prompt-lookup").generate(
        **inputs, max_new_tokens=NEW, eos_token_id=None
    )
    assert isinstance(result, Result)
    length = inputs["input_ids"].shape[1]
    for text, chain in chains:
        assert chain == looked_up(text, min(5, length + NEW - len(text) - 1))
    assert sum(len(chain) for _, chain in chains) > 0
    assert [s.first for s in result.statistics.steps] == [len(text) - length for text, _ in chains]
    assert [s.levels for s in result.statistics.steps] == [len(chain) for _, chain in chains]


def test_a_sampled_draft_is_a_chain_too() -> None:
    model, inputs = tiny.llava(vocab=12, sharpness=10.0), tiny.llava_inputs(vocab=12)
    vlm = SpeculativeVLM(model, None, modality.CHAIN, "prompt-lookup:sampled")
    result = vlm.generate(**inputs, max_new_tokens=NEW, eos_token_id=None, seed=0)
    assert isinstance(result, Result)
    assert sum(s.levels for s in result.statistics.steps) == result.statistics.num_draft_tokens > 0


def test_steps_of_a_batch_are_counted_row_by_row() -> None:
    model = tiny.llava(sharpness=10.0)
    rows = [tiny.llava_inputs(seed=s, words=w) for s, w in ((0, 8), (1, 12))]
    answers = [greedy(model, r) for r in rows]
    vlm = SpeculativeVLM(model, None, drafter=RandomDrafter(1, 64, answers))
    results = vlm.generate(**tiny.batch(*rows), max_new_tokens=NEW)
    assert isinstance(results, list)
    for row, result in enumerate(results):
        steps = [s for s in result.statistics.steps if s.row == row]
        at = 1
        for step in steps:
            assert step.first == at and step.accepted <= step.levels
            at += step.accepted + 1
        assert len(result.tokens) in (at, at - 1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("target")
    tiny_checkpoint.write(place)
    tiny_checkpoint.photos(place / "images", 2)
    return place


def samples(folder: Path) -> list[Sample]:
    photos = [folder / "images" / name for name in ("0.png", "1.png")]
    ask = "What is it? What is it? What"
    return [
        Sample((photos[0],), ask, None, "see"),
        Sample((photos[1],), ask, None, "see"),
        Sample((), ask, None, "say"),
    ]


def test_bench_measures_acceptance_by_modality(folder: Path) -> None:
    model, processor = load_target(folder)
    model.generation_config.eos_token_id = 2
    thresholds = ModalityThresholds(language_max=0.2, vision_min=0.9, tokens=9, target=fingerprint(model))
    methods = ["prompt-lookup"]
    results = measure.run(model, processor, samples(folder), methods, NEW, 0.0, lambda _: None, thresholds)
    rows = {(row["method"], row["task"]): row for row in results["rows"]}
    assert rows["ar", "all"]["acceptance_by_modality"] is None is rows["transformers", "all"]["coverage_by_modality"]
    for kind in ("acceptance", "coverage"):
        total, see, say = (rows["prompt-lookup", task]["positions_by_modality"][kind] for task in ("all", "see", "say"))
        assert total == {name: see[name] + say[name] for name in total}
        assert say["vision"] == say["fusion"] == 0, "without an image all is language"
        rates = rows["prompt-lookup", "all"][f"{kind}_by_modality"]
        assert {name: rate is None for name, rate in rates.items()} == {name: n == 0 for name, n in total.items()}
        assert all(rate is None or 0 <= rate <= 1 for rate in rates.values())
    assert sum(rows["prompt-lookup", "all"]["positions_by_modality"]["acceptance"].values()) > 0
    table = report.markdown(results)
    assert "coverage, vision / language / fusion" in table
    assert json.loads(json.dumps(results))["environment"]["modality_cuts"] == thresholds.model_dump()
    plain = measure.run(model, processor, samples(folder)[:1], methods, 4, 0.0, lambda _: None, warm=True)
    for row in plain["rows"]:
        assert (row["speedup_warm_vs_ar"] is None) == row["method"].startswith("transformers")
    assert all(row["acceptance_by_modality"] is None for row in plain["rows"])
    assert "coverage" not in report.markdown(plain)


def test_bench_refuses_thresholds_it_cannot_use(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    thresholds, data = tmp_path / "cuts.json", tmp_path / "data.jsonl"
    data.write_text('{"prompt": "What is it?"}\n')
    thresholds.write_text("{}")
    other = tmp_path / "other.json"
    ModalityThresholds(language_max=0.2, vision_min=0.9, tokens=9, target="another").save(other)
    common = ["bench", "--target", str(folder), "--data", str(data), "--max-new-tokens", "2", "--cuts"]
    for more, part in [
        ([str(thresholds)], "language_max"),
        ([str(tmp_path / "none.json")], "none.json"),
        ([str(other)], "another"),
        ([str(other), "--temperature", "1"], "--temperature"),
    ]:
        with pytest.raises(SystemExit) as stop:
            main([*common, *more])
        captured = capsys.readouterr()
        assert stop.value.code == 2 and captured.out == ""
        assert captured.err.startswith("msd: ") and captured.err.count("\n") == 1 and part in captured.err


def test_shipped_thresholds_belong_to_the_reference_model(reference_model: tuple[Any, Any]) -> None:
    thresholds = modality.find_label_thresholds("reference", None)
    if thresholds is not None:
        thresholds.check_target(fingerprint(reference_model[0]))
    assert modality.find_label_thresholds("some/folder", None) is None
