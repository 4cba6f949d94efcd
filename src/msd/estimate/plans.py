"""Estimates the speedup for each batch and tree size, given an acceptance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from operator import mul
from typing import Any

from msd.errors import UserError
from msd.estimate.probe import probe
from msd.estimate.roofline import CARDS, Card, pass_seconds, prefill_seconds
from msd.estimate.sizes import Sizes

NODES, BATCHES = (4, 8, 16, 32, 60), (1, 2, 4, 8, 16, 32)
DRAFTERS = ("levels", "block", "mtp")
BLOCK_VOCABULARY, BLOCK_LAYERS = 4096, 2  # of this project's drafter
USABLE = 0.9  # share of a card's memory
_ALIASES = {"h100-sxm": "h100", "a100": "a100-80", "4090": "rtx-4090", "3090": "rtx-3090"}


@dataclass(frozen=True)
class Acceptance:
    """Acceptance in one of three forms; exactly one field is set. Lengths include the bonus token, so they are ≥ 1.

    length: mean acceptance length of every tree. lengths: number of drafted nodes -> mean acceptance length. rates: for
    each level of a chain, the probability that its draft is accepted if the draft before it was. With rates, a tree of
    n nodes and d levels counts as a chain of min(n, d) drafts.
    """

    length: float | None = None
    lengths: dict[int, float] = field(default_factory=dict)
    rates: tuple[float, ...] = ()

    @classmethod
    def parse(cls, text: str) -> Acceptance:
        """Parses "3.5" (a length), "8=3.1,60=4.7" (lengths) or "0.8,0.7,0.6" (rates). Raises UserError otherwise.

        A single number is a length if it is at least 1, else the rate of a chain of one draft.
        """
        parts = [part.strip() for part in text.split(",") if part.strip()]
        try:
            if "=" in text:
                pairs = [part.split("=") for part in parts]
                parsed = cls(lengths={int(nodes): float(length) for nodes, length in pairs})
                if len(parsed.lengths) < len(pairs):
                    raise UserError(f"--acceptance '{text}' has a tree size twice; give each once")
            elif len(parts) == 1 and float(parts[0]) >= 1:
                parsed = cls(length=float(parts[0]))
            else:
                parsed = cls(rates=tuple(float(part) for part in parts))
        except ValueError as error:
            raise UserError(f"--acceptance '{text}' is invalid; give 3.5, 8=3.1,60=4.7 or 0.8,0.7,0.6") from error
        if not parts:
            raise UserError("--acceptance is empty; give a length such as 3.5, or rates such as 0.8,0.7,0.6")
        wrong = [rate for rate in parsed.rates if not 0 <= rate <= 1]
        wrong += [length for nodes, length in parsed.lengths.items() if not 1 <= length <= nodes + 1]
        if wrong:
            raise UserError(f"--acceptance '{text}': {wrong[0]:g} is no rate in [0, 1] or length in [1, nodes + 1]")
        return parsed

    def of(self, nodes: int, depth: int) -> float | None:
        """Returns the mean acceptance length for `nodes` drafts in `depth` levels; None if not in `lengths`."""
        if self.lengths:
            return self.lengths.get(nodes)
        if self.length is not None:
            return min(self.length, 1.0 + min(nodes, depth))
        return 1.0 + sum(accumulate(self.rates[: min(nodes, depth)], mul))

    def sizes(self, default: tuple[int, ...]) -> tuple[int, ...]:
        """Returns the tree sizes with a known length; `default` if the length does not depend on the size."""
        return tuple(sorted(self.lengths)) if self.lengths else default


@dataclass(frozen=True)
class Workload:
    """One request: text tokens of the prompt, number of images, tokens of the answer, levels of the draft tree.

    drafter: "levels", one decoder layer and the whole output layer for each level, as in EAGLE-2; or "block", two
    layers and an output layer of 4,096 tokens, once for all levels; or "mtp", the target's own multi-token-prediction
    layers, one and the whole output layer for each level. weight_bytes: bytes per weight of the target, by
    default those of the card's dtype, which the drafter always has. model: a smaller model that drafts instead, one
    pass per level, after a prompt of its own with the same images; an assistant reads the target's keys instead.
    """

    prompt: int = 64
    images: int = 1
    answer: int = 256
    depth: int = 5
    drafter: str = "levels"
    weight_bytes: float | None = None
    model: Sizes | None = None

    def __post_init__(self) -> None:
        if self.drafter not in DRAFTERS:
            raise UserError(f"drafter '{self.drafter}' is unknown; choose one of {', '.join(DRAFTERS)}")
        if self.model is not None and self.drafter != "levels":
            raise UserError(f"a draft model drafts level by level; leave out --drafter-kind {self.drafter}")


def card(name: str) -> Card:
    """Returns the card `name`, or for "cpu" this machine, measured now. Raises UserError for an unknown name."""
    key = name.lower().replace(" ", "-").replace("_", "-")
    if key == "cpu":
        return probe()
    key = _ALIASES.get(key, key)
    if key not in CARDS:
        known = ", ".join(["cpu", *(card.name for card in CARDS.values())])
        raise UserError(f"unknown card '{name}'; known: {known}")
    return CARDS[key]


def draft_seconds(sizes: Sizes, card: Card, nodes: int, context: int, batch: int, work: Workload) -> float:
    """Estimates the seconds that drafting one tree for each of `batch` sequences takes."""
    depth = min(work.depth, nodes)
    width = max(1, -(-nodes // depth))
    if work.model is not None:
        first, other = (pass_seconds(work.model, card, rows, context, batch) for rows in (1, width))
        return first + (depth - 1) * other
    if work.drafter == "block":
        head = sizes.hidden * BLOCK_VOCABULARY
        return pass_seconds(sizes, card, depth, context, batch, layers=BLOCK_LAYERS, head=head)
    if work.drafter == "mtp":
        layers = sizes.mtp_layers
        share = replace(layers, counted=layers.counts.share(layers.layers))  # each level runs one layer
        first, other = (pass_seconds(share, card, rows, context, batch, head=sizes.head) for rows in (1, width))
        return first + (depth - 1) * other
    head = sizes.head + 2 * sizes.hidden * sizes.hidden  # with the layer that joins hidden state and embedding
    first = pass_seconds(sizes, card, 1, context, batch, layers=1, head=head)
    return first + (depth - 1) * pass_seconds(sizes, card, width, context, batch, layers=1, head=head)


def _own_prompt(sizes: Sizes, card: Card, batch: int, work: Workload) -> tuple[float, float]:
    """Estimates (seconds in which a drafter reads the prompt, bytes of its weights and cache).

    Of a draft model, and of a target's own layers; zeros for a draft head, which reads with the target's pass.
    """
    if work.model is None and work.drafter != "mtp":
        return 0.0, 0.0
    if work.model is None:
        layers, tokens = sizes.mtp_layers, work.prompt + work.images * sizes.image_tokens
        weights = layers.counts.dense + layers.counts.experts
        memory = (weights + batch * (tokens + work.answer) * layers.kv) * card.dtype_bytes
        return pass_seconds(layers, card, tokens, 0, batch, head=0), memory
    model = work.model
    if model.shares_cache:
        return 0.0, model.model * card.dtype_bytes
    tokens = work.prompt + work.images * model.image_tokens
    memory = (model.model + batch * (tokens + work.answer) * model.kv) * card.dtype_bytes
    return prefill_seconds(model, card, tokens, work.images, batch), memory


def plans(
    sizes: Sizes, card: Card, acceptance: Acceptance, work: Workload | None = None,
    nodes: Sequence[int] = NODES, batches: Sequence[int] = BATCHES,
) -> list[dict[str, Any]]:  # fmt: skip
    """Returns a row for each batch and tree size.

    A row holds the seconds of prefill, plain step, draft and verification, and the speedups over plain decoding on the
    same kernels: of decoding alone and of a whole answer. `memory_bytes`: weights, cache and states of the target,
    weights and cache of a draft model or of the target's own layers; `fits`: whether they fit into memory.
    """
    work = work or Workload()
    if work.drafter == "mtp" and sizes.mtp is None:
        raise UserError(
            f"the config of '{sizes.name}' has no multi-token-prediction layers; leave out --drafter-kind mtp"
        )
    total = work.prompt + work.images * sizes.image_tokens
    context = total + work.answer // 2
    weight_bytes = work.weight_bytes if work.weight_bytes is not None else card.dtype_bytes
    rows = []
    for batch in batches:
        prefill = prefill_seconds(sizes, card, total, work.images, batch, work.weight_bytes)
        plain = pass_seconds(sizes, card, 1, context, batch, work.weight_bytes)
        memory = sizes.model * weight_bytes + batch * (total + work.answer) * sizes.kv * card.dtype_bytes
        own, drafter_memory = _own_prompt(sizes, card, batch, work)
        for size in acceptance.sizes(tuple(nodes)):
            draft = draft_seconds(sizes, card, size, context, batch, work)
            levels = min(work.depth, size) + 1
            verify = pass_seconds(sizes, card, size + 1, context, batch, work.weight_bytes, levels=levels)
            states = batch * (size + 2) * sizes.counts.states * card.dtype_bytes  # after each node, and before the root
            length = acceptance.of(size, work.depth)
            assert length is not None
            token = (draft + verify) / length
            rows.append(
                {
                    "batch": batch, "nodes": size, "acceptance_length": length, "prefill_s": prefill,
                    "plain_s": plain, "draft_s": draft, "verify_s": verify, "speedup_decode": plain / token,
                    "speedup": (prefill + work.answer * plain) / (prefill + own + work.answer * token),
                    "tokens_per_second": batch * work.answer / (prefill + own + work.answer * token),
                    "memory_bytes": memory + states + drafter_memory,
                    "fits": memory + states + drafter_memory <= USABLE * card.memory,
                }
            )  # fmt: skip
    return rows
