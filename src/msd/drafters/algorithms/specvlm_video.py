"""`specvlm-video`: prunes the drafter's image tokens by the target's attention (SpecVLM, arXiv 2508.16201).

Of the visual tokens of a prompt, all frames together, one tenth is kept, in two stages: first the tokens that the text
attends to most, until they hold 40% of that attention; then evenly spaced ones of the others. The drafter is EAGLE-2's
and needs no training.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from msd.drafters.registry import learned
from msd.drafters.toolkit.context import Columns, Selection, select_columns
from msd.drafters.toolkit.layers import rotate
from msd.drafters.toolkit.levels import EagleNetwork
from msd.drafters.toolkit.network import DraftNetwork
from msd.errors import UserError
from msd.targets.taps import text_decoder
from msd.train.losses.published import eagle_loss

ATTENTION_SHARE, KEPT_SHARE = 0.4, 0.1  # of the attention to visual tokens; of these tokens


@learned("specvlm-video", loss=eagle_loss, weights=("eagle2",))
class SpecVLMVideo(EagleNetwork):
    """Recomputes the attention of the target's last layer from its inputs.

    The attention is averaged over heads and over the prompt's text after the images. (The published code averages over
    all layers, which needs the states of all layers.)
    """

    @classmethod
    def tapped(cls, layers: int) -> tuple[int, ...]:
        """Returns EAGLE-2's states and the input of the last layer."""
        return tuple(sorted({0, layers - 1, layers}))

    @classmethod
    def adopted(cls, trained: DraftNetwork) -> Self:
        """See `DraftNetwork`; takes the weights of a trained `eagle2`."""
        if isinstance(trained, cls):
            return trained
        c = trained.config
        network = cls(replace(c, method=cls.method, taps=cls.tapped(c.taps[-1])))
        network.load_state_dict(trained.state_dict())
        return network.eval()

    def attach(self, model: PreTrainedModel, name: str | None = None) -> Self:
        """Also takes the target's last layer; UserError if its attention is not Llama's."""
        layer = text_decoder(model).layers[-1]
        attention = getattr(layer, "self_attn", None)
        if not hasattr(attention, "q_proj") or not hasattr(layer, "input_layernorm") or hasattr(attention, "q_norm"):
            kind = model.config.model_type
            raise UserError(f"method '{self.method}' reads attention of Llama's kind, which that of this {kind} is not")
        super().attach(model, name)
        self._target.append(layer)
        return self

    def select_columns(self, c: Columns) -> Selection:
        """Selects text and the kept visual columns."""
        kept = c.real & ~c.visual
        if bool(c.visual.any()):
            scores = self.attention(c)
            for row, visual in enumerate(c.visual):
                at = visual.nonzero().squeeze(-1)
                if len(at):
                    kept[row, at[kept_tokens(scores[row, at])]] = True
        return select_columns(c, kept)[0]

    @torch.no_grad()
    def attention(self, c: Columns) -> Tensor:
        """Returns the mean attention of the text after the last image to the token after each column: [B, L]."""
        layer: Any = self._target[2]
        H, P = self.config.head_dim, c.prompt
        normed = layer.input_layernorm(self.tap(c.taps[:, :P], self.config.taps.index(self.config.taps[-1] - 1)))
        rotary = self.rotary(c.positions[:, :P])
        attention = layer.self_attn
        q, k = (rotate(p(normed).unflatten(-1, (-1, H)), rotary) for p in (attention.q_proj, attention.k_proj))
        k = k.repeat_interleave(q.shape[2] // k.shape[2], 2)
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * H**-0.5
        column = torch.arange(P, device=q.device)
        seen = (column <= column[:, None]) & c.real[:, None, :P]
        weights = scores.masked_fill(~seen[:, None], torch.finfo(scores.dtype).min).softmax(-1).mean(1)
        last = torch.where(c.visual, torch.arange(c.visual.shape[1], device=q.device) + 1, -1).amax(1, keepdim=True)
        queries = ((column > last) & c.real[:, :P]).to(weights.dtype)  # text after the last image token
        mean = (weights * queries[..., None]).sum(1) / queries.sum(1, keepdim=True).clamp_min(1)
        return nn.functional.pad(mean[:, 1:], (0, c.visual.shape[1] - P + 1))


def kept_tokens(scores: Tensor) -> Tensor:
    """Returns the indices of the kept tokens, ascending, from the attention [n] to each: a tenth, at least one."""
    room = max(1, int(len(scores) * KEPT_SHARE))
    order = scores.argsort(descending=True, stable=True)
    share = scores[order].cumsum(0) / scores.sum().clamp_min(1e-9)
    first = order[: min(room, int((share < ATTENTION_SHARE).sum()) + 1)]
    others = torch.ones_like(scores, dtype=torch.bool).index_fill_(0, first, False).nonzero().squeeze(-1)
    even = torch.linspace(0, max(0, len(others) - 1), room - len(first), device=scores.device).long()
    return torch.cat([first, others[even]]).sort().values
