"""Reads from a model's config the sizes that determine the time of its passes. Three models are built in."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any

from msd.errors import UserError
from msd.estimate.counts import Counts, counted


@dataclass(frozen=True)
class Sizes:
    """Sizes of a decoder, and of its vision tower.

    Without `counted`, all layers have attention and a gated MLP of these sizes; with it, only those of a drafter do.
    total: weights of the whole model, if they were counted. vocabulary: rows of the output layer. image_tokens: prompt
    tokens of one image. vision_*: of the vision tower, whose MLP may be gated; vision_patches: of one image;
    vision_layers: 0 if the tower is unknown.
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

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready. The keys of the vision tower begin with "eye", as in existing result files."""
        return {name.replace("vision_", "eye_"): value for name, value in asdict(self).items()}

    def uniform(self, layers: int) -> Sizes:
        """The sizes of a decoder of `layers` equal layers, such as a drafter's."""
        return replace(self, layers=layers, counted=None, total=0)

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


_CLIP: dict[str, Any] = {
    "vision_layers": 23, "vision_hidden": 1024, "vision_intermediate": 4096, "vision_patches": 577
}  # fmt: skip
_KNOWN = (  # from the config.json of each checkpoint; CLIP's last layer is not used
    Sizes("llava-1.5-7b", 32, 4096, 11008, 32, 32, 128, 32064, 576, **_CLIP),
    Sizes("llava-1.5-13b", 40, 5120, 13824, 40, 40, 128, 32064, 576, **_CLIP),
    Sizes(  # a photo of about 900 x 900 pixels, 64 x 64 patches of 14, merged by 2 x 2
        "qwen2.5-vl-7b", 28, 3584, 18944, 28, 4, 128, 152064, 1024,
        vision_layers=32, vision_hidden=1280, vision_intermediate=3420, vision_gated=True, vision_patches=4096,
    ),
)  # fmt: skip
PRESETS = {sizes.name: sizes for sizes in _KNOWN}
_ALIASES = {
    "llava-hf/llava-1.5-7b-hf": "llava-1.5-7b",
    "llava-hf/llava-1.5-13b-hf": "llava-1.5-13b",
    "qwen/qwen2.5-vl-7b-instruct": "qwen2.5-vl-7b",
}


def sizes(target: str) -> Sizes:
    """Returns the sizes of a built-in model, "reference", a checkpoint folder or a hub id; reads only its config.

    Raises UserError if there is no such model, or if its decoder is unsupported.
    """
    name = _ALIASES.get(target.lower(), target.lower())
    if name in PRESETS:
        return PRESETS[name]
    from msd.loading import load_config

    try:
        config = load_config(target)
    except UserError as error:
        raise UserError(f"{error}; known without their files: {', '.join(PRESETS)}") from error
    return of_config(target, config)


def of_config(name: str, config: Any) -> Sizes:
    """Returns the sizes in a `transformers` config of a multimodal model. UserError if it cannot be built."""
    text = config.get_text_config(decoder=True)
    counts, total = counted(name, config)
    numbers = (getattr(config, key, None) for key in ("image_seq_length", "mm_tokens_per_image"))
    image_tokens = next((count for count in numbers if isinstance(count, int)), 0)
    own = text.to_dict()  # the common sizes also where those of single layers differ, as in Gemma 4
    heads, kv_heads, head_dim = (own.get(key) for key in ("num_attention_heads", "num_key_value_heads", "head_dim"))
    inner = own.get("intermediate_size") or own["moe_intermediate_size"] * own["num_experts_per_tok"]
    return Sizes(
        name, counts.layers, text.hidden_size, inner, heads, kv_heads or heads, head_dim or text.hidden_size // heads,
        text.vocab_size, image_tokens, **_vision(getattr(config, "vision_config", None)), counted=counts, total=total,
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
