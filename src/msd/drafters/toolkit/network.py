"""The base of all draft networks: the target's embedding and output layer, and the context of a draft.

A method defines which columns it reads (`select_columns`), the input of its layers (`feature`, `entry`), and how it
drafts: level by level or all levels in one pass (`msd.drafters.toolkit.levels`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from msd.backends.norms import rms_norm
from msd.backends.packed import Linear, Packed, can_pack
from msd.core.layout import Layout
from msd.drafters.toolkit import checkpoint, processes
from msd.drafters.toolkit.chance import NodeFeatures, Weights, corrected, log_chance
from msd.drafters.toolkit.context import Anchors, Columns, Entries, Selection, select_columns, text_columns
from msd.drafters.toolkit.growth import Levels
from msd.drafters.toolkit.layers import Cosines, KeyValues, Layer, Rotary
from msd.drafters.toolkit.probe import Probe
from msd.drafters.toolkit.training import Objective
from msd.errors import UserError
from msd.targets.taps import output_layer
from msd.targets.teacher import TeacherBatch

Store = Callable[[int, KeyValues], KeyValues]
Parts = dict[str, Tensor]
Loss = Callable[[Any, TeacherBatch, Tensor], tuple[Tensor, Parts]]
END_LOGIT = 1.4  # of an ending (probability 0.8); above it a draft is not worth its time
PADDING = 256  # rows by which checkpoints of one model pad their vocabularies differently
_packed: WeakKeyDictionary[nn.Module, dict[torch.dtype, Packed]] = WeakKeyDictionary()


@dataclass(frozen=True, kw_only=True)
class NetworkConfig(checkpoint.DrafterConfig):
    """The configuration of a published method.

    method: its published name. layers: decoder layers. width, depth: of its draft tree, frontier nodes per level and
    levels. options: the method's own numbers, with the keys of its network's `options`.
    """

    method: str
    layers: int
    width: int
    depth: int
    options: dict[str, int | float] = field(default_factory=dict)


class DraftNetwork(nn.Module, ABC):
    """The weights of a drafter. A subclass becomes a method when it is registered (`msd.drafters.registry`).

    method, published_loss, objective_type, drafter: set by the registration. layer: the class of its decoder layers.
    deep: whether context runs through all layers, as in a language model, or enters every layer unchanged.
    roots: answer tokens per row to draft from in a training step, by default. prompt_roots: tokens at the
    prompt's end that training drafts from too. reach: levels that training drafts below each root. stages: of
    training, as shares of its steps (steps on text alone, steps until all are about images, share of these at
    first, share of text kept); None: the run's settings. reduced: whether it has its own draft vocabulary.
    options: the method's own numbers and their defaults. forms, parts: what `--form` and `--parts` of `msd train`
    can name. routes: whether it predicts modalities for verification policies.
    """

    method: ClassVar[str]
    published_loss: ClassVar[Loss | None] = None
    objective_type: ClassVar[Callable[..., Objective] | None] = None
    drafter: ClassVar[Callable[..., Any]]
    layer: ClassVar[type[Layer]] = Layer
    deep: ClassVar[bool] = False
    layer_count: ClassVar[int] = 1
    width: ClassVar[int] = 10
    depth: ClassVar[int] = 5
    roots: ClassVar[int] = 24
    prompt_roots: ClassVar[int] = 0
    reach: ClassVar[int] = 1
    stages: ClassVar[tuple[float, float, float, float] | None] = (0.02, 0.1, 0.5, 0.05)
    reduced: ClassVar[bool] = False
    options: ClassVar[dict[str, float]] = {}
    forms: ClassVar[tuple[str, ...]] = ()
    parts: ClassVar[tuple[str, ...]] = ()
    routes: ClassVar[bool] = False
    ending: Probe | None

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.add_inputs()
        self.rotary = Rotary(config.head_dim, config.rope_theta, config.variant)
        self.layers = nn.ModuleList(self.layer(config) for _ in range(config.layers))
        self.stack: list[Layer] = list(self.layers)  # type: ignore[arg-type]
        self.embed_tokens = nn.Embedding(config.vocabulary, config.hidden) if config.variant.embedding else None
        self.register_module("ending", None)
        self.provenance: dict[str, Any] = {}  # the training record
        self.calibration: Weights | None = None  # of node chances (`msd.drafters.toolkit.chance`)
        self._target: list[nn.Module] = []  # embedding and output layer; a list keeps them out of the state dict
        self._dtype: torch.dtype | None = None  # of packed products
        self._head_packed = False

    def add_inputs(self) -> None:
        """Creates the modules whose initial weights are drawn before those of the layers."""
        if self.config.options.keys() != self.options.keys():
            wrong = sorted(self.config.options.keys() ^ self.options.keys())[0]
            raise UserError(f"method '{self.method}' has the options {sorted(self.options)}: see '{wrong}'")

    @classmethod
    def tapped(cls, layers: int) -> tuple[int, ...]:
        """Returns the hidden states that it reads of a target with `layers` layers: 0, the embeddings, to `layers`."""
        return (0, layers)

    @classmethod
    def for_target(cls, text_config: Any, **changes: Any) -> Self:
        """Creates a network for a `transformers` text config; `changes` override fields, or single `options`."""
        options = cls.options | changes.pop("options", {})
        own = {
            "method": cls.method, "layers": cls.layer_count, "taps": cls.tapped(text_config.num_hidden_layers),
            "width": cls.width, "depth": cls.depth, "options": options, "draft_vocabulary": text_config.vocab_size,
        }  # fmt: skip
        return cls(NetworkConfig(**(checkpoint.sizes(text_config) | own | changes)))

    @classmethod
    def trained_as(cls, settings: Any, auxiliary: tuple[tuple[int, int], ...] | None) -> dict[str, Any]:
        """Returns the changes for `for_target` that a run's settings imply (`msd.train.drafting.DraftTraining`).

        auxiliary: groups of auxiliary tokens in the training data (`AuxiliaryAdaptor`); None without any.
        """
        return {}

    @classmethod
    def adopted(cls, trained: DraftNetwork) -> DraftNetwork:
        """Returns the network that drafts with the weights of `trained`, possibly another method's."""
        return trained

    def objective(self, settings: Any = None, ends: Sequence[int] = ()) -> Objective:
        """Returns what training minimises. settings: of MSD's loss, or its defaults. ends: ids that end an answer."""
        kind = type(self).objective_type
        return Objective(self, ends) if kind is None else kind(self, settings, ends=ends)

    def twin(self, text_config: Any) -> Self:
        """Creates a network of this method with random weights and the whole vocabulary, for a target of any size."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            network = self._alike(text_config)
            for p in network.parameters():
                if not p.any():
                    nn.init.normal_(p, std=0.3)
        return network

    def _alike(self, text_config: Any) -> Self:
        return self.for_target(text_config)

    def begin_from(self, model: PreTrainedModel) -> None:
        """Initialises weights from the target before training; most methods keep random ones."""

    def choose_draft_vocabulary(self, ids: Tensor) -> None:
        """Sets the draft vocabulary of a `reduced` method to the ascending target ids [Vd]."""
        raise NotImplementedError

    def add_ending(self) -> None:
        """Adds the probe of `all_end` if it lacks one; training does so, and other initial weights stay as they are."""
        if self.ending is not None:
            return
        with torch.random.fork_rng(devices=[]):
            self.ending = Probe(self.config.hidden, 1, self.config.eps)

    def end_inputs(self, taps: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Returns (state, embedding), both [..., H], that tell an ending; by default the last state, both normalised.

        taps: [..., T*H], the target's states before the tokens [...].
        """
        state, word = self.tap(taps, -1), self.embed(tokens)
        return rms_norm(state, None, self.config.eps), rms_norm(word, None, self.config.eps)

    def end_logits(self, taps: Tensor, tokens: Tensor) -> Tensor:
        """Predicts the logit [...] that the token after `tokens` ends the answer; gradients reach only the probe."""
        assert self.ending is not None
        with torch.no_grad():
            inputs = self.end_inputs(taps, tokens)
        logits: Tensor = self.ending(*inputs)
        return logits.squeeze(-1)

    def all_end(self, taps: Tensor, tokens: Tensor) -> bool:
        """Whether every answer most likely ends with the token that the target's next pass emits.

        taps: [R, T*H], the target's states before the newest tokens [R]. False in a network without a probe.
        """
        return self.ending is not None and bool((self.end_logits(taps, tokens) > END_LOGIT).all())

    def attach(self, model: PreTrainedModel, name: str | None = None) -> Self:
        """Takes the target's embedding and output layer; UserError if it was trained for another target.

        name: the method's name in messages.
        """
        self.fit(model.config.get_text_config(decoder=True).num_hidden_layers)
        hidden = model.get_input_embeddings().weight.shape[1]
        vocabulary = model.config.get_text_config(decoder=True).vocab_size  # Molmo2 embeds more tokens than it predicts
        c = self.config
        padding = PADDING if c.variant.published else 0
        if hidden != c.hidden or abs(vocabulary - c.vocabulary) > padding:
            raise UserError(
                f"method '{name or self.method}' was trained for a target with {c.vocabulary} tokens and hidden size "
                f"{c.hidden}, not {vocabulary} and {hidden}; train one with `msd train --method {self.method}`"
            )
        self._target = [model.get_input_embeddings(), output_layer(model)]
        self._share_embedding()
        return self

    def fit(self, layers: int) -> Self:
        """Completes the taps of a published head, whose file does not say how many layers its target has."""
        c = self.config
        if not c.taps or c.taps[-1] < 0:
            self.config = replace(c, taps=(*c.taps[:-1], layers) if c.taps else self.tapped(layers))
        return self

    @torch.no_grad()
    def _share_embedding(self) -> None:
        """Drops an embedding of its own that is that of the target."""
        own, target = self.embed_tokens, self._target[0]
        if own is None or len(own.weight) > len(target.weight):  # type: ignore[arg-type]
            return
        tokens = torch.arange(len(own.weight), device=target.weight.device)  # type: ignore[arg-type]
        if torch.equal(target(tokens).to(own.weight), own.weight):
            self.embed_tokens = None
            self.config = replace(self.config, variant=replace(self.config.variant, embedding=False))

    @property
    def ids(self) -> Tensor:
        """[Vd] int64: the target's id of each draft token."""
        count = len(self._target[1].weight) if self._target else self.config.vocabulary  # type: ignore[arg-type]
        return torch.arange(count, device=self.rotary.inverse.device)

    def log_acceptance(self, node: NodeFeatures) -> Tensor:
        """See `DraftVocabulary`; by the fitted `calibration` if there is one."""
        return self.uncalibrated(node) if self.calibration is None else log_chance(self.calibration, node)

    def uncalibrated(self, node: NodeFeatures) -> Tensor:
        """Computes `log_acceptance` before any fit; by default log q (EAGLE-2, section 4.1)."""
        return corrected(node.log_q, node.correction)

    def embed(self, tokens: Tensor) -> Tensor:
        """Returns the target's embeddings [..., H] of token ids [...]."""
        if self.embed_tokens is not None:  # ids above its rows are padding of the target's vocabulary
            return self.embed_tokens(tokens.clamp_max(len(self.embed_tokens.weight) - 1))
        return self._target[0](tokens).to(self.dtype)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights."""
        return next(self.layers.parameters()).dtype

    def head(self, state: Tensor) -> Tensor:
        """Applies the target's frozen output layer: [..., H] -> logits [..., V]."""
        head = self._target[1]
        if self._head_packed and self._dtype is not None and not torch.is_grad_enabled():
            packed = _packed.setdefault(head, {})
            if self._dtype not in packed:
                packed[self._dtype] = Packed.of(head, dtype=self._dtype)  # type: ignore[arg-type]
            return packed[self._dtype](state)
        weight, bias = head.weight, getattr(head, "bias", None)
        return F.linear(state, weight.to(state.dtype), bias)  # type: ignore[arg-type]

    def pack(self, dtype: torch.dtype = torch.float32) -> None:
        """Packs linear layers for decoding, with products in `dtype`; the weights must not change afterwards."""
        head = self._target[1]
        self._head_packed = isinstance(head, nn.Linear) and can_pack(head.weight)
        if self._dtype == dtype:
            return
        self._dtype = dtype
        for module in self.modules():
            if isinstance(module, Linear | Layer):
                module.pack(dtype)

    def tap(self, taps: Tensor, which: int) -> Tensor:
        """Returns state number `which` of taps [..., T*H]: [..., H]."""
        H = self.config.hidden
        return taps.unflatten(-1, (-1, H))[..., which, :].to(self.dtype)

    def read(self, layout: Layout, taps: Tensor, prompt: int | None = None, auxiliary: Tensor | None = None) -> Entries:
        """Computes the context entries of columns 0 to L-1; the layout also holds token L.

        taps: [B, L, T*H]. prompt: number of columns of the prompt, by default all. auxiliary: [B, E, H] tokens that
        only the drafter sees, zero in rows without any; most networks ignore them.
        """
        selection = self.select(layout, taps, taps.shape[1] if prompt is None else prompt)
        feature = self.noisy(self.feature(selection.taps))
        return Entries(selection, self.enter(selection, feature), feature)

    def select(self, layout: Layout, taps: Tensor, prompt: int) -> Selection:
        """Returns the positions that it reads; parameters as in `read`."""
        v = self.config.variant
        columns = text_columns(layout, taps, self.embed, self.config.hidden, prompt, v.placeholders)
        L = taps.shape[1]
        columns.positions = self.positions(layout)[:, :L]
        if self.rotary.sectioned and len(layout.positions) > 1:
            columns.axes = layout.positions[:, :, :L].movedim(0, -1)
        return self.select_columns(columns)

    def positions(self, layout: Layout) -> Tensor:
        """Returns the rotary positions [B, C] of a layout's columns."""
        if self.config.variant.first_axis:
            return layout.positions[0]
        if not self.config.variant.columns:
            return layout.positions_1d()
        start = torch.tensor(layout.start, device=layout.tokens.device)[:, None]
        return (torch.arange(layout.capacity, device=start.device) - start).clamp_min(0)

    def select_columns(self, c: Columns) -> Selection:
        """Returns the positions of a text that it reads; by default all real columns."""
        return select_columns(c, c.real)[0]

    def feature(self, taps: Tensor) -> Tensor:
        """Computes features [..., H] from tap states [..., T*H]; by default the last state."""
        return self.tap(taps, -1)

    def noisy(self, feature: Tensor) -> Tensor:
        """Adds noise from U(-a, a) to features [B, S, H] in training, where a = option "noise" × 512 / S.

        S is that of the longest row of all processes. EAGLE, section 4.1, with a = 0.1; its released code scales a by
        512 / S.
        """
        noise = self.config.options.get("noise", 0.0)
        if not (self.training and noise):
            return feature
        drawn, longest = processes.uniform(feature)
        return feature + (2 * drawn - 1) * (noise * 512 / longest)

    @abstractmethod
    def entry(self, feature: Tensor, embedding: Tensor, image: Tensor, level: int) -> Tensor:
        """Computes the layers' input at a text position.

        feature, embedding: [..., H]. image: see `Selection`. level: 0 for the target's features, else the draft level.
        """

    def enter(self, selection: Selection, feature: Tensor) -> Tensor:
        """Computes the layers' inputs [B, S, ...] of entries with the features [B, S, H]."""
        x = self.entry(feature, selection.embedding, selection.image, 0)
        if selection.fixed is None or selection.given is None:
            return x
        return torch.where(selection.fixed[..., None], selection.given.to(x.dtype), x)

    def context(
        self, x: Tensor, positions: Tensor, visible: Tensor | None = None, store: Store | None = None
    ) -> list[KeyValues]:
        """Computes keys and values of every layer for entries x [B, S, ...] at positions [B, S], or [B, S, 3] by axis.

        store: appends a layer's new keys to the stored ones and returns all. visible: [B, S, all] bool, the entries
        that an entry sees, itself included; only deep context needs it.
        """
        rotary, context = self.rotary(positions) if positions.dim() == 2 else self.rotary.by_axis(positions), []
        for i, layer in enumerate(self.stack):
            new = layer.key_values(x, rotary)
            context.append(store(i, new) if store else new)
            if self.deep and i + 1 < len(self.layers):
                assert visible is not None
                x = layer(x[:, :, None], self.rotary(positions[..., None]), context[-1], visible)[0][:, :, 0]
        return context

    def full_context(self, selection: Selection, x: Tensor) -> tuple[list[KeyValues], Tensor]:
        """Returns (keys and values per layer, visible [B, S, S]) of a whole text with inputs x."""
        entry = torch.arange(x.shape[1], device=x.device)
        visible = (entry[None] <= entry[:, None]) & selection.present[:, None]
        return self.context(x, selection.places, visible | (entry[None] == entry[:, None])), visible

    def run_layers(
        self,
        x: Tensor,
        positions: Tensor,
        context: Sequence[KeyValues],
        visible: Tensor,
        draft: list[KeyValues] | None = None,
        mask: Tensor | None = None,
    ) -> tuple[Tensor, list[KeyValues] | None]:
        """Runs n queries x [B, A, n, ...] at positions [B, A, n] through all layers (see `Layer.forward`).

        Returns (states [B, A, n, H], `draft` extended by the queries; None without a mask).
        """
        rotary, extended = self.rotary(positions), []
        for i, (layer, keys) in enumerate(zip(self.stack, context, strict=True)):
            x, new = layer(x, rotary, keys, visible, draft[i] if draft else None, mask)
            extended.append(new)
        return x, None if mask is None else extended

    def run_draft(
        self,
        x: Tensor,
        rotary: Cosines,
        context: Sequence[KeyValues],
        seen: Tensor | None = None,
        stored: bool = False,
    ) -> tuple[Tensor, list[KeyValues]]:
        """`run_layers` for one anchor per row: n queries x [B, n, ...] (see `Layer.draft`).

        rotary: of their positions [B, n or 1]. Returns (states [B, n, H], the contexts with the queries).
        """
        extended = []
        for layer, keys in zip(self.stack, context, strict=True):
            x, keys = layer.draft(x, rotary, keys, seen, stored)
            extended.append(keys)
        return x, extended

    def run_anchors(self, x: Tensor, positions: Tensor, anchors: Anchors, stored: bool = False) -> Tensor:
        """Runs n queries x [B, A, n, ...] at positions [B, A, n], which see their anchor's context and each other.

        stored: whether they are context entries, which do not see each other. Returns states [B, A, n, H].
        """
        n, visible = x.shape[2], anchors.visible
        if visible is None or (x.shape[1] == 1 and not torch.is_grad_enabled()):
            seen = None if visible is None else F.pad(visible, (0, 0 if stored else n), value=True).expand(-1, n, -1)
            return self.run_draft(x[:, 0], self.rotary(positions[:, 0]), anchors.context, seen, stored)[0][:, None]
        mask = None if stored else torch.ones(*x.shape[:3], n, dtype=torch.bool, device=x.device)
        return self.run_layers(x, positions, anchors.context, visible, None, mask)[0]

    @abstractmethod
    def levels(self, anchors: Anchors, newest: Tensor) -> Levels:
        """Returns the draft distributions of one decoding step, with one anchor per row; newest: [B], the roots."""

    def anchors(self, batch: TeacherBatch, roots: Tensor) -> Anchors:
        """Reads a teacher batch; returns the anchors of the answer tokens `roots` [B, A]."""
        entries = self.read(batch.layout, batch.taps[:, :-1], batch.prompt, batch.auxiliary)
        return entries.anchors(roots + batch.prompt - 1, self.full_context(entries.selection, entries.x)[0])

    def states(self, batch: TeacherBatch, roots: Tensor, depth: int) -> Tensor:
        """Computes the states [B, A, depth, H] below the answer tokens `roots` [B, A], by teacher forcing."""
        return self.draft_states(self.anchors(batch, roots), batch, roots, depth)

    @abstractmethod
    def draft_states(self, anchors: Anchors, batch: TeacherBatch, roots: Tensor, depth: int) -> Tensor:
        """Computes `states` from the anchors of the `roots`, as in decoding."""

    def logits(self, states: Tensor, parents: Tensor) -> Tensor:
        """Computes draft logits [..., Vd] from states [..., H]; most methods ignore the parent tokens [...]."""
        return self.head(states)

    @property
    def confident(self) -> bool:
        """Whether `confidence_logits` are learned."""
        return False

    def confidence_logits(self, states: Tensor, parents: Tensor) -> Tensor:
        """Computes confidence logits [...] from states [..., H] and parent tokens [...]; by default 0."""
        return torch.zeros_like(states[..., 0])

    def loss(self, batch: TeacherBatch, roots: Tensor) -> tuple[Tensor, Parts]:
        """Computes the published loss on drafts from the answer tokens `roots` [B, A], and its parts for the log.

        The batch's logits are the target's log p over `ids`.
        """
        published = type(self).published_loss
        if published is None:
            raise NotImplementedError(f"method '{self.method}' was registered without a loss")
        return published(self, batch, roots)
