"""vLLM's `--speculative-config` means the same as our own options, or is refused in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import tiny_checkpoint
from training_command import run


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint.write(tmp_path_factory.mktemp("target"))


def test_ngram_is_prompt_lookup_of_the_given_depth(capsys: pytest.CaptureFixture[str], target: Path) -> None:
    ask = (
        "generate",
        "-p",
        "a b a b a b a b",
        "--target",
        target,
        "--max-new-tokens",
        24,
        "--backend",
        "plain",
        "--json",
    )
    own = json.loads(run(capsys, *ask, "--method", "ar")[1])
    config = json.dumps({"method": "ngram", "num_speculative_tokens": 2})
    code, out, err = run(capsys, *ask, "--speculative-config", config)
    assert code == 0, err
    answer = json.loads(out)
    assert answer["method"] == "prompt-lookup" and answer["num_spec_tokens"] <= 2
    assert answer["tokens"] == own["tokens"]
    same = json.loads(
        run(capsys, *ask, "--speculative-config", json.dumps({"method": "draft_model", "model": str(target)}))[1]
    )
    assert same["method"] == "draft-model" and same["tokens"] == own["tokens"]


@pytest.mark.parametrize(
    ("config", "part"),
    [
        ("ngram", "no JSON object"),
        ('{"method": "suffix"}', "method 'suffix' has no meaning here"),
        ('{"method": "ngram", "prompt_lookup_max": 4}', "'prompt_lookup_max' has no meaning here"),
        ('{"method": "ngram", "num_speculative_tokens": 9}', "from 1 to 8, got 9"),
        ('{"method": "ngram", "num_speculative_tokens": true}', "from 1 to 8, got True"),
        ('{"method": "ngram", "model": "x"}', "method 'ngram' takes no model"),
        ('{"method": "eagle3"}', "'model' is missing"),
        ('{"method": 3}', "are text"),
    ],
)
def test_what_has_no_meaning_is_refused(
    capsys: pytest.CaptureFixture[str], target: Path, config: str, part: str
) -> None:
    code, _, err = run(capsys, "generate", "-p", "what", "--target", target, "--speculative-config", config)
    assert code == 2 and err.startswith("msd: --speculative-config") and err.count("\n") == 1 and part in err


def test_it_stands_alone(capsys: pytest.CaptureFixture[str], target: Path) -> None:
    config = '{"method": "ngram"}'
    code, _, err = run(
        capsys, "generate", "-p", "w", "--target", target, "--method", "ar", "--speculative-config", config
    )
    assert code == 2 and "leave them out" in err
