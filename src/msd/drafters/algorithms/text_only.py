"""`text-only`: a small language model that never sees the image (Gagrani et al., arXiv 2404.08856).

It is a depth-pruned copy of the target's language model, distilled from it: a few evenly spaced layers, including the
first and the last, between the frozen embedding and output layer. Image tokens are removed from the text, and text
positions are counted without them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from msd.backends.norms import RMSNorm
from msd.backends.revision import whole
from msd.core.layout import Layout
from msd.core.modality import LANGUAGE
from msd.drafters.registry import learned
from msd.drafters.toolkit.context import Selection, left_aligned, pick, real_columns
from msd.drafters.toolkit.levels import SelfFed
from msd.drafters.toolkit.network import NetworkConfig
from msd.errors import UserError
from msd.targets.taps import text_decoder
from msd.train.losses.published import distillation_loss

NORMS = {"input_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
ATTENTION, MLP = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")


@learned("text-only", loss=distillation_loss)
class TextOnly(SelfFed):
    """Entry i is token i+1; the first token of a text has an entry too. It reads no target states."""

    deep = True
    layer_count = 3

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__(config)
        self.norm = RMSNorm(config.hidden, config.eps)

    def begin_from(self, model: PreTrainedModel) -> None:
        """Copies layers and final norm of the target; UserError if its layers are not Llama's."""
        decoder, own = text_decoder(model), self.state_dict()
        sources = torch.linspace(0, len(decoder.layers) - 1, len(self.layers)).round().long().tolist()
        target = dict(decoder.state_dict())
        copied: dict[str, Any] = {"norm.weight": target.get("norm.weight")}
        for layer, source in enumerate(sources):
            names = NORMS | {n: f"self_attn.{n}" for n in ATTENTION} | {n: f"mlp.{n}" for n in MLP}
            for name, other in names.items():
                copied[f"layers.{layer}.{name}.weight"] = target.get(f"layers.{source}.{other}.weight")
        plain = not any(name.startswith("layers.") and name.endswith(".bias") for name in target)
        if not plain or any(t is None or t.shape != own[name].shape for name, t in copied.items()):
            raise UserError(
                f"method '{self.method}' copies layers of Llama's kind, which those of this {model.config.model_type} "
                "are not; train another method"
            )
        self.load_state_dict(own | {name: whole(tensor) for name, tensor in copied.items()})

    def select(self, layout: Layout, taps: Tensor, prompt: int) -> Selection:
        """See `DraftNetwork`; selects the text tokens of columns 0 to L."""
        L = taps.shape[1]
        kept = real_columns(layout, L + 1) & (layout.modality[:, : L + 1] == LANGUAGE.id)
        order = left_aligned(kept)
        place = kept.long().cumsum(1) - 1  # positions without the images
        embedding = self.embed(layout.tokens.gather(1, order))
        return Selection(
            pick(taps, (order - 1).clamp_min(0)), embedding, place.clamp_min(0).gather(1, order), kept.gather(1, order),
            place.clamp_min(0)[:, 1:], 1 + place[:, -1:] - layout.positions_1d()[:, L : L + 1],
            embedding.new_zeros(len(embedding), 1, 1),
        )  # fmt: skip

    def entry(self, feature: Tensor, embedding: Tensor, image: Tensor, level: int) -> Tensor:
        """The embedding alone."""
        return embedding

    def logits(self, states: Tensor, parents: Tensor) -> Tensor:
        """See `DraftNetwork`."""
        return self.head(self.norm(states))
