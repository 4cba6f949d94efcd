"""The configuration of an MSD drafter: its form, its optional parts, and the shape of each modality's subtree."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar

from msd.core import modality
from msd.drafters.toolkit import checkpoint
from msd.drafters.toolkit.growth import Shape
from msd.errors import UserError

FORMS = ("ar", "block")
# parts that a network may have
SWITCHES = ("router", "experts", "subtrees", "vision", "transfer", "dynamic", "readout", "motion")
OTHER = Shape(4, 6)
SHAPES = {"language": Shape(3, 6), "vision": Shape(5, 6), "video_reasoning": Shape(5, 6)}


def shapes_of(modalities: Iterable[str] = ("language", "vision", "fusion")) -> dict[str, Shape]:
    """Returns a subtree shape for each modality: narrow for language, wide for vision (docs/trees.md gives why)."""
    return {name: SHAPES.get(name, OTHER) for name in modalities}


@dataclass(frozen=True, kw_only=True)
class MSDConfig(checkpoint.DrafterConfig):
    """The configuration of an MSD drafter.

    form: "ar", one pass per tree level, or "block", one pass for all levels. depth: levels of a block; in the ar form,
    levels that training drafts. layers: decoder layers of the trunk. pair: whether its only layer reads embeddings and
    features side by side, as EAGLE-3's does, instead of a linear map of both. rank: of a modality's expert.
    parent_rank: of the block form's parent term. image_tokens: compressed tokens per image. auxiliary: groups of
    auxiliary tokens, (tokens of the group, tokens kept of it) each; see `AuxiliaryAdaptor`. shapes, shared: the subtree
    shape of each modality, and that of the single tree without `subtrees`. active_from: router probability from which a
    modality has a subtree.
    Each of the `SWITCHES` says whether the network has that part; without any the drafter is the `standard` control.
    Experts, transfer and the compressed image path (`vision`) together lose more by slower training and drafts than
    they gain (docs/drafter.md); the gains of the `readout` of the image, and of the `motion` measured from recordings,
    are not known yet. All five are off by default.
    """

    owner: ClassVar[str] = "an MSD drafter"
    json_keys: ClassVar[dict[str, str]] = {"auxiliary": "beside"}
    omitted: ClassVar[tuple[str, ...]] = ("variant", "readout", "motion", "pair")
    form: str = "block"
    layers: int = 1
    pair: bool = False
    depth: int = 5
    rank: int = 32
    parent_rank: int = 64
    image_tokens: int = 4
    auxiliary: tuple[tuple[int, int], ...] = ()
    modalities: tuple[str, ...] = ("language", "vision", "fusion")
    shapes: dict[str, Shape] = field(default_factory=shapes_of)
    shared: Shape = OTHER
    active_from: float = 0.15
    router: bool = True
    experts: bool = False
    subtrees: bool = True
    vision: bool = False
    transfer: bool = False
    dynamic: bool = True
    readout: bool = False
    motion: bool = False

    def __post_init__(self) -> None:
        if self.form not in FORMS:
            raise UserError(f"form '{self.form}' is unknown; choose one of {', '.join(FORMS)}")
        if self.pair and self.layers > 1:
            raise UserError(f"a trunk of {self.layers} layers reads a map of its input; set pair to false")
        if self.modalities[:1] != ("language",):
            raise UserError("the first modality of a drafter must be 'language', which the others build on")
        for name in self.modalities:
            modality.get(name)
        missing = [name for name in self.modalities if name not in self.shapes]
        if missing:
            raise UserError(f"no subtree shape for modality '{missing[0]}'; add it to `shapes`")

    @classmethod
    def for_target(cls, text_config: Any, draft_vocabulary: int, **changes: Any) -> MSDConfig:
        """Returns the configuration for a `transformers` text config; `changes` override any field."""
        layers = text_config.num_hidden_layers
        own = checkpoint.sizes(text_config) | {
            "draft_vocabulary": draft_vocabulary,
            "taps": tuple(sorted({min(2, layers), layers // 2, layers})),
        }
        if changes.get("form", cls.form) == "block":
            own |= {"depth": 6, "pair": changes.get("layers", cls.layers) == 1}
        return cls(**(own | changes))

    def within(self, shape: Shape, width: int | None = None) -> Shape:
        """Limits a subtree's shape to the depth of the form and to `width`."""
        depth = min(shape.depth, self.depth) if self.form == "block" else shape.depth
        return Shape(shape.width if width is None else min(width, shape.width), depth)

    @property
    def modality_ids(self) -> tuple[int, ...]:
        """Registry ids of `modalities`, in order."""
        return tuple(modality.get(name).id for name in self.modalities)
