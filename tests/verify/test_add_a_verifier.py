"""docs/add_a_verifier.md: its code is extracted from the page, registered and used."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import tiny
from msd.config import SpeculativeConfig
from msd.core import modality
from msd.errors import UserError
from msd.model import SpeculativeVLM
from msd.result import Result
from msd.verify import create, policies, registry
from verify.positions import P, accept, counts, draft

PAGE = Path(__file__).parents[2] / "docs" / "add_a_verifier.md"


@pytest.fixture
def registered() -> Iterator[str]:
    known = policies()
    code = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert len(code) == 1 and len(code[0].splitlines()) < 100
    exec(compile(code[0], str(PAGE), "exec"), {"__name__": "page"})
    (name,) = set(policies()) - set(known)
    yield name
    del registry._POLICIES[name]


def test_the_policy_of_the_page_decodes(registered: str) -> None:
    config = SpeculativeConfig(verifier=registered)
    engine = SpeculativeVLM(tiny.llava(sharpness=10.0), None, config, "prompt-lookup")
    result = engine.generate(**tiny.llava_inputs(), max_new_tokens=24, do_sample=True, seed=1)
    assert isinstance(result, Result) and len(result.tokens) > 1
    assert result.as_dict()["divergence"] is not None, "a lossy policy reports its divergence"


def test_the_reported_divergence_is_that_of_the_emitted_tokens(registered: str) -> None:
    tree = draft(20_000, deterministic=[4, 2, 1])  # of these, 1 and 2 are among the three most probable
    accepted = accept(create(registered), tree, kind=modality.VISION.id)
    share = counts(accepted) / 20_000
    assert accepted.divergence is not None
    reported = accepted.divergence[0][0]
    assert reported == pytest.approx(float((share - torch.tensor(P)).abs().sum() / 2), abs=0.01)
    assert share[1] == 1.0


def test_options_are_those_of_the_constructor(registered: str) -> None:
    with pytest.raises(UserError, match=rf"verifier '{registered}' has no thresholds; choose 'threshold' or 'budget'"):
        create(registered, {"vision": 0.5})
    with pytest.raises(UserError, match="has no colour; leave it out"):
        create(registered, colour="red")
