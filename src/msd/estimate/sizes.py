"""What of a model's config decides the time of its passes. Three models are known without their config files."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from msd.errors import UserError


@dataclass(frozen=True)
class Sizes:
    """A decoder, and the transformer that encodes its images.

    hidden H, intermediate: of a gated MLP. vocabulary: rows of the output layer. image_tokens: of one image, in the
    prompt. eye_*: layers, hidden size, MLP size, gated or not, and patches of one image; 0 layers where not known.
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
    eye_layers: int = field(default=0, kw_only=True)
    eye_hidden: int = field(default=0, kw_only=True)
    eye_intermediate: int = field(default=0, kw_only=True)
    eye_gated: bool = field(default=False, kw_only=True)
    eye_patches: int = field(default=0, kw_only=True)

    @property
    def layer(self) -> int:
        """Weights of one decoder layer's products."""
        attention = self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        return attention + 3 * self.hidden * self.intermediate

    @property
    def head(self) -> int:
        """Weights of the output layer."""
        return self.hidden * self.vocabulary

    @property
    def decoder(self) -> int:
        """Weights read in a pass: all layers and the output layer."""
        return self.layers * self.layer + self.head

    @property
    def kv(self) -> int:
        """Numbers that the cache keeps for one token."""
        return 2 * self.layers * self.kv_heads * self.head_dim

    @property
    def eye(self) -> int:
        """Weights of the image encoder's layers."""
        mlp = (3 if self.eye_gated else 2) * self.eye_intermediate
        return self.eye_layers * self.eye_hidden * (4 * self.eye_hidden + mlp)


_CLIP: dict[str, Any] = {"eye_layers": 23, "eye_hidden": 1024, "eye_intermediate": 4096, "eye_patches": 577}
_KNOWN = (  # from the config.json of each checkpoint; CLIP's last layer is not used
    Sizes("llava-1.5-7b", 32, 4096, 11008, 32, 32, 128, 32064, 576, **_CLIP),
    Sizes("llava-1.5-13b", 40, 5120, 13824, 40, 40, 128, 32064, 576, **_CLIP),
    Sizes(  # a photo of about 900 x 900 pixels, 64 x 64 patches of 14, merged by 2 x 2
        "qwen2.5-vl-7b", 28, 3584, 18944, 28, 4, 128, 152064, 1024,
        eye_layers=32, eye_hidden=1280, eye_intermediate=3420, eye_gated=True, eye_patches=4096,
    ),
)  # fmt: skip
PRESETS = {sizes.name: sizes for sizes in _KNOWN}
_ALIASES = {
    "llava-hf/llava-1.5-7b-hf": "llava-1.5-7b",
    "llava-hf/llava-1.5-13b-hf": "llava-1.5-13b",
    "qwen/qwen2.5-vl-7b-instruct": "qwen2.5-vl-7b",
}


def sizes(target: str) -> Sizes:
    """Of a preset, "reference", a checkpoint folder or a hub id, of which the config alone is read.

    UserError where there is no such model, or its decoder is of a kind that this roofline does not know.
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
    """Of a `transformers` config of a model of pictures or sounds and text."""
    text = config.get_text_config(decoder=True)
    if any(getattr(text, key, None) for key in ("num_experts", "num_local_experts", "n_routed_experts")):
        raise UserError(f"the decoder of '{name}' is a mixture of experts, for which there is no roofline yet")
    heads = text.num_attention_heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    return Sizes(
        name, text.num_hidden_layers, text.hidden_size, text.intermediate_size, heads,
        getattr(text, "num_key_value_heads", None) or heads, head_dim, text.vocab_size, _image_tokens(config),
        **_eye(getattr(config, "vision_config", None)),
    )  # fmt: skip


def _image_tokens(config: Any) -> int:
    """Placeholders of one image, if the config says."""
    for key in ("image_seq_length", "mm_tokens_per_image"):
        if isinstance(count := getattr(config, key, None), int):
            return count
    return 0


def _eye(vision: Any) -> dict[str, Any]:
    """An encoder that is a transformer over patches of images of one size; nothing for any other."""
    image, patch = (_side(getattr(vision, key, None)) for key in ("image_size", "patch_size"))
    hidden, inner = getattr(vision, "hidden_size", None), getattr(vision, "intermediate_size", None)
    layers = getattr(vision, "num_hidden_layers", None)
    if not (image and patch and hidden and inner and layers):
        return {}
    return {
        "eye_layers": layers, "eye_hidden": hidden, "eye_intermediate": inner, "eye_patches": (image // patch) ** 2,
    }  # fmt: skip


def _side(size: Any) -> int | None:
    return size[0] if isinstance(size, list | tuple) else size
