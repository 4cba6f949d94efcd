"""Target: the adapter of one model. It prefills a prompt, scores a tree in one pass and commits an accepted path.

Wraps any `transformers` model for images or sounds whose text has 1-D positions, without changing its code: a prompt
goes through the model's own `prepare_inputs_for_generation`, a tree through an additive 4-D mask. Families that differ
override the methods for positions (`mrope`) or for the attention mask (`bidirectional`).
This module does not depend on drafters, probability distributions or randomness.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from msd.backends import choose
from msd.core.cache import KVCache
from msd.core.layout import Layout
from msd.core.modality import AUDIO, VISION
from msd.core.tree import Accepted, DraftTree, Scores
from msd.errors import UserError
from msd.targets import masks
from msd.targets.pictures import Pictures
from msd.targets.state import (
    AUDIO_FEATURES,
    Media,
    MediaItem,
    Source,
    State,
    media_items,
    reusable_prefix,
    without_reused,
)
from msd.targets.taps import FINAL, Recording, Taps
from msd.targets.vision import VisionCache

MODALITIES = {"image": VISION.id, "video": VISION.id, "audio": AUDIO.id}
TENSORS = {"image": "pixel_values", "video": "pixel_values_videos", "audio": AUDIO_FEATURES}


class Target:
    """Adapter of one model.

    taps: hidden-state indices to record for the drafter (see `Taps`), or `FINAL`. backend: one of `msd.backends.NAMES`.
    pictures: the tensor layouts of the family's images and videos. UserError for a decoder layer of an unknown type.
    """

    resumes = True  # whether `score` can leave out nodes that it has scored before
    reuses_prefix = True  # whether a prompt can reuse the cache of an earlier turn that it begins with
    modalities: tuple[str, ...] = tuple(MODALITIES)  # what a prompt may contain besides text
    frozen = False  # whether the caller says that no weight of the model changes
    bidirectional_layers: str | None = None  # the layer type to which `bidirectional_mask` is limited

    def __init__(
        self,
        model: PreTrainedModel,
        taps: tuple[int, ...] = (),
        vision_cache: VisionCache | None = None,
        backend: str = "measure",
        pictures: Sequence[Pictures] = (Pictures(),),
    ):
        self.text_config = model.config.get_text_config(decoder=True)
        self.windows = self.attention_windows()
        self.model, self.backend, self.pictures = model, choose(model, backend), tuple(pictures)
        last = self.text_config.num_hidden_layers
        self.taps = Taps(model, tuple(last if index == FINAL else index for index in taps))
        limit = max((p.limit for p in self.pictures), default=1)
        self.vision = vision_cache if vision_cache is not None else VisionCache(limit)

    @property
    def placeholder_ids(self) -> dict[str, int]:
        """ "image", "video" or "audio" -> id of its placeholder token, for each kind of input the model accepts."""
        found = {kind: getattr(self.model.config, f"{kind}_token_id", None) for kind in MODALITIES}
        return {kind: token for kind, token in found.items() if token is not None}

    @property
    def placeholders(self) -> dict[int, int]:
        """Id of each placeholder token -> its modality id."""
        return {token: MODALITIES[kind] for kind, token in self.placeholder_ids.items()}

    @property
    def media_tensors(self) -> tuple[str, ...]:
        """Names of the processor's tensors that hold pixels or audio features."""
        return (*(kind.pixels for kind in self.pictures), AUDIO_FEATURES)

    @property
    def context_length(self) -> int | None:
        """The largest number of positions that the model supports, or None where its config has no limit."""
        return getattr(self.text_config, "max_position_embeddings", None)

    def encode_images(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Replaces pixels in processor output by vision features from the cache, or from the encoder.

        Returns the inputs with `mm_encoder_outputs` instead of the pixel tensors; unchanged without images or videos.
        Audio tensors remain: `forward` has no argument for encoded sounds, so prefill encodes them. UserError for a
        kind of input that is not supported.
        """
        for kind, name in TENSORS.items():
            if kind not in self.modalities and inputs.get(name) is not None:
                own = self.model.config.model_type
                raise UserError(f"'{own}' supports {' and '.join(self.modalities)}, not {kind}; see 'msd targets'")
        return self.vision.encode(self.model, inputs, self.pictures, self.frozen)

    def lay_out(self, input_ids: Tensor, model_kwargs: dict[str, Any], capacity: int) -> tuple[Layout, Tensor]:
        """(the layout of a prompt [B, L], its `position_ids` as the model's own `generate()` prepares them).

        model_kwargs: as for `generate()`; `position_ids` in them are used unchanged.
        """
        kwargs = {k: v for k, v in model_kwargs.items() if k != "past_key_values"}
        prepared = kwargs.get("position_ids")
        if prepared is None:
            prepared = self.model._prepare_position_ids_for_generation(input_ids, {**kwargs, "input_ids": input_ids})
        mask, positions = kwargs.get("attention_mask"), self.layout_positions(prepared)
        return Layout.from_prompt(input_ids, capacity, mask, positions, self.placeholders), prepared

    def prefill(
        self,
        input_ids: Tensor,
        model_kwargs: dict[str, Any],
        capacity: int,
        past: State | None = None,
        keep: bool = False,
    ) -> tuple[State, Scores]:
        """Runs the prompt [B, L] (left-padded) and commits it. The scores are those of the last token, [B, 1, V].

        past: the state after an earlier turn, whose common prefix is not computed again. keep: also store what the next
        turn needs to reuse this state. Both require B = 1 (UserError). Tap states cover all L columns in any case.
        """
        B, L = input_ids.shape
        if B > 1 and (keep or past is not None):
            raise UserError(f"a conversation continues with one prompt at a time, got {B}")
        layout, positions = self.lay_out(input_ids, model_kwargs, capacity)
        media = media_items(model_kwargs, self.audio_items(model_kwargs)) if keep or past is not None else {}
        source = Source(self.model, self.taps.indices, self.backend.refresh(self.frozen))
        if keep and not self.frozen:
            source.revision.read()
        if past is not None and (past.source is None or not source.same(past.source) or not self.reuses_prefix):
            past = None
        reused, counts = (0, {}) if past is None else self.reusable(layout, media, past)
        cache = self.new_cache(B, capacity)
        if past is not None and reused:
            cache.copy_prefix(past.cache, reused)
            model_kwargs = without_reused(model_kwargs, counts)
        arguments = {**model_kwargs, "position_ids": positions, "past_key_values": cache}
        inputs = self.model.prepare_inputs_for_generation(
            input_ids, is_first_iteration=True, next_sequence_length=L - reused, use_cache=True,
            logits_to_keep=self.kept_logits(1),
            **{k: v for k, v in arguments.items() if k not in ("use_cache", "logits_to_keep")},
        )  # fmt: skip
        with self.recording(check=False) as recorded:
            output = self.model(**inputs, return_dict=True)
        cache.advance(L - reused)
        taps = recorded.take()
        if taps is not None and reused:
            assert past is not None and past.tap_history is not None
            taps = torch.cat([past.tap_history[:, :reused], taps], 1)
        state = State(layout, cache, source=source, prefilled=L - reused, media=media if keep else {})
        if keep and taps is not None:
            state.tap_history = taps.new_zeros(1, capacity, taps.shape[-1])
            state.tap_history[:, :L] = taps
        return state, Scores(output.logits[:, -1:], taps)

    def score(self, state: State, tree: DraftTree, scored: int = 0) -> Scores:
        """Scores the trees in one pass: each node attends to the committed prefix and its ancestors.

        Writes N cache slots. Skips rows that the cache has dropped. scored: the first nodes, whose slots earlier calls
        for a smaller tree have written; the scores [B, N - scored, V] are those of the other nodes.
        """
        rows, batch = state.cache.rows, tree.batch
        tree = tree.select(rows)
        positions = state.layout.next_positions(tree.depths[:, scored:], rows)  # [A, R, N - scored]
        mask = self.tree_mask(state, tree, scored)
        with state.cache.behind(scored), self.recording(check=False) as recorded, self.scoring(state, tree):
            output = self.model(
                input_ids=tree.tokens[:, scored:],
                attention_mask=mask,
                position_ids=self.position_ids(positions),
                past_key_values=state.cache,
                use_cache=True,
                return_dict=True,
            )
        taps = recorded.take()
        if state.tap_history is not None:
            state.tree_taps = taps
        return Scores(output.logits, taps).scatter(rows, batch)

    @contextmanager
    def recording(self, check: bool = True) -> Iterator[Recording]:
        """Runs the passes inside on the backend and records their tap states. check: as in `Backend.running`."""
        with self.taps.recording(partial(self.backend.running, check=check)) as recorded:
            yield recorded

    def new_cache(self, batch: int, capacity: int) -> KVCache:
        """An empty cache for `batch` rows of `capacity` slots."""
        return KVCache(self.text_config.num_hidden_layers, batch, capacity)

    def reusable(self, layout: Layout, media: Media, past: State) -> tuple[int, dict[str, int]]:
        """What a prompt reuses of an earlier turn; see `reusable_prefix`."""
        return reusable_prefix(layout, media, past, self.placeholder_ids)

    def scoring(self, state: State, tree: DraftTree) -> AbstractContextManager[None]:
        """Context of a pass over trees, for models that need more than a mask. tree: of the R rows in the cache."""
        return nullcontext()

    def layer_masks(self, mask: masks.Mask, columns: Tensor | None) -> masks.Mask:
        """The masks of the attention layers, and of layers of other kinds, which the base class does not have.

        columns: [B, S] bool, False at columns of whole rows that these layers must not read; None: they read all.
        """
        return mask

    def kept_logits(self, count: int) -> int | Tensor:
        """The `logits_to_keep` argument of a pass that needs the logits of the last `count` columns."""
        return count

    def layout_positions(self, position_ids: Tensor) -> Tensor:
        """Layout positions [A, B, L] (or [B, L] for one axis) from the `position_ids` that `generate()` prepares."""
        return position_ids

    def position_ids(self, positions: Tensor) -> Tensor:
        """The `position_ids` argument of `forward` from layout positions [A, B, N]: [B, N] for one axis."""
        return positions[0]

    def attention_windows(self) -> masks.Windows:
        """The decoder's layer types with their windows; see `masks.attention_windows`."""
        return masks.attention_windows(self.text_config)

    def bidirectional_mask(self, layout: Layout, types: Tensor) -> Tensor | None:
        """[B, S, S] bool: pairs of columns that attend to each other in any order. None for causal models.

        types: [B, L] token types of the prompt.
        """
        return None

    def audio_items(self, model_kwargs: dict[str, Any]) -> list[MediaItem]:
        """The sounds of a prompt, from the arguments of its prefill."""
        sounds = model_kwargs.get(AUDIO_FEATURES)
        return [] if sounds is None else [MediaItem(sound, None) for sound in sounds]

    def tree_mask(self, state: State, tree: DraftTree, scored: int = 0) -> masks.Mask | None:
        """Additive mask [R, 1, N - scored, S] over the S slots in use, by layer type; None where it would be all zero.

        tree: the trees of the R rows in the cache. scored: see `score`.
        """
        committed, start = state.cache.base, [state.layout.start[row] for row in state.cache.rows]
        if tree.size == 1 and not any(start) and min(committed) == max(committed) and self.windows == {None: None}:
            return None
        tables = masks.without_first(masks.tree_tables(tree, start, committed), scored)
        return self.layer_masks(masks.masks(tables, self.windows, self.model.dtype), None)

    def commit(self, state: State, accepted: Accepted) -> None:
        """Keeps the root and the accepted nodes in the cache, for each row that emitted a token."""
        kept = [[0, *nodes] if tokens else [] for nodes, tokens in zip(accepted.nodes, accepted.tokens, strict=True)]
        state.append_taps(kept[0])
        state.cache.commit(kept)
