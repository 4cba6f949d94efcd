"""Statistics: counts under vLLM's names."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import pytest
import torch

import tiny
from msd.core.statistics import Statistics
from msd.core.tree import Accepted, DraftTree
from msd.model import SpeculativeVLM
from msd.result import Result
from msd.targets import Target
from random_drafter import RandomDrafter

NEW = 20


def test_counts_by_hand() -> None:
    statistics = Statistics()
    tree = DraftTree.from_lists(torch.zeros(3, dtype=torch.long), [[1, 2, 3], [4], [5, 6]], [[0, 1, 1], [0], [0, 0]])
    statistics.count(tree, Accepted([[1, 3], [], []], [[1, 3, 9], [8], []]))  # the third row had finished
    assert statistics.num_spec_steps == 2
    assert statistics.num_draft_tokens == 4
    assert statistics.num_spec_tokens == 2, "levels of the deepest tree"
    assert statistics.num_accepted_draft_tokens == 2
    assert statistics.num_emitted_tokens == 4
    assert statistics.acceptance_histogram == Counter({2: 1, 0: 1})
    assert statistics.mean_acceptance_length == 2.0
    assert statistics.tau_without_bonus == 1.0
    assert statistics.draft_acceptance_rate == 0.5
    other = Statistics()
    other.add(statistics)
    other.add(statistics)
    assert (other.num_spec_steps, other.mean_acceptance_length) == (4, 2.0)
    assert other.acceptance_histogram == Counter({2: 2, 0: 2}) and other.num_spec_tokens == 2


def test_empty_statistics_are_zero() -> None:
    empty = Statistics()
    assert (empty.mean_acceptance_length, empty.tau_without_bonus, empty.draft_acceptance_rate) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize("images", [0, 1])
def test_counts_agree_with_the_target_passes_and_the_tokens(images: int, monkeypatch: pytest.MonkeyPatch) -> None:
    passes: list[int] = []
    score = Target.score

    def counted(self: Target, state: Any, tree: DraftTree) -> Any:
        passes.append(tree.size - 1)
        return score(self, state, tree)

    monkeypatch.setattr(Target, "score", counted)
    model = tiny.llava(sharpness=10.0)
    inputs = tiny.llava_inputs(images=images)
    wanted = model.generate(**inputs, max_new_tokens=NEW, eos_token_id=None)[0, inputs["input_ids"].shape[1] :].tolist()
    vlm = SpeculativeVLM(model, None, drafter=RandomDrafter(2, 64, [wanted]))
    result = vlm.generate(**inputs, max_new_tokens=NEW, eos_token_id=None)
    assert isinstance(result, Result)
    statistics = result.statistics
    assert statistics.num_spec_steps == len(passes) < NEW - 1
    assert statistics.num_draft_tokens == sum(passes)
    assert statistics.num_emitted_tokens == len(result.tokens) - 1, "the first token comes from prefill"
    # every step emits its accepted drafts and one more token, unless the answer ends on a draft
    bonus = statistics.num_emitted_tokens - statistics.num_accepted_draft_tokens
    assert bonus in (len(passes), len(passes) - 1)
    assert sum(statistics.acceptance_histogram.values()) == len(passes)
    assert sum(k * n for k, n in statistics.acceptance_histogram.items()) == statistics.num_accepted_draft_tokens > 0


def test_plain_decoding_has_a_mean_acceptance_length_of_one() -> None:
    result = SpeculativeVLM(tiny.llava(), None, drafter="ar").generate(**tiny.llava_inputs(), max_new_tokens=9)
    assert isinstance(result, Result)
    assert result.statistics.mean_acceptance_length == 1.0
    assert result.statistics.num_draft_tokens == 0


def test_a_result_is_json_ready_and_its_times_add_up() -> None:
    result = SpeculativeVLM(tiny.llava(), None).generate(**tiny.llava_inputs(), max_new_tokens=9, eos_token_id=None)
    assert isinstance(result, Result)
    data = json.loads(json.dumps(result.as_dict()))
    assert data["tokens"] == result.tokens
    assert data["method"] == "prompt-lookup"
    names = {"mean_acceptance_length", "draft_acceptance_rate", "acceptance_histogram", "num_spec_steps"}
    assert names | {"num_accepted_draft_tokens", "num_draft_tokens", "tau_without_bonus"} <= data.keys()
    time = data["time"]
    assert time["total"] == pytest.approx(sum(time[part] for part in ("prefill", "draft", "verify", "host")))
    assert min(time.values()) >= 0.0
    assert data["tokens_per_second"] == pytest.approx(9 / data["seconds"])
