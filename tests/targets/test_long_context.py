"""Prompts of more than 8k tokens: one rotary axis, three axes, and sliding-window layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from families import BY_NAME
from family import Part
from family_layouts import WORDS
from msd.config import SpeculativeConfig
from msd.model import SpeculativeVLM
from msd.result import Result
from msd.targets import Past
from random_drafter import RandomDrafter

LONG = 8200
SETTINGS: dict[str, Any] = {
    "do_sample": True, "top_k": 0, "max_new_tokens": 8, "eos_token_id": None, "suppress_tokens": list(range(WORDS)),
}  # fmt: skip


@pytest.mark.parametrize("name", ["llava", "qwen2_vl", pytest.param("gemma3", marks=pytest.mark.slow)])
def test_more_than_eight_thousand_tokens(name: str) -> None:
    """An image, thousands of text tokens, another image; then a second turn."""
    family, model = BY_NAME[name], BY_NAME[name].make()
    model.config.get_text_config().max_position_embeddings = 2 * LONG
    words: list[Part] = list(torch.randint(WORDS, 64, (LONG,), generator=torch.Generator().manual_seed(0)).tolist())
    parts = [*words[:4], family.picture(1), *words, family.picture(2), *words[:6]]
    past = Past()
    for turn in range(2):
        row = family.row(parts)
        torch.manual_seed(turn)
        wanted = model.generate(**row, **SETTINGS)[0, row["input_ids"].shape[1] :].tolist()
        vlm = SpeculativeVLM(model, None, SpeculativeConfig(backend="plain"), RandomDrafter(turn, 64, [wanted]))
        result = vlm.generate(**row, **SETTINGS, seed=turn, past=past)
        assert isinstance(result, Result)
        assert result.tokens == wanted
        assert result.statistics.num_accepted_draft_tokens > 0
        assert result.statistics.num_prefill_rows == (row["input_ids"].shape[1] if turn == 0 else 4)
        parts = [*parts, *wanted, 20, 21, 22]
