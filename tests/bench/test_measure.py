"""Rows of a benchmark: batches give the answers of single prompts, and unknown figures stay empty."""

from __future__ import annotations

import pytest
import torch

import tiny_checkpoint
from msd.bench import measure, report
from msd.bench.data import Sample
from msd.bench.timing import LIBRARY, Run, early_exit_assistant, time_library, until
from msd.core.statistics import RowStep, Statistics
from msd.loading import load_target

NEW = 10


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> list[Sample]:
    place = tmp_path_factory.mktemp("target")
    tiny_checkpoint.write(place)
    tiny_checkpoint.photos(place / "images", 2)
    photo = place / "images" / "0.png"
    ask = ["What is it?", "What is it? What is it doing?", "Where?", "What is it? Where is it? What"]
    about = [Sample((photo,), words, None, "see") for words in ask[:3]]
    return [about[0], Sample((), ask[3], None, "say"), about[1], Sample((), ask[0], None, "say"), about[2]]


def test_batches_answer_as_single_prompts(samples: list[Sample]) -> None:
    model, processor = load_target(samples[0].images[0].parents[1])
    model.generation_config.eos_token_id = 2
    rows = {}
    for batch in (1, 2):
        results = measure.run(model, processor, samples, ["prompt-lookup"], NEW, 0.0, lambda _: None, batch=batch)
        assert results["environment"]["batch"] == batch
        rows[batch] = {(r["method"], r["task"]): r for r in results["rows"]}
    for key, row in rows[2].items():
        single = rows[1][key]
        assert (row["samples"], row["tokens"], row["identical"]) == (single["samples"], single["tokens"], 1.0)
        assert (row["speedup_decode_only"] is None) == (key[0] == "transformers")
    assert rows[1]["ar", "see"]["samples"] == 3 and rows[1]["ar", "say"]["samples"] == 2
    for (method, task), row in rows[1].items():
        plain = [rows[1][name, task]["seconds"] for name in ("ar", "transformers")]
        assert row["best_plain"] == ("ar" if plain[0] <= plain[1] else "transformers")
        assert row["speedup_vs_best_plain"] == pytest.approx(min(plain) / row["seconds"])
        low, high = row["speedup_vs_best_plain_interval"]
        assert low <= row["speedup_vs_best_plain"] + 1e-9 and row["speedup_vs_best_plain"] <= high + 1e-9
        counted = not method.startswith("transformers:")
        assert (row["target_passes"] is not None) == counted
        engine = row["speculative_decoding"]  # under vLLM's names
        if engine is not None:
            steps, accepted = engine["num_spec_steps"], engine["num_accepted_draft_tokens"]
            assert steps == row["target_passes"] == sum(engine["acceptance_histogram"].values())
            assert accepted == sum(int(n) * count for n, count in engine["acceptance_histogram"].items())
            assert engine["draft_acceptance_rate"] == pytest.approx(accepted / engine["num_draft_tokens"])
    assert any(row["speculative_decoding"] for row in results["rows"])


def test_a_sampled_batch_is_not_compared_with_the_library(samples: list[Sample]) -> None:
    model, processor = load_target(samples[0].images[0].parents[1])
    for batch, known in ((1, True), (2, False)):
        results = measure.run(model, processor, samples[:3], [], NEW, 1.0, lambda _: None, batch=batch)
        assert {row["identical"] is not None for row in results["rows"]} == {known}


def test_a_library_method_that_refuses_the_model_is_named(
    samples: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, processor = load_target(samples[0].images[0].parents[1])
    monkeypatch.setitem(LIBRARY, "transformers:broken", lambda _: {"no_such_setting": 1})
    results = measure.run(model, processor, samples[:2], [], 4, 0.0, lambda _: None)
    environment = results["environment"]
    assert "no_such_setting" in environment["not_run"]["transformers:broken"]
    assert "transformers:broken" not in {row["method"] for row in results["rows"]}
    assert set(environment["outside_kernels"]) == {"1", "9"}
    assert all(0 <= share < 1 for share in environment["outside_kernels"].values())
    assert "`transformers:broken` does not run here" in report.markdown(results)


def test_groups_are_of_one_task_and_in_order(samples: list[Sample]) -> None:
    assert measure._grouped(samples, 1) == [[0], [1], [2], [3], [4]]
    assert measure._grouped(samples, 2) == [[0, 2], [1, 3], [4]]


def test_padding_is_no_answer(samples: list[Sample]) -> None:
    assert until([5, 6, 2, 0, 0], {2}) == [5, 6, 2]
    assert until([5, 6], {2}) == [5, 6]
    model, _ = load_target(samples[0].images[0].parents[1])
    inputs = {"input_ids": torch.tensor([[5, 6], [7, 8]]), "attention_mask": torch.ones(2, 2, dtype=torch.long)}
    run = time_library(model, inputs, {"max_new_tokens": 4, "do_sample": False}, seed=0)
    assert len(run.answers) == 2 and run.prefill is None and run.tokens == sum(map(len, run.answers))


def test_steps_of_a_batch_go_to_their_rows() -> None:
    steps = [RowStep(0, 1, 2, 1), RowStep(1, 1, 2, 0), RowStep(0, 3, 2, 2)]
    run = Run([[5, 6, 7], [8]], 1.0, None, Statistics(steps=steps))
    assert list(run.by_row()) == [([steps[0], steps[2]], [5, 6, 7]), ([steps[1]], [8])]


def test_the_assistant_has_the_first_layers_of_the_target(samples: list[Sample]) -> None:
    model, processor = load_target(samples[0].images[0].parents[1])
    layers = len(model.get_decoder().layers)
    assistant = early_exit_assistant(model)
    assert len(assistant.get_decoder().layers) == max(1, layers // 3)
    assert len(model.get_decoder().layers) == model.config.get_text_config().num_hidden_layers == layers
    own = dict(model.named_parameters())
    assert all(parameter is own[name] for name, parameter in assistant.named_parameters())
    results = measure.run(model, processor, samples[:2], [], NEW, 0.0, lambda _: None)
    row = next(r for r in results["rows"] if r["method"] == "transformers:assisted")
    assert row["identical"] == 1.0 and row["speedup_decode_only"] is None
