"""An output layer of the drafter's own, over a draft vocabulary: row i is the target's token i + d2t[i]."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from msd.backends.packed import Linear


def add_head(network: Any) -> None:
    """Creates `lm_head` [Vd, H] and the vocabulary buffers d2t [Vd] int64 and t2d [V] bool."""
    c = network.config
    network.lm_head = Linear(c.hidden, c.draft_vocabulary, bias=False)
    network.register_buffer("d2t", torch.zeros(c.draft_vocabulary, dtype=torch.long))
    network.register_buffer("t2d", torch.arange(c.vocabulary) < c.draft_vocabulary)


def draft_ids(d2t: Tensor) -> Tensor:
    """Returns the target's id [Vd] int64 of each draft token."""
    return torch.arange(len(d2t), device=d2t.device) + d2t


def set_vocabulary(network: Any, ids: Tensor) -> None:
    """Sets the draft vocabulary to the ascending target ids [Vd]."""
    ids = ids.to(network.d2t.device)
    network.d2t = ids - torch.arange(len(ids), device=ids.device)
    network.t2d = torch.zeros_like(network.t2d).index_fill_(0, ids, True)


def copy_rows(head: Any, ids: Tensor, own: nn.Linear) -> None:
    """Copies the target's output rows of the draft vocabulary."""
    rows = head.weight.detach()
    with torch.no_grad():
        own.weight.copy_(rows[ids.to(rows.device)])
