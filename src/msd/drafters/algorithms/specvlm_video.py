"""`specvlm-video`: the target's attention says which image tokens the drafter sees (SpecVLM, arXiv 2508.16201).

Nine tenths of the visual tokens of a prompt, all frames together, are pruned for the drafter, in two stages: those
kept first are the ones that the text attends to most, until they hold 40% of that attention; the rest of the room is
filled evenly from the others. The drafter is EAGLE-2's and needs no training of its own.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from msd.drafters.registry import learned
from msd.drafters.toolkit.context import Columns, Selection, keep
from msd.drafters.toolkit.levels import EagleNetwork
from msd.drafters.toolkit.network import DraftNetwork
from msd.errors import UserError
from msd.train.losses.eagle import eagle_loss

MASS, KEPT = 0.4, 0.1  # of the attention to visual tokens, and of these themselves


@learned("specvlm-video", loss=eagle_loss, weights=("eagle2",))
class SpecVLMVideo(EagleNetwork):
    """The attention is the target's last layer's, computed again from what enters it, averaged over heads and over the
    prompt's words after the images. (The published code averages over all layers, which needs all their states.)
    """

    @classmethod
    def tapped(cls, layers: int) -> tuple[int, ...]:
        """EAGLE-2's, and what enters the last layer."""
        return tuple(sorted({0, layers - 1, layers}))

    @classmethod
    def adopted(cls, trained: DraftNetwork) -> Self:
        """With the weights of a trained `eagle2`."""
        if isinstance(trained, cls):
            return trained
        c = trained.config
        made = cls(replace(c, method=cls.method, taps=cls.tapped(c.taps[-1])))
        made.load_state_dict(trained.state_dict())
        return made.eval()

    def attach(self, model: PreTrainedModel, name: str | None = None) -> Self:
        """Takes the target's last layer too; UserError where its attention is not of Llama's kind."""
        layer = model.get_decoder().layers[-1]
        attention = getattr(layer, "self_attn", None)
        if not hasattr(attention, "q_proj") or not hasattr(layer, "input_layernorm") or hasattr(attention, "q_norm"):
            kind = model.config.model_type
            raise UserError(f"method '{self.method}' reads attention of Llama's kind, which that of this {kind} is not")
        super().attach(model, name)
        self._target.append(layer)
        return self

    def kept(self, c: Columns) -> Selection:
        """Text, and the visual columns that are left."""
        stay = c.real & ~c.visual
        if bool(c.visual.any()):
            scores = self.attention(c)
            for row, shown in enumerate(c.visual):
                at = shown.nonzero().squeeze(-1)
                if len(at):
                    stay[row, at[chosen(scores[row, at])]] = True
        return keep(c, stay)[0]

    @torch.no_grad()
    def attention(self, c: Columns) -> Tensor:
        """[B, L]: how much the prompt's words after the last image attend to the token after each column."""
        layer: Any = self._target[2]
        H, P = self.config.head_dim, c.prompt
        normed = layer.input_layernorm(self.tap(c.taps[:, :P], self.config.taps.index(self.config.taps[-1] - 1)))
        turn = self.rotary(c.positions[:, :P])
        q, k = (turn(p(normed).unflatten(-1, (-1, H))) for p in (layer.self_attn.q_proj, layer.self_attn.k_proj))
        k = k.repeat_interleave(q.shape[2] // k.shape[2], 2)
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * H**-0.5
        column = torch.arange(P, device=q.device)
        seen = (column <= column[:, None]) & c.real[:, None, :P]
        weights = scores.masked_fill(~seen[:, None], torch.finfo(scores.dtype).min).softmax(-1).mean(1)
        last = torch.where(c.visual, torch.arange(c.visual.shape[1], device=q.device) + 1, -1).amax(1, keepdim=True)
        asks = ((column > last) & c.real[:, :P]).to(weights.dtype)  # words after the last image token
        mean = (weights * asks[..., None]).sum(1) / asks.sum(1, keepdim=True).clamp_min(1)
        return nn.functional.pad(mean[:, 1:], (0, c.visual.shape[1] - P + 1))


def chosen(scores: Tensor) -> Tensor:
    """Which of n tokens are kept, ascending, by the attention [n] to them: at least one, about a tenth."""
    room = max(1, int(len(scores) * KEPT))
    order = scores.argsort(descending=True, stable=True)
    share = scores[order].cumsum(0) / scores.sum().clamp_min(1e-9)
    first = order[: min(room, int((share < MASS).sum()) + 1)]
    others = torch.ones_like(scores, dtype=torch.bool).index_fill_(0, first, False).nonzero().squeeze(-1)
    even = torch.linspace(0, max(0, len(others) - 1), room - len(first), device=scores.device).long()
    return torch.cat([first, others[even]]).sort().values
