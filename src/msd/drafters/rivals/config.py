"""What a rival is made of: the target's sizes, and the few numbers of its own method."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from msd.errors import UserError


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
    options: dict[str, float] = field(default_factory=dict)

    def as_json(self) -> str:
        """JSON text that `from_json` reads back."""
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> RivalConfig:
        """Strict: an unknown or missing field is a UserError that names it."""
        raw = json.loads(text)
        known = {f.name for f in fields(cls)}
        for name in sorted(known.symmetric_difference(raw)):
            how = "unknown" if name in raw else "missing"
            raise UserError(f"its config.json is not that of a drafter here: field '{name}' is {how}")
        return cls(**(raw | {"taps": tuple(raw["taps"])}))


def sizes(text_config: Any) -> dict[str, Any]:
    """The fields of a `RivalConfig` that a `transformers` text config decides."""
    c = text_config
    rope = getattr(c, "rope_parameters", None) or {}
    return {
        "hidden": c.hidden_size,
        "heads": c.num_attention_heads,
        "kv_heads": c.num_key_value_heads,
        "head_dim": getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads,
        "intermediate": c.intermediate_size,
        "vocabulary": c.vocab_size,
        "draft_vocabulary": c.vocab_size,
        "rope_theta": float(rope.get("rope_theta", getattr(c, "rope_theta", 10000.0))),
        "eps": float(getattr(c, "rms_norm_eps", 1e-5)),
    }
