"""The target: prefills a prompt, scores a tree in one pass, keeps an accepted path.

Wraps any `transformers` image-text-to-text model with 1-D rotary or learned positions, without touching its code: the
prompt goes through the model's own `prepare_inputs_for_generation`, a tree through an additive float 4-D mask (a
boolean one is silently wrong under `eager` attention). This module knows nothing of drafters, laws or randomness.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from msd.backends import choose
from msd.cache import KVCache
from msd.layout import Layout, image_placeholders
from msd.targets.taps import Taps
from msd.targets.vision import VisionCache
from msd.tree import Accepted, DraftTree, Scores


@dataclass
class State:
    """One batch in flight: its text, its cache, and what the drafter remembers of it."""

    layout: Layout
    cache: KVCache
    memory: Any = field(default=None)


class Target:
    """Adapter of one model. `taps`: hidden-state indices to record for the drafter (see `Taps`).

    backend: a name of `msd.backends.NAMES`, for how passes are computed.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        taps: tuple[int, ...] = (),
        vision_cache: VisionCache | None = None,
        backend: str = "measure",
    ):
        self.model, self.backend = model, choose(model, backend)
        self.text_config = model.config.get_text_config(decoder=True)
        self.taps = Taps(model.get_decoder(), taps)
        self.vision = vision_cache if vision_cache is not None else VisionCache()

    @property
    def placeholders(self) -> dict[int, int]:
        """Token ids that stand for image features, with their modality."""
        config = self.model.config
        return image_placeholders([getattr(config, f"{kind}_token_id", None) for kind in ("image", "video")])

    @property
    def context_length(self) -> int | None:
        """The largest number of positions the model was made for, if it says."""
        return getattr(self.text_config, "max_position_embeddings", None)

    def encode_images(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Replaces pixels in processor output by vision features, each image encoded once and remembered.

        Returns the inputs with `mm_encoder_outputs` in the place of the pixel tensors; unchanged without images.
        """
        return self.vision.encode(self.model, inputs)

    def prefill(self, input_ids: Tensor, model_kwargs: dict[str, Any], capacity: int) -> tuple[State, Scores]:
        """Runs the prompt [B, L] (left-padded) and commits it; scores are those of the last token, [B, 1, V]."""
        B, L = input_ids.shape
        mask, positions = model_kwargs.get("attention_mask"), model_kwargs.get("position_ids")
        layout = Layout.from_prompt(input_ids, capacity, mask, positions, self.placeholders)
        cache = KVCache(self.text_config.num_hidden_layers, B, capacity)
        if positions is None:  # the model's own default would count padding
            model_kwargs = {**model_kwargs, "position_ids": self.positions(layout.positions[:, :, :L])}
        model_kwargs = {**model_kwargs, "past_key_values": cache, "use_cache": True, "logits_to_keep": 1}
        inputs = self.model.prepare_inputs_for_generation(input_ids, is_first_iteration=True, **model_kwargs)
        with self.recording() as taps:
            output = self.model(**inputs, return_dict=True)
        cache.advance(L)
        return State(layout, cache), Scores(output.logits[:, -1:], taps.take())

    def score(self, state: State, tree: DraftTree) -> Scores:
        """One pass over the trees; every node sees the committed prefix and its ancestors. Writes N cache slots."""
        positions = state.layout.next_positions(tree.depths)  # [A, B, N]
        with self.recording(check=False) as taps:
            output = self.model(
                input_ids=tree.tokens,
                attention_mask=self.tree_mask(state, tree),
                position_ids=self.positions(positions),
                past_key_values=state.cache,
                use_cache=True,
                return_dict=True,
            )
        return Scores(output.logits, taps.take())

    @contextmanager
    def recording(self, check: bool = True) -> Iterator[Taps]:
        """Passes inside are the backend's, and leave their tap states. check: as in `Fused.running`."""
        with self.taps.recording() as taps, self.backend.running(taps.keep if taps.indices else None, check):
            yield taps

    def positions(self, positions: Tensor) -> Tensor:
        """The model's `position_ids` for positions [A, B, N]: [B, N] for the 1-D families."""
        return positions[0]

    def tree_mask(self, state: State, tree: DraftTree) -> Tensor | None:
        """Additive mask [B, 1, N, S] over the S slots in use, or None where all of it would be zero."""
        committed, start = state.cache.committed, state.layout.start
        if tree.size == 1 and not any(start) and min(committed) == max(committed):
            return None
        device = tree.tokens.device
        slots = torch.arange(max(committed) + tree.size, device=device)  # [S]
        first = torch.tensor(start, device=device)[:, None]
        base = torch.tensor(committed, device=device)[:, None]
        prefix = (slots >= first) & (slots < base)  # [B, S]
        index = (slots - base).clamp(0, tree.size - 1)  # node written at each slot, [B, S]
        inside = (slots >= base) & (slots < base + tree.size)
        above = tree.ancestors().gather(2, index[:, None].expand(-1, tree.size, -1))  # [B, N, S]
        seen = prefix[:, None] | (above & inside[:, None])
        dtype = self.model.dtype
        mask = torch.zeros(seen.shape, dtype=dtype, device=device)
        return mask.masked_fill_(~seen, torch.finfo(dtype).min)[:, None]

    def commit(self, state: State, accepted: Accepted) -> None:
        """Keeps the root and the accepted nodes of every row that emitted something."""
        state.cache.commit(
            [[0, *nodes] if tokens else [] for nodes, tokens in zip(accepted.nodes, accepted.tokens, strict=True)]
        )
