"""The target: prefills a prompt, scores a tree in one pass, keeps an accepted path.

Wraps any `transformers` model of pictures or sounds and text whose text has 1-D positions, without touching its code:
the prompt goes through the model's own `prepare_inputs_for_generation`, a tree through an additive float 4-D mask.
Families that differ override what differs: positions (`mrope`), who sees whom (`gemma3`, `paligemma`).
This module knows nothing of drafters, distributions or randomness.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
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
from msd.targets.state import AUDIO_FEATURES, Contents, Piece, Source, State, contents, remaining, shared
from msd.targets.taps import Recording, Taps
from msd.targets.vision import VisionCache

KINDS = {"image": VISION.id, "video": VISION.id, "audio": AUDIO.id}  # what placeholders stand for


class Target:
    """Adapter of one model. `taps`: hidden-state indices to record for the drafter (see `Taps`).

    backend: a name of `msd.backends.NAMES`, for how passes are computed. pictures: how the family lays out its images
    and videos. UserError where a part of the model is of a kind that no adapter knows.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        taps: tuple[int, ...] = (),
        vision_cache: VisionCache | None = None,
        backend: str = "measure",
        pictures: Sequence[Pictures] = (Pictures(),),
    ):
        self.text_config = model.config.get_text_config(decoder=True)
        self.windows = self.attention_kinds()
        self.model, self.backend, self.pictures = model, choose(model, backend), tuple(pictures)
        self.taps = Taps(model.get_decoder, taps)
        limit = max((p.limit for p in self.pictures), default=1)
        self.vision = vision_cache if vision_cache is not None else VisionCache(limit)

    @property
    def tokens(self) -> dict[str, int]:
        """ "image", "video" or "audio" -> the token that stands for its features, for what the model takes."""
        found = {kind: getattr(self.model.config, f"{kind}_token_id", None) for kind in KINDS}
        return {kind: token for kind, token in found.items() if token is not None}

    @property
    def placeholders(self) -> dict[int, int]:
        """Token ids that stand for features, with their modality."""
        return {token: KINDS[kind] for kind, token in self.tokens.items()}

    @property
    def raw(self) -> tuple[str, ...]:
        """Names of the tensors of processor output that hold pixels, or sounds."""
        return (*(kind.pixels for kind in self.pictures), AUDIO_FEATURES)

    @property
    def context_length(self) -> int | None:
        """The largest number of positions the model was made for, if it says."""
        return getattr(self.text_config, "max_position_embeddings", None)

    def encode_images(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Replaces pixels in processor output by vision features, each picture encoded once and remembered.

        Returns the inputs with `mm_encoder_outputs` in the place of the pixel tensors; unchanged without pictures.
        Sounds stay as they are: models take their features in no other way, so prefill encodes them.
        """
        return self.vision.encode(self.model, inputs, self.pictures)

    def lay_out(self, input_ids: Tensor, model_kwargs: dict[str, Any], capacity: int) -> tuple[Layout, Tensor]:
        """(the layout of a prompt [B, L], its `position_ids` as the model's own `generate()` prepares them).

        model_kwargs: as for `generate()`; `position_ids` among them are taken as they are.
        """
        given = {k: v for k, v in model_kwargs.items() if k != "past_key_values"}
        prepared = given.get("position_ids")
        if prepared is None:
            prepared = self.model._prepare_position_ids_for_generation(input_ids, {**given, "input_ids": input_ids})
        mask = given.get("attention_mask")
        layout = Layout.from_prompt(input_ids, capacity, mask, self.rotary(prepared), self.placeholders)
        return layout, prepared

    def prefill(
        self,
        input_ids: Tensor,
        model_kwargs: dict[str, Any],
        capacity: int,
        past: State | None = None,
        keep: bool = False,
    ) -> tuple[State, Scores]:
        """Runs the prompt [B, L] (left-padded) and commits it; scores are those of the last token, [B, 1, V].

        past: the state after an earlier turn: what the prompt shares with it is not computed again. keep: the state
        will be such a past. Both for single prompts only. Tap states are those of all L columns in any case.
        """
        B, L = input_ids.shape
        if B > 1 and (keep or past is not None):
            raise UserError(f"a conversation goes on one prompt at a time, got {B}")
        layout, positions = self.lay_out(input_ids, model_kwargs, capacity)
        held = contents(model_kwargs, self.heard(model_kwargs)) if keep or past is not None else {}
        source = Source(self.model, self.taps.indices, self.backend.refresh())
        if keep:
            source.revision.read()
        shared = past is not None and past.source is not None and source.same(past.source)
        cut, pieces = self.shared(layout, held, past) if past is not None and shared else (0, {})
        arguments = remaining(model_kwargs, pieces) if cut else model_kwargs
        cache = KVCache(self.text_config.num_hidden_layers, B, capacity)
        if past is not None and cut:
            cache.copy_prefix(past.cache, cut)
        arguments = {**arguments, "position_ids": positions, "past_key_values": cache}
        inputs = self.model.prepare_inputs_for_generation(
            input_ids, is_first_iteration=True, next_sequence_length=L - cut, use_cache=True, logits_to_keep=1,
            **{k: v for k, v in arguments.items() if k not in ("use_cache", "logits_to_keep")},
        )  # fmt: skip
        with self.recording(check=False) as recorded:
            output = self.model(**inputs, return_dict=True)
        cache.advance(L - cut)
        taps = recorded.take()
        if taps is not None and past is not None and cut:
            assert past.trail is not None
            taps = torch.cat([past.trail[:, :cut], taps], 1)
        state = State(layout, cache, source=source, prefilled=L - cut, contents=held if keep else {})
        if keep and taps is not None:
            state.trail = taps.new_zeros(1, capacity, taps.shape[-1])
            state.trail[:, :L] = taps
        return state, Scores(output.logits[:, -1:], taps)

    def score(self, state: State, tree: DraftTree) -> Scores:
        """One pass over the trees; every node sees the committed prefix and its ancestors. Writes N cache slots.

        Rows that the cache has let go are left out.
        """
        rows, batch = state.cache.rows, tree.batch
        tree = tree.select(rows)
        positions = state.layout.next_positions(tree.depths, rows)  # [A, R, N]
        with self.recording(check=False) as recorded:
            output = self.model(
                input_ids=tree.tokens,
                attention_mask=self.tree_mask(state, tree),
                position_ids=self.positions(positions),
                past_key_values=state.cache,
                use_cache=True,
                return_dict=True,
            )
        taps = recorded.take()
        if state.trail is not None:
            state.scored = taps
        return Scores(output.logits, taps).scatter(rows, batch)

    @contextmanager
    def recording(self, check: bool = True) -> Iterator[Recording]:
        """Passes inside are the backend's, and leave their tap states. check: as in `Fused.running`."""
        with self.taps.recording(partial(self.backend.running, check=check)) as recorded:
            yield recorded

    def rotary(self, position_ids: Tensor) -> Tensor:
        """Layout positions [A, B, L] of the `position_ids` that `generate()` prepares: [B, L] for the 1-D families."""
        return position_ids

    def positions(self, positions: Tensor) -> Tensor:
        """The `position_ids` that the model's `forward` takes for layout positions [A, B, N]: [B, N] in one axis."""
        return positions[0]

    def attention_kinds(self) -> masks.Windows:
        """Kinds of decoder layers by what they see; see `masks.windows`."""
        return masks.windows(self.text_config)

    def both_ways(self, layout: Layout, prompt: int) -> Tensor | None:
        """[B, S, S] bool: columns that see each other whatever their order, of rows with `prompt` columns of prompt.

        None where the model is causal throughout.
        """
        return None

    def heard(self, model_kwargs: dict[str, Any]) -> list[Piece]:
        """The sounds of a prompt, from the arguments of its prefill."""
        sounds = model_kwargs.get(AUDIO_FEATURES)
        return [] if sounds is None else [Piece(sound, None) for sound in sounds]

    def shared(self, layout: Layout, held: Contents, past: State) -> tuple[int, dict[str, int]]:
        """See `msd.targets.state.shared`."""
        return shared(layout, held, past, self.tokens)

    def tree_mask(self, state: State, tree: DraftTree) -> masks.Mask | None:
        """Additive mask [R, 1, N, S] over the S slots in use, by kind of layer; None where all of it would be zero.

        The trees are those of the R rows that the cache holds.
        """
        committed, start = state.cache.base, [state.layout.start[row] for row in state.cache.rows]
        if tree.size == 1 and not any(start) and min(committed) == max(committed) and self.windows == {None: None}:
            return None
        return masks.masks(*masks.tree_view(tree, start, committed), self.windows, self.model.dtype)

    def commit(self, state: State, accepted: Accepted) -> None:
        """Keeps the root and the accepted nodes of every row that emitted something."""
        kept = [[0, *nodes] if tokens else [] for nodes, tokens in zip(accepted.nodes, accepted.tokens, strict=True)]
        state.follow(kept[0])
        state.cache.commit(kept)
