"""What all draft networks share: the target's embedding and head, which are not among their weights, and their context.

A method says which columns it reads (`kept`), what enters there (`feature`, `entry`), and how drafts come about: level
by level (`msd.drafters.toolkit.levels`) or all levels in one pass (`msd.drafters.toolkit.levels`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from msd.backends.packed import Linear, Packed, can_pack
from msd.core.layout import Layout
from msd.drafters.toolkit import checkpoint
from msd.drafters.toolkit.context import Anchors, Columns, Entries, Selection, columns, keep
from msd.drafters.toolkit.growth import Levels
from msd.drafters.toolkit.layers import Keys, Layer, Rotary, step
from msd.drafters.toolkit.training import Objective
from msd.errors import UserError
from msd.targets.teacher import TeacherBatch

Store = Callable[[int, Keys], Keys]
Parts = dict[str, Tensor]
Loss = Callable[[Any, TeacherBatch, Tensor], tuple[Tensor, Parts]]
_packed: WeakKeyDictionary[nn.Module, dict[torch.dtype, Packed]] = WeakKeyDictionary()


@dataclass(frozen=True)
class NetworkConfig(checkpoint.Configuration):
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
    options: dict[str, int | float] = field(default_factory=dict)


class DraftNetwork(nn.Module, ABC):
    """The weights of a drafter. A subclass that is registered (`msd.drafters.registry`) is a method.

    method, published_loss, objective_type, drafter: given when it is registered. layer: its decoder layer.
    deep: whether context goes through all layers, as in a language model, or enters every layer as it is.
    roots: answer tokens a row to draft from in a training step, at most. reach: drafted tokens below each.
    stages: (steps about text alone, steps until all are about images, share of these at first, share of text kept) of
    training, all of them shares; None: those of the run. reduced: whether it has a draft vocabulary of its own.
    options: the method's own numbers and their defaults. forms, parts: what `msd train` can choose and leave out.
    routes: whether it predicts modalities, which verification policies go by.
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
    roots: ClassVar[int | None] = 48
    reach: ClassVar[int] = 1
    stages: ClassVar[tuple[float, float, float, float] | None] = (0.02, 0.1, 0.5, 0.05)
    reduced: ClassVar[bool] = False
    options: ClassVar[dict[str, float]] = {}
    forms: ClassVar[tuple[str, ...]] = ()
    parts: ClassVar[tuple[str, ...]] = ()
    routes: ClassVar[bool] = False

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.add_inputs()
        self.rotary = Rotary(config.head_dim, config.rope_theta)
        self.layers = nn.ModuleList(self.layer(config) for _ in range(config.layers))
        self.stack: list[Layer] = list(self.layers)  # type: ignore[arg-type]
        self.provenance: dict[str, Any] = {}  # what training wrote beside the weights
        self._target: list[nn.Module] = []  # embedding and head, in a list, so that they are no part of the state dict
        self._dtype: torch.dtype | None = None  # of packed products
        self._head_packed = False

    def add_inputs(self) -> None:
        """Makes modules whose first weights are drawn before those of the layers."""
        if self.config.options.keys() != self.options.keys():
            wrong = sorted(self.config.options.keys() ^ self.options.keys())[0]
            raise UserError(f"method '{self.method}' has the options {sorted(self.options)}: see '{wrong}'")

    @classmethod
    def tapped(cls, layers: int) -> tuple[int, ...]:
        """Which hidden states of a target with `layers` layers it reads: the embeddings first, the final one last."""
        return (0, layers)

    @classmethod
    def for_target(cls, text_config: Any, **changes: Any) -> Self:
        """A network for a `transformers` text config; `changes` override fields, those in `options` one by one."""
        options = cls.options | changes.pop("options", {})
        own = {
            "method": cls.method, "layers": cls.layer_count, "taps": cls.tapped(text_config.num_hidden_layers),
            "width": cls.width, "depth": cls.depth, "options": options, "draft_vocabulary": text_config.vocab_size,
        }  # fmt: skip
        return cls(NetworkConfig(**(checkpoint.sizes(text_config) | own | changes)))

    @classmethod
    def trained_as(cls, settings: Any, auxiliary: tuple[tuple[int, int], ...] | None) -> dict[str, Any]:
        """Changes for `for_target` that follow from a run's settings (`msd.train.drafting.DraftTraining`).

        auxiliary: the groups of auxiliary tokens in the training data (tokens given, tokens kept); None without any.
        """
        return {}

    @classmethod
    def adopted(cls, trained: DraftNetwork) -> DraftNetwork:
        """The network that drafts with what was trained, which may be another method's."""
        return trained

    def objective(self, settings: Any, ends: Sequence[int]) -> Objective:
        """What training minimises. settings: of MSD's loss (`msd.train.losses.msd`). ends: ids that end an answer."""
        made = type(self).objective_type
        return Objective(self) if made is None else made(self, settings, ends=ends)

    def twin(self, text_config: Any) -> Self:
        """The same method with random weights, for a target of any size: its whole vocabulary is drafted."""
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
        """First weights from the target, before training; most methods begin at random."""

    def choose_words(self, ids: Tensor) -> None:
        """Makes the ascending target ids [Vd] the draft vocabulary of a `reduced` method."""
        raise NotImplementedError

    def attach(self, model: PreTrainedModel, name: str | None = None) -> Self:
        """Takes the target's embedding and head; UserError when the target is not the one it was trained for.

        name: what the user calls the method.
        """
        vocabulary, hidden = model.get_input_embeddings().weight.shape
        c = self.config
        if (vocabulary, hidden) != (c.vocabulary, c.hidden):
            raise UserError(
                f"method '{name or self.method}' was trained for a target with {c.vocabulary} tokens and hidden size "
                f"{c.hidden}, not {vocabulary} and {hidden}; train one with `msd train --method {self.method}`"
            )
        self._target = [model.get_input_embeddings(), model.get_output_embeddings()]
        return self

    @property
    def ids(self) -> Tensor:
        """[Vd] int64: the target's id of each draft token."""
        return torch.arange(self.config.vocabulary, device=self.rotary.inverse.device)

    def hit(self, log_q: Tensor, sure: Tensor) -> Tensor:
        """Log of the chance that a candidate is the target's choice: its log probability (EAGLE-2, section 4.1)."""
        return log_q

    def embed(self, tokens: Tensor) -> Tensor:
        """The target's embeddings [..., H] of token ids [...]."""
        out: Tensor = self._target[0](tokens)
        return out.to(self.dtype)

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        found: torch.dtype = next(self.layers.parameters()).dtype
        return found

    def head(self, state: Tensor) -> Tensor:
        """The target's frozen output layer: [..., H] -> logits [..., V]."""
        head = self._target[1]
        if self._head_packed and self._dtype is not None and not torch.is_grad_enabled():
            known = _packed.setdefault(head, {})
            if self._dtype not in known:
                known[self._dtype] = Packed.of(head, dtype=self._dtype)  # type: ignore[arg-type]
            return known[self._dtype](state)
        weight, bias = head.weight, getattr(head, "bias", None)
        return F.linear(state, weight.to(state.dtype), bias)  # type: ignore[arg-type]

    def pack(self, dtype: torch.dtype = torch.float32) -> None:
        """Packs linear layers for decoding on this machine; the weights must not change after that.

        dtype: of their products. Drafts need not be exact: in bfloat16 they cost half and are nearly as good.
        """
        head = self._target[1]
        self._head_packed = isinstance(head, nn.Linear) and can_pack(head.weight)
        if self._dtype == dtype:
            return
        self._dtype = dtype
        for module in self.modules():
            if isinstance(module, Linear | Layer):
                module.pack(dtype)

    def tap(self, taps: Tensor, which: int) -> Tensor:
        """State number `which` of taps [..., T*H]: [..., H]."""
        H = self.config.hidden
        return taps.unflatten(-1, (-1, H))[..., which, :].to(self.dtype)

    def read(self, layout: Layout, taps: Tensor, prompt: int | None = None, auxiliary: Tensor | None = None) -> Entries:
        """Entries of columns 0 to L-1, whose tap states are `taps` [B, L, T*H]; the layout holds token L as well.

        prompt: how many columns the prompt has, by default all. auxiliary: [B, E, H] tokens that only the drafter sees,
        all zero in rows without any; most networks read none.
        """
        found = self.select(layout, taps, taps.shape[1] if prompt is None else prompt)
        feature = self.noisy(self.feature(found.taps))
        return found.entered(self.enter(found, feature), feature)

    def select(self, layout: Layout, taps: Tensor, prompt: int) -> Selection:
        """The positions that are read; parameters as in `read`."""
        return self.kept(columns(layout, taps, self.embed, self.config.hidden, prompt))

    def kept(self, c: Columns) -> Selection:
        """The positions of a text that are read; by default all of its columns."""
        return keep(c, c.real)[0]

    def feature(self, taps: Tensor) -> Tensor:
        """What a method makes of tap states [..., T*H]: [..., H]; by default the last of them."""
        return self.tap(taps, -1)

    def noisy(self, feature: Tensor) -> Tensor:
        """Features with noise from U(-a, a) in training, a being option "noise" (EAGLE, section 4.1: a = 0.1)."""
        a = self.config.options.get("noise", 0.0)
        return feature + (2 * torch.rand_like(feature) - 1) * a if self.training and a else feature

    @abstractmethod
    def entry(self, feature: Tensor, word: Tensor, image: Tensor, level: int) -> Tensor:
        """The layers' input at a text position.

        feature, word: [..., H]. image: as in `Selection`. level: 0 where the feature
        is the target's, else how deep in a draft.
        """

    def enter(self, found: Selection, feature: Tensor) -> Tensor:
        """Inputs [B, S, ...] of entries whose features are `feature` [B, S, H]."""
        x = self.entry(feature, found.word, found.image, 0)
        if found.fixed is None or found.given is None:
            return x
        return torch.where(found.fixed[..., None], found.given.to(x.dtype), x)

    def context(
        self, x: Tensor, positions: Tensor, visible: Tensor | None = None, store: Store | None = None
    ) -> list[Keys]:
        """Keys and values for every layer of entries x [B, S, ...] at positions [B, S].

        store: puts a layer's keys to those that are there already and returns all. visible: [B, S, all] bool, which of
        them an entry sees, itself included; only deep context needs it.
        """
        turn, found = self.rotary(positions), []
        for i, layer in enumerate(self.stack):
            keys = layer.keys(x, turn)
            found.append(store(i, keys) if store else keys)
            if self.deep and i + 1 < len(self.layers):
                assert visible is not None
                x = layer(x[:, :, None], self.rotary(positions[..., None]), found[-1], visible)[0][:, :, 0]
        return found

    def whole(self, found: Entries | Selection, x: Tensor) -> tuple[list[Keys], Tensor]:
        """(keys, visible [B, S, S]) of a whole text's entries with inputs x."""
        entry = torch.arange(x.shape[1], device=x.device)
        visible = (entry[None] <= entry[:, None]) & found.present[:, None]
        return self.context(x, found.positions, visible | (entry[None] == entry[:, None])), visible

    def step(
        self,
        x: Tensor,
        positions: Tensor,
        context: Sequence[Keys],
        visible: Tensor,
        own: list[Keys] | None = None,
        mask: Tensor | None = None,
    ) -> tuple[Tensor, list[Keys] | None]:
        """See `msd.drafters.toolkit.layers.step`; positions [B, A, n]."""
        return step(self.stack, x, self.rotary(positions), context, visible, own, mask)

    @abstractmethod
    def levels(self, context: Sequence[Keys], anchors: Anchors, newest: Tensor) -> Levels:
        """The draft distributions of one step in decoding; one anchor per row, below the tokens `newest` [B]."""

    @abstractmethod
    def states(self, batch: TeacherBatch, first: Tensor, depth: int) -> Tensor:
        """States [B, A, D, H] below the answer tokens `first` [B, A], deeper words as written; D = depth."""

    def logits(self, states: Tensor, parents: Tensor) -> Tensor:
        """Draft logits [..., Vd] of states [..., H] below the tokens `parents` [...], which most do not read."""
        return self.head(states)

    def sure(self, states: Tensor, parents: Tensor) -> Tensor:
        """Confidence logits [...] of states [..., H] below the tokens `parents` [...]; 0 where a method has none."""
        return torch.zeros_like(states[..., 0])

    def loss(self, batch: TeacherBatch, first: Tensor) -> tuple[Tensor, Parts]:
        """The published loss on drafts from the answer tokens `first` [B, A], and its parts for the log.

        The batch's logits are the target's log p over `ids`.
        """
        published = type(self).published_loss
        if published is None:
            raise NotImplementedError(f"method '{self.method}' was registered without a loss")
        return published(self, batch, first)
