"""From times of passes to speedups: what each tree size and batch would give."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from msd.errors import UserError
from msd.estimate.acceptance import Acceptance
from msd.estimate.cards import Card
from msd.estimate.roofline import pass_seconds, prefill_seconds
from msd.estimate.sizes import Sizes

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
