"""`eagle3`: fused features, a vocabulary of its own, training-time test (EAGLE-3, arXiv 2503.01840).

`fc` [3H -> H] fuses the target's states at layers 2, L//2 and L-3; attention reads [norm(emb); norm(h)], and h is its
residual. Row i of the reduced draft vocabulary is the target's token i + d2t[i].
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from msd.backends.packed import Linear
from msd.drafters.registry import learned
from msd.drafters.toolkit.layers import PairLayer
from msd.drafters.toolkit.levels import SelfFed
from msd.drafters.toolkit.network import NetworkConfig
from msd.targets.taps import output_layer
from msd.train.losses.published import training_time_test_loss


@learned("eagle3", loss=training_time_test_loss)
class Eagle3(SelfFed):
    """Ignores modality, like `eagle2`."""

    layer = PairLayer
    reach = 7
    reduced = True
    d2t: Tensor
    t2d: Tensor

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__(config)
        c, H = config, config.hidden
        self.fused = [c.taps.index(layer) for layer in fused_layers(c.taps[-1])]
        self.fc = Linear(len(self.fused) * H, H, bias=False)
        self.norm = nn.RMSNorm(H, c.eps)
        self.lm_head = Linear(H, c.draft_vocabulary, bias=False)
        self.register_buffer("d2t", torch.zeros(c.draft_vocabulary, dtype=torch.long))
        self.register_buffer("t2d", torch.arange(c.vocabulary) < c.draft_vocabulary)

    @classmethod
    def tapped(cls, layers: int) -> tuple[int, ...]:
        """Returns the fused layers, 0 for the embeddings at image positions, and L, which training reads."""
        return tuple(sorted({0, *fused_layers(layers), layers}))

    @property
    def ids(self) -> Tensor:
        """See `DraftNetwork`."""
        return torch.arange(len(self.d2t), device=self.d2t.device) + self.d2t

    def choose_draft_vocabulary(self, ids: Tensor) -> None:
        """See `DraftNetwork`."""
        self.d2t = ids.to(self.d2t.device) - torch.arange(len(ids), device=self.d2t.device)
        self.t2d = torch.zeros_like(self.t2d).index_fill_(0, ids.to(self.t2d.device), True)

    def begin_from(self, model: PreTrainedModel) -> None:
        """Copies the target's rows to the output layer."""
        rows = output_layer(model).weight.detach()
        with torch.no_grad():
            self.lm_head.weight.copy_(rows[self.ids.to(rows.device)])

    def feature(self, taps: Tensor) -> Tensor:
        """fc([low; middle; high])."""
        return self.fc(torch.cat([self.tap(taps, i) for i in self.fused], -1)).to(self.dtype)

    def entry(self, feature: Tensor, embedding: Tensor, image: Tensor, level: int) -> Tensor:
        """[emb; h]; below the root, h is the parent's draft state before the final norm."""
        return torch.cat([embedding, feature], -1)

    def logits(self, states: Tensor, parents: Tensor) -> Tensor:
        """See `DraftNetwork`."""
        return self.lm_head(self.norm(states))


def fused_layers(layers: int) -> list[int]:
    """Returns layers 2, L//2 and L-3 of a target with L layers, ascending; fewer where these coincide."""
    return sorted({min(2, layers), layers // 2, max(0, layers - 3)})
