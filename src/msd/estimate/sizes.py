"""Reads from a model's config the sizes that determine the time of its passes."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any

from msd.estimate.counts import Counts, counted


@dataclass(frozen=True)
class Sizes:
    """Sizes of a decoder, and of its vision tower.

    Without `counted`, all layers have attention and a gated MLP of these sizes; with it, only those of a drafter do.
    total: weights of the whole model, if they were counted. vocabulary: rows of the output layer. image_tokens: prompt
    tokens of one image. vision_*: of the vision tower, whose MLP may be gated; vision_patches: of one image;
    vision_layers: 0 if the tower is unknown. mtp: of the target's own multi-token-prediction layers. shares_cache: it
    is an assistant, which reads the target's keys instead of a prompt.
    """

    name: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    image_tokens: int = 0
    vision_layers: int = field(default=0, kw_only=True)
    vision_hidden: int = field(default=0, kw_only=True)
    vision_intermediate: int = field(default=0, kw_only=True)
    vision_gated: bool = field(default=False, kw_only=True)
    vision_patches: int = field(default=0, kw_only=True)
    counted: Counts | None = field(default=None, kw_only=True)
    total: int = field(default=0, kw_only=True)
    mtp: Counts | None = field(default=None, kw_only=True)
    shares_cache: bool = field(default=False, kw_only=True)

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready. The keys of the vision tower begin with "eye", as in existing result files."""
        return {name.replace("vision_", "eye_"): value for name, value in asdict(self).items()}

    @property
    def mtp_layers(self) -> Sizes:
        """The sizes of the multi-token-prediction layers alone."""
        assert self.mtp is not None
        return replace(self, layers=self.mtp.layers, counted=self.mtp, total=0, mtp=None)

    def uniform(self, layers: int) -> Sizes:
        """The sizes of a decoder of `layers` equal layers, such as a drafter's."""
        return replace(self, layers=layers, counted=None, total=0, mtp=None)

    @property
    def counts(self) -> Counts:
        """What was counted, or what follows from equal layers."""
        if self.counted is not None:
            return self.counted
        kept = 2 * self.layers * self.kv_heads * self.head_dim
        return Counts(self.layers, self.layers * self.layer, kept, kept, 4 * self.layers * self.heads * self.head_dim)

    @property
    def layer(self) -> int:
        """Weights of one layer of equal ones."""
        attention = self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        return attention + 3 * self.hidden * self.intermediate

    @property
    def head(self) -> int:
        """Weights of the output layer."""
        return self.hidden * self.vocabulary

    @property
    def decoder(self) -> int:
        """Weights of all layers, experts too, and of the output layer."""
        return self.counts.dense + self.counts.experts + self.head

    @property
    def model(self) -> int:
        """Weights of the whole model."""
        return self.total or self.decoder + self.vision + self.hidden * self.vocabulary

    @property
    def kv(self) -> int:
        """Numbers in the cache for one token."""
        return self.counts.kept

    @property
    def vision(self) -> int:
        """Weights of the vision tower's layers."""
        mlp = (3 if self.vision_gated else 2) * self.vision_intermediate
        return self.vision_layers * self.vision_hidden * (4 * self.vision_hidden + mlp)


def of_config(name: str, config: Any, **fields: Any) -> Sizes:
    """Returns the sizes in a `transformers` config of a multimodal model. UserError if it cannot be built.

    fields: of the vision tower and its tokens, where they do not follow from the config.
    """
    text = config.get_text_config(decoder=True)
    counts, total, mtp = counted(name, config)
    numbers = (getattr(config, key, None) for key in ("image_seq_length", "mm_tokens_per_image"))
    image_tokens = next((count for count in numbers if isinstance(count, int)), 0)
    own = text.to_dict()  # the common sizes also where those of single layers differ, as in Gemma 4
    heads, kv_heads, head_dim = (own.get(key) for key in ("num_attention_heads", "num_key_value_heads", "head_dim"))
    inner = own.get("intermediate_size") or own["moe_intermediate_size"] * own["num_experts_per_tok"]
    seen = {"image_tokens": image_tokens, **_vision(getattr(config, "vision_config", None))} | fields
    return Sizes(
        name, counts.layers, text.hidden_size, inner, heads, kv_heads or heads, head_dim or text.hidden_size // heads,
        text.vocab_size, counted=counts, total=total, mtp=mtp, **seen,
    )  # fmt: skip


def _vision(vision: Any) -> dict[str, Any]:
    """Returns the fields of a vision tower that is a transformer over patches of images of one size, else nothing."""
    sides = (getattr(vision, key, None) for key in ("image_size", "patch_size"))
    image, patch = (side[0] if isinstance(side, list | tuple) else side for side in sides)
    hidden, inner = getattr(vision, "hidden_size", None), getattr(vision, "intermediate_size", None)
    layers = getattr(vision, "num_hidden_layers", None)
    if not (image and patch and hidden and inner and layers):
        return {}
    return {
        "vision_layers": layers, "vision_hidden": hidden, "vision_intermediate": inner,
        "vision_patches": (image // patch) ** 2,
    }  # fmt: skip
