"""The output of the commands on the reference model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import rivals
from msd.bench.data import BUNDLED
from msd.cli import main
from msd.cli.options import method_names

PUPPY = str(BUNDLED / "puppy.jpg")
pytestmark = pytest.mark.slow


def output(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """stdout of a call that succeeds."""
    with pytest.raises(SystemExit) as stop:
        main(list(arguments))
    captured = capsys.readouterr()
    assert stop.value.code == 0, captured.err
    return captured.out


def as_json(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    return json.loads(output(capsys, *arguments, "--json"))


def test_generate_streams_what_json_reports(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("generate", PUPPY, "-p", "Describe the image in detail.", "--max-new-tokens", "24")
    answer = as_json(capsys, *arguments)
    assert {"text", "tokens", "seconds", "tokens_per_second", "mean_acceptance_length", "method"} <= answer.keys()
    assert "acceptance_by_modality" in answer and len(answer["tokens"]) == 24
    assert output(capsys, *arguments) == answer["text"] + "\n"


def test_generate_samples_by_seed(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("generate", PUPPY, "-p", "What is it?", "--temperature", "1.5", "--max-new-tokens", "12", "--seed")
    first = as_json(capsys, *arguments, "3")["tokens"]
    assert as_json(capsys, *arguments, "3")["tokens"] == first
    assert as_json(capsys, *arguments, "4")["tokens"] != first


def test_generate_takes_no_or_several_images(capsys: pytest.CaptureFixture[str]) -> None:
    text_only = as_json(capsys, "generate", "-p", "What is the capital of France?", "--max-new-tokens", "8")
    assert "Paris" in text_only["text"]
    skier = str(BUNDLED / "skier.jpg")
    assert as_json(capsys, "generate", PUPPY, skier, "-p", "What is there?", "--max-new-tokens", "4")["tokens"]


# from weights/, which the wheel has not
IN_CHECKOUTS = (*rivals.RIVALS, "msd+dspark", "msd+eagle3", "msd:30min", "msd:ar", "standard")


def test_verify(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("verify", "--limit", "2", "--max-new-tokens", "6", "--draws", "1000")
    rows = {row["method"]: row for row in as_json(capsys, *arguments)["rows"]}
    assert rows.keys() == {
        "ar",
        "prompt-lookup",
        "prompt-lookup:sampled",
        "msd",
        "msd:sampled",
        "msd:subtrees",
        "msd+prompt-lookup",
        *IN_CHECKOUTS,
    }
    for row in rows.values():
        assert row["passed"] and row["identical"] + row["ties"] == row["compared"]
    assert rows["ar"]["compared"] == 12 and rows["prompt-lookup:sampled"]["compared"] == 2
    assert rows["prompt-lookup:sampled"]["p_values"] and not rows["ar"]["p_values"]


def test_verify_audits_other_engines(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    arguments = ("-p", "What animal is this?", "--max-new-tokens", "6")
    answer = as_json(capsys, "generate", PUPPY, *arguments, "--method", "ar")
    line = {"image": "puppy.jpg", "prompt": "What animal is this?"}
    right = [{**line, "tokens": answer["tokens"]}, {**line, "text": answer["text"]}]
    file = tmp_path / "outputs.jsonl"
    file.write_text("\n".join(map(json.dumps, right)))
    audit = ("verify", "--outputs", str(file), "--images", str(BUNDLED), "--json")
    assert json.loads(output(capsys, *audit))["rows"][0]["identical"] == 2
    wrong = [*answer["tokens"]]
    wrong[0] += 1
    file.write_text(json.dumps({**line, "tokens": wrong}))
    with pytest.raises(SystemExit) as stop:
        main(list(audit))
    captured = capsys.readouterr()
    assert stop.value.code == 2 and "not lossless" in captured.err
    assert not json.loads(captured.out)["rows"][0]["passed"]


def test_a_greedy_benchmark_leaves_out_sampled_forms() -> None:
    sampled, greedy = (method_names("all", "reference", greedy) for greedy in (False, True))
    assert set(sampled) - set(greedy) == {"msd:sampled", "prompt-lookup:sampled"}
    assert method_names("msd:sampled", "reference", greedy=True) == ["msd:sampled"]


def test_bench(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    arguments = ("bench", "--limit", "2", "--max-new-tokens", "8", "--method", "prompt-lookup", "--out", str(tmp_path))
    results = as_json(capsys, *arguments)
    assert json.loads((tmp_path / "results.json").read_text()) == results
    assert "prompt-lookup" in (tmp_path / "report.md").read_text()
    rows = {row["method"]: row for row in results["rows"] if row["task"] == "all"}
    assert list(rows) == ["transformers", "transformers:assisted", "ar", "prompt-lookup"]
    assert rows["ar"]["speedup_vs_ar"] == 1.0 and rows["transformers"]["speedup_vs_transformers"] == 1.0
    for row in rows.values():
        assert row["identical"] == 1.0 and row["samples"] == 2 and row["tokens_per_second"] > 0
    assert {"mean_acceptance_length", "tau_without_bonus", "prefill_s", "draft_s", "verify_s", "host_s"} <= rows[
        "ar"
    ].keys()


def test_demo(capsys: pytest.CaptureFixture[str]) -> None:
    results = as_json(capsys, "demo", "--max-new-tokens", "8", "--runs", "1")
    assert {row["method"] for row in results["rows"]} == {"transformers", "ar", "msd+prompt-lookup"}
    (msd,) = (row for row in results["rows"] if row["method"] == "msd+prompt-lookup" and row["task"] == "all")
    assert msd["identical"] == 1.0 and msd["mean_acceptance_length"] > 1.5
