"""What a rival is made of: the target's sizes, and the few numbers of its own method."""

from __future__ import annotations

from dataclasses import dataclass, field

from msd.drafters import configs


@dataclass(frozen=True)
class RivalConfig:
    """Sizes follow the target's text model; H is its hidden size, V its vocabulary.

    method: the name it is published under. layers: decoder layers. taps: indices of the target's hidden states that it
    reads, the final one last. width, depth: of its draft tree, k frontier nodes a level and the number of levels.
    draft_vocabulary: ids that it can propose, V for a full head. options: the method's own numbers, each a key of its
    network's `options`.
    """

    method: str
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    draft_vocabulary: int
    layers: int
    taps: tuple[int, ...]
    width: int
    depth: int
    rope_theta: float = 10000.0
    eps: float = 1e-5
    options: dict[str, int | float] = field(default_factory=dict)

    def as_json(self) -> str:
        """JSON text that `from_json` reads back."""
        return configs.as_json(self)

    @classmethod
    def from_json(cls, text: str) -> RivalConfig:
        """Strict: an unknown or missing field is a UserError that names it."""
        return configs.read(text, cls, "a drafter here")
