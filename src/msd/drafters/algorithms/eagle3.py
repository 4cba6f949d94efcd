"""`eagle3`: fused features, a vocabulary of its own, training-time test (EAGLE-3, arXiv 2503.01840).

The target's states at layers 2, L//2 and L-3 become one feature, fc [3H -> H]; attention reads [norm(emb); norm(h)]
and h goes past it. Drafted words are those of a reduced vocabulary, whose row i is the target's token i + d2t[i].
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
from msd.train.losses.eagle import training_time_test_loss


@learned("eagle3", loss=training_time_test_loss)
class Eagle3(SelfFed):
    """Blind to modality, as `eagle2` is."""

    layer = PairLayer
    reach = 7
    reduced = True
    d2t: Tensor
    t2d: Tensor

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__(config)
        c, H = config, config.hidden
        self.used = [c.taps.index(layer) for layer in used(c.taps[-1])]
        self.fc = Linear(len(self.used) * H, H, bias=False)
        self.norm = nn.RMSNorm(H, c.eps)
        self.lm_head = Linear(H, c.draft_vocabulary, bias=False)
        self.register_buffer("d2t", torch.zeros(c.draft_vocabulary, dtype=torch.long))
        self.register_buffer("t2d", torch.arange(c.vocabulary) < c.draft_vocabulary)

    @classmethod
    def tapped(cls, layers: int) -> tuple[int, ...]:
        """Its three, the embeddings for what stands at image positions, and the final state, which training reads."""
        return tuple(sorted({0, *used(layers), layers}))

    @property
    def ids(self) -> Tensor:
        """Target ids of the draft vocabulary."""
        return torch.arange(len(self.d2t), device=self.d2t.device) + self.d2t

    def choose_words(self, ids: Tensor) -> None:
        """Makes the ascending target ids [Vd] the draft vocabulary."""
        self.d2t = ids.to(self.d2t.device) - torch.arange(len(ids), device=self.d2t.device)
        self.t2d = torch.zeros_like(self.t2d).index_fill_(0, ids.to(self.t2d.device), True)

    def begin_from(self, model: PreTrainedModel) -> None:
        """The output layer begins as the target's own rows."""
        rows = model.get_output_embeddings().weight.detach()
        with torch.no_grad():
            self.lm_head.weight.copy_(rows[self.ids.to(rows.device)])

    def feature(self, taps: Tensor) -> Tensor:
        """fc([low; middle; high])."""
        out: Tensor = self.fc(torch.cat([self.tap(taps, i) for i in self.used], -1))
        return out.to(self.dtype)

    def entry(self, feature: Tensor, word: Tensor, image: Tensor, level: int) -> Tensor:
        """[emb; h]; in a draft, h is the state above it before the final norm."""
        return torch.cat([word, feature], -1)

    def logits(self, states: Tensor, parents: Tensor) -> Tensor:
        """Over the draft vocabulary."""
        out: Tensor = self.lm_head(self.norm(states))
        return out


def used(layers: int) -> list[int]:
    """Layers 2, L//2 and L-3 of a target with L layers, ascending; fewer where these coincide."""
    return sorted({min(2, layers), layers // 2, max(0, layers - 3)})
