"""What an EventGPT-shaped model is made of."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import CLIPVisionConfig, LlamaConfig

from msd.drafters import configs
from msd.errors import UserError

METHOD = "eventgpt"


@dataclass(frozen=True)
class EventGPTConfig:
    """H is the language model's hidden size, P the patches of a frame.

    frames: of equal event count. image_size, patch_size: pixels. vision_*: of the CLIP tower; vision_layer: which of
    its hidden states is taken, as LLaVA counts (-2: the last but one), without the class token. width, depth: of the
    draft tree, nodes that go on per level and the number of levels. The rest is LLaMA's.
    """

    vocabulary: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vision_hidden: int
    vision_intermediate: int
    vision_layers: int
    vision_heads: int
    image_size: int
    patch_size: int
    vision_layer: int = -2
    frames: int = 5
    rope_theta: float = 10000.0
    eps: float = 1e-5
    positions: int = 2048
    width: int = 4
    depth: int = 6
    method: str = METHOD

    def __post_init__(self) -> None:
        if self.method != METHOD:
            raise UserError(f"its config.json is of method '{self.method}', not '{METHOD}'")
        if self.image_size % self.patch_size or min(self.frames, self.width, self.depth) < 1:
            raise UserError(
                f"frames of {self.image_size} pixels in patches of {self.patch_size}, {self.frames} frames, trees "
                f"{self.width} wide and {self.depth} deep: patches must fill a frame, and all be at least 1"
            )

    @property
    def patches(self) -> int:
        """P."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def tokens(self) -> int:
        """E, event tokens of a recording: one for each frame, and one for each patch position."""
        return self.frames + self.patches

    def vision(self) -> CLIPVisionConfig:
        """The tower's, as `transformers` has it."""
        return CLIPVisionConfig(
            hidden_size=self.vision_hidden, intermediate_size=self.vision_intermediate,
            num_hidden_layers=self.vision_layers, num_attention_heads=self.vision_heads,
            image_size=self.image_size, patch_size=self.patch_size,
        )  # fmt: skip

    def text(self) -> LlamaConfig:
        """The language model's."""
        return LlamaConfig(
            vocab_size=self.vocabulary, hidden_size=self.hidden, intermediate_size=self.intermediate,
            num_hidden_layers=self.layers, num_attention_heads=self.heads, num_key_value_heads=self.kv_heads,
            head_dim=self.head_dim, rms_norm_eps=self.eps, max_position_embeddings=self.positions,
            rope_parameters={"rope_type": "default", "rope_theta": self.rope_theta}, tie_word_embeddings=False,
        )  # fmt: skip

    def as_json(self) -> str:
        """JSON text that `from_json` reads back."""
        return configs.as_json(self)

    @classmethod
    def from_json(cls, text: str) -> EventGPTConfig:
        """Strict: an unknown or missing field is a UserError that names it."""
        return configs.read(text, cls, "an EventGPT drafter")
