"""What an MSD drafter is made of: sizes, parts that are switched on, and the shape of each modality's subtree."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar

from msd.core import modality
from msd.drafters.toolkit import checkpoint
from msd.drafters.toolkit.growth import Shape
from msd.errors import UserError

FORMS = ("ar", "block")
SWITCHES = ("router", "experts", "subtrees", "vision", "transfer", "dynamic")  # parts that can be left out


SHAPES = {
    "language": Shape(3, 6),
    "vision": Shape(5, 6),
    "fusion": Shape(4, 6),
    "event_sparse": Shape(4, 6),
    "event_dense": Shape(4, 6),
    "video_reasoning": Shape(5, 6),
}
OTHER = Shape(4, 6)


def shapes_of(modalities: Iterable[str] = ("language", "vision", "fusion")) -> dict[str, Shape]:
    """Language narrow, vision wide, the rest between; all as deep as a block (docs/drafter.md tells why)."""
    return {name: SHAPES.get(name, OTHER) for name in modalities}


@dataclass(frozen=True)
class MSDConfig(checkpoint.Configuration):
    """Sizes follow the target's text model; H is its hidden size, V its vocabulary, T the number of taps.

    form: "ar", one pass per tree level, or "block", one pass for all levels. depth: levels of a block; in the ar form,
    levels it is trained on. layers: decoder layers of the trunk. draft_vocabulary: ids the drafter can propose.
    rank: of a modality's expert. parent_rank: of the block form's term conditioned on the parent token.
    image_tokens: compressed tokens per image. beside: groups of auxiliary tokens, each (tokens given, tokens
    kept); see `AuxiliaryAdaptor`. shapes, shared: a subtree's shape by modality, and that of the one tree when
    `subtrees` is off. active_from: the router probability from which a modality's subtree exists.
    The switches take one part each out, for controls and ablations: with all of them off the drafter is the
    `standard` control.
    """

    owner: ClassVar[str] = "an MSD drafter"
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    draft_vocabulary: int
    taps: tuple[int, ...]
    rope_theta: float = 10000.0
    eps: float = 1e-5
    form: str = "block"
    layers: int = 2
    depth: int = 6
    rank: int = 32
    parent_rank: int = 64
    image_tokens: int = 4
    beside: tuple[tuple[int, int], ...] = ()
    modalities: tuple[str, ...] = ("language", "vision", "fusion")
    shapes: dict[str, Shape] = field(default_factory=shapes_of)
    shared: Shape = OTHER
    active_from: float = 0.15
    router: bool = True
    experts: bool = True
    subtrees: bool = True
    vision: bool = True
    transfer: bool = True
    dynamic: bool = True

    def __post_init__(self) -> None:
        if self.form not in FORMS:
            raise UserError(f"form '{self.form}' is unknown; choose one of {', '.join(FORMS)}")
        if self.modalities[:1] != ("language",):
            raise UserError("the first modality of a drafter must be 'language', which the others build on")
        for name in self.modalities:
            modality.get(name)
        missing = [name for name in self.modalities if name not in self.shapes]
        if missing:
            raise UserError(f"no subtree shape for modality '{missing[0]}'; add it to `shapes`")

    @classmethod
    def for_target(cls, text_config: Any, draft_vocabulary: int, **changes: Any) -> MSDConfig:
        """The configuration for a `transformers` text config; `changes` override any field."""
        layers = text_config.num_hidden_layers
        own = checkpoint.sizes(text_config) | {
            "draft_vocabulary": draft_vocabulary,
            "taps": tuple(sorted({min(2, layers), layers // 2, layers})),
        }
        if changes.get("form") == "ar":
            own |= {"layers": 1, "depth": 5}
        return cls(**(own | changes))

    def within(self, shape: Shape, width: int | None = None) -> Shape:
        """A subtree's shape as far as the form reaches, and at most `width` wide."""
        depth = min(shape.depth, self.depth) if self.form == "block" else shape.depth
        return Shape(shape.width if width is None else min(width, shape.width), depth)

    @property
    def modality_ids(self) -> tuple[int, ...]:
        """Registry ids of `modalities`, in order."""
        return tuple(modality.get(name).id for name in self.modalities)
