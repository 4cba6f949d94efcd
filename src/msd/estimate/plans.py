"""How many tokens a target pass gives, as it is known: a mean acceptance length, one for each tree size, or rates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from msd.errors import UserError
from msd.estimate.probe import probe
from msd.estimate.roofline import CARDS, Card, pass_seconds, prefill_seconds
from msd.estimate.sizes import Sizes


@dataclass(frozen=True)
class Acceptance:
    """Exactly one of the three is given. All lengths count the bonus token, so that 1 means nothing was accepted.

    length: for trees of any size. lengths: by drafted nodes. rates: of the first, second… level of a chain, given that
    the level before was accepted; a tree of n nodes is then a chain of n.
    """

    length: float | None = None
    lengths: dict[int, float] = field(default_factory=dict)
    rates: tuple[float, ...] = ()

    @classmethod
    def parse(cls, text: str) -> Acceptance:
        """From "3.5", "8=3.1,60=4.7" or "0.8,0.7,0.6". UserError for anything else."""
        parts = [part.strip() for part in text.split(",") if part.strip()]
        try:
            if "=" in text:
                pairs = [part.split("=") for part in parts]
                found = cls(lengths={int(nodes): float(length) for nodes, length in pairs})
            elif len(parts) == 1 and float(parts[0]) >= 1:
                found = cls(length=float(parts[0]))
            else:
                found = cls(rates=tuple(float(part) for part in parts))
        except ValueError as error:
            raise UserError(f"--acceptance '{text}' is none of 3.5, 8=3.1,60=4.7 and 0.8,0.7,0.6") from error
        if not found.rates and not found.lengths and found.length is None:
            raise UserError("--acceptance is empty; give a length such as 3.5, or rates such as 0.8,0.7,0.6")
        wrong = [rate for rate in found.rates if not 0 <= rate <= 1]
        wrong += [length for nodes, length in found.lengths.items() if not 1 <= length <= nodes + 1]
        if wrong:
            raise UserError(f"--acceptance '{text}': {wrong[0]:g} is neither a rate in [0, 1] nor a length that fits")
        return found

    def of(self, nodes: int, depth: int) -> float | None:
        """Tokens that a pass over a tree of `nodes` drafted nodes and `depth` levels gives; None where not known."""
        if self.lengths:
            return self.lengths.get(nodes)
        if self.length is not None:
            return min(self.length, 1.0 + min(nodes, depth))
        total, alive = 1.0, 1.0
        for rate in self.rates[: min(nodes, depth)]:
            alive *= rate
            total += alive
        return total

    def sizes(self, usual: tuple[int, ...]) -> tuple[int, ...]:
        """The tree sizes it can speak of."""
        return tuple(sorted(self.lengths)) if self.lengths else usual


def card(name: str) -> Card:
    """A card by name, or "cpu", this machine, measured now (some seconds). UserError names those known."""
    key = name.lower().replace(" ", "-").replace("_", "-")
    if key == "cpu":
        return probe()
    key = {"h100-sxm": "h100", "a100": "a100-80", "4090": "rtx-4090", "3090": "rtx-3090"}.get(key, key)
    if key not in CARDS:
        known = ", ".join(["cpu", *(card.name for card in CARDS.values())])
        raise UserError(f"unknown card '{name}'; known: {known}")
    return CARDS[key]


NODES, BATCHES = (4, 8, 16, 32, 60), (1, 2, 4, 8, 16, 32)
DRAFTERS = ("levels", "block")
BLOCK_VOCABULARY, BLOCK_LAYERS = 4096, 2  # of this project's drafter
USABLE = 0.9  # of a card's memory


@dataclass(frozen=True)
class Workload:
    """prompt: its text tokens. images: shown in it. answer: tokens. depth: levels of a tree.

    drafter: "levels", one decoder layer and the whole output layer for each level, as EAGLE-2 and its kin; "block", two
    layers and an output layer of 4096 words, once for all levels. weight_bytes: of the target's weights; drafters have
    the card's own type.
    """

    prompt: int = 64
    images: int = 1
    answer: int = 256
    depth: int = 5
    drafter: str = "levels"
    weight_bytes: float | None = None

    def __post_init__(self) -> None:
        if self.drafter not in DRAFTERS:
            raise UserError(f"drafter '{self.drafter}' is unknown; choose one of {', '.join(DRAFTERS)}")


def draft_seconds(sizes: Sizes, card: Card, nodes: int, context: int, batch: int, work: Workload) -> float:
    """Seconds of drafting one tree for each of `batch` sequences."""
    depth = min(work.depth, nodes)
    width = max(1, -(-nodes // depth))
    if work.drafter == "block":
        head = sizes.hidden * BLOCK_VOCABULARY
        return pass_seconds(sizes, card, depth, context, batch, layers=BLOCK_LAYERS, head=head)
    extra = 2 * sizes.hidden * sizes.hidden  # the layer that joins state and embedding, read with the output layer
    first = pass_seconds(sizes, card, 1, context, batch, layers=1, head=sizes.head + extra)
    return first + (depth - 1) * pass_seconds(sizes, card, width, context, batch, layers=1, head=sizes.head + extra)


def plans(
    sizes: Sizes, card: Card, acceptance: Acceptance, work: Workload | None = None,
    nodes: Sequence[int] = NODES, batches: Sequence[int] = BATCHES,
) -> list[dict[str, Any]]:  # fmt: skip
    """A row for each batch and tree size: seconds of prefill, plain step, draft and verification; speedups over plain
    decoding on the same kernels, of decoding alone and of a whole answer. `fits`: whether weights and cache do.
    """
    work = work or Workload()
    total = work.prompt + work.images * sizes.image_tokens
    context = total + work.answer // 2
    each = work.weight_bytes if work.weight_bytes is not None else card.dtype_bytes
    rows = []
    for batch in batches:
        prefill = prefill_seconds(sizes, card, total, work.images, batch, work.weight_bytes)
        plain = pass_seconds(sizes, card, 1, context, batch, work.weight_bytes)
        cache = batch * (total + work.answer) * sizes.kv * card.dtype_bytes
        held = (sizes.decoder + sizes.eye + sizes.hidden * sizes.vocabulary) * each + cache
        for size in acceptance.sizes(tuple(nodes)):
            draft = draft_seconds(sizes, card, size, context, batch, work)
            verify = pass_seconds(sizes, card, size + 1, context, batch, work.weight_bytes)
            length = acceptance.of(size, work.depth)
            assert length is not None
            token = (draft + verify) / length
            rows.append(
                {
                    "batch": batch, "nodes": size, "acceptance_length": length, "prefill_s": prefill,
                    "plain_s": plain, "draft_s": draft, "verify_s": verify, "speedup_decode": plain / token,
                    "speedup": (prefill + work.answer * plain) / (prefill + work.answer * token),
                    "tokens_per_second": batch * work.answer / (prefill + work.answer * token),
                    "fits": held <= USABLE * card.memory,
                }
            )  # fmt: skip
    return rows
