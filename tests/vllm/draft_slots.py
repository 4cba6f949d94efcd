"""Corrects vLLM 0.32.0 in a process that imports this: the keys of a draft's tokens go where the sequence continues.

Its EAGLE proposer takes the slot of a drafted token from its rotary position. Under M-RoPE an image has more tokens
than positions, so the keys of drafted tokens overwrite those of the prompt (`_update_positions_dependent_metadata`).
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.v1.spec_decode.llm_base_proposer import SpecDecodeBaseProposer

original = SpecDecodeBaseProposer._update_positions_dependent_metadata


def corrected(self: Any, positions: torch.Tensor, metadata: Any, batch: int, padded: int, block: int) -> torch.Tensor:
    if self.uses_mrope or not self.vllm_config.model_config.uses_mrope:
        return original(self, positions, metadata, batch, padded, block)
    columns = (metadata.seq_lens[:batch] - 1).to(positions.dtype)
    following = positions[:batch] + 1
    original(self, columns, metadata, batch, padded, block)
    self.positions[:batch] = following
    return self.positions[:batch]


SpecDecodeBaseProposer._update_positions_dependent_metadata = corrected
