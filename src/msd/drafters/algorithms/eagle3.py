"""`eagle3`: fused features, a vocabulary of its own, training-time test (EAGLE-3, arXiv 2503.01840).

`fc` [3H -> H] fuses the target's states at layers 2, L//2 and L-3; attention reads [norm(emb); norm(h)], and h is its
residual. Row i of the reduced draft vocabulary is the target's token i + d2t[i].
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from msd.backends.norms import RMSNorm
from msd.backends.packed import Linear
from msd.drafters.registry import learned
from msd.drafters.toolkit.layers import PairLayer
from msd.drafters.toolkit.levels import SelfFed
from msd.drafters.toolkit.network import NetworkConfig
from msd.drafters.toolkit.own_head import add_head, copy_rows, draft_ids, set_vocabulary
from msd.targets.taps import output_layer
from msd.train.losses.published import training_time_test_loss


@learned("eagle3", loss=training_time_test_loss)
class Eagle3(SelfFed):
    """Ignores modality, like `eagle2`."""

    layer = PairLayer
    depth = 8  # the released code's default of 7 counts the levels below the first
    reach = 7
    prompt_roots = reach - 1  # as released: a draft counts where its token is in the answer, wherever its root is
    reduced = True
    d2t: Tensor
    lm_head: Linear

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__(config)
        c, H, v = config, config.hidden, config.variant
        count = len(self.fused) if c.taps else 3
        self.fc = Linear(count * H, H, bias=False)
        self.norm = RMSNorm(H, c.eps)
        self.input_norm = RMSNorm(count * H, c.eps) if v.fc_norm == "all" else None
        self.fc_norm = nn.ModuleList(RMSNorm(H, c.eps) for _ in range(count if v.fc_norm == "each" else 0))
        add_head(self)

    @classmethod
    def tapped(cls, layers: int) -> tuple[int, ...]:
        """Returns the fused layers, 0 for the embeddings at image positions, and L, which training reads."""
        return tuple(sorted({0, *fused_layers(layers), layers}))

    @property
    def fused(self) -> list[int]:
        """The places among the taps of the states that `fc` reads."""
        c = self.config
        return [c.taps.index(layer) for layer in c.variant.fused or fused_layers(c.taps[-1])]

    @property
    def ids(self) -> Tensor:
        """See `DraftNetwork`."""
        return draft_ids(self.d2t)

    def choose_draft_vocabulary(self, ids: Tensor) -> None:
        """See `DraftNetwork`."""
        set_vocabulary(self, ids)

    def begin_from(self, model: PreTrainedModel) -> None:
        """Copies the target's rows to the output layer."""
        copy_rows(output_layer(model), self.ids, self.lm_head)

    def feature(self, taps: Tensor) -> Tensor:
        """fc([low; middle; high]), of normalised states where the variant says so."""
        states = torch.cat([self.tap(taps, i) for i in self.fused], -1)
        if self.input_norm is not None:
            states = self.input_norm(states)
        elif len(self.fc_norm):
            parts = states.chunk(len(self.fc_norm), -1)
            states = torch.cat([norm(part) for norm, part in zip(self.fc_norm, parts, strict=True)], -1)
        return self.fc(states).to(self.dtype)

    def drafted_feature(self, state: Tensor) -> Tensor:
        """See `SelfFed`."""
        return self.norm(state) if self.config.variant.fed_norm else state

    def entry(self, feature: Tensor, embedding: Tensor, image: Tensor, level: int) -> Tensor:
        """[emb; h]; below the root, h is the parent's draft state before the final norm."""
        return torch.cat([embedding, feature], -1)

    def logits(self, states: Tensor, parents: Tensor) -> Tensor:
        """See `DraftNetwork`."""
        return self.lm_head(self.norm(states) if self.config.variant.final_norm else states)


def fused_layers(layers: int) -> list[int]:
    """Returns layers 2, L//2 and L-3 of a target with L layers, ascending; fewer where these coincide."""
    return sorted({min(2, layers), layers // 2, max(0, layers - 3)})
