"""What all rivals share: the target's embedding and head, which are not among their weights, and their context.

A method says which columns it keeps (`entries`), what enters there (`feature`, `enter`), and how drafts come about:
level by level (`Autoregressive`) or all levels in one pass (`Block`, in `block.py`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Self
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from msd.backends.packed import Linear, Packed, can_pack
from msd.drafters import configs
from msd.drafters.msd.laws import Levels
from msd.drafters.msd.layer import Keys, Layer, Rotary, step
from msd.drafters.msd.network import Anchors
from msd.drafters.rivals.config import RivalConfig
from msd.drafters.rivals.entries import Columns, Entries, columns, keep
from msd.errors import UserError
from msd.layout import Layout
from msd.targets.teacher import Lesson

Store = Callable[[int, Keys], Keys]
Parts = dict[str, Tensor]
_packed: WeakKeyDictionary[nn.Module, dict[torch.dtype, Packed]] = WeakKeyDictionary()


class Rival(nn.Module, ABC):
    """A published drafter. A subclass is a method: its idea and its loss.

    layer: its decoder layer. deep: whether context goes through all layers, as in a language model, or enters every
    layer as it is. roots: answer tokens a row to draft from in a training step. reach: drafted tokens below each.
    stages: (steps about text alone, steps until all are about images, share of these at first, share of text kept) of
    training, all of them shares.
    reduced: whether it has a draft vocabulary of its own.
    options: the method's own numbers and their defaults.
    """

    method: ClassVar[str]
    layer: ClassVar[type[Layer]] = Layer
    deep: ClassVar[bool] = False
    layer_count: ClassVar[int] = 1
    width: ClassVar[int] = 10
    depth: ClassVar[int] = 5
    roots: ClassVar[int] = 48
    reach: ClassVar[int] = 1
    stages: ClassVar[tuple[float, float, float, float]] = (0.02, 0.1, 0.5, 0.05)
    reduced: ClassVar[bool] = False
    options: ClassVar[dict[str, float]] = {}

    def __init__(self, config: RivalConfig) -> None:
        super().__init__()
        if config.options.keys() != self.options.keys():
            wrong = sorted(config.options.keys() ^ self.options.keys())[0]
            raise UserError(f"method '{self.method}' has the options {sorted(self.options)}: see '{wrong}'")
        self.config = config
        self.rotary = Rotary(config.head_dim, config.rope_theta)
        self.layers = nn.ModuleList(self.layer(config) for _ in range(config.layers))
        self.stack: list[Layer] = list(self.layers)  # type: ignore[arg-type]
        self._target: list[nn.Module] = []  # embedding and head, in a list, so that they are no part of the state dict
        self._dtype: torch.dtype | None = None

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
        return cls(RivalConfig(**(configs.sizes(text_config) | own | changes)))

    def begin_from(self, model: PreTrainedModel) -> None:
        """First weights from the target, before training; most methods begin at random."""

    def choose_words(self, ids: Tensor) -> None:
        """Makes the ascending target ids [Vd] the draft vocabulary of a `reduced` method."""
        raise NotImplementedError

    def attach(self, model: PreTrainedModel) -> Self:
        """Takes the target's embedding and head."""
        self._target = [model.get_input_embeddings(), model.get_output_embeddings()]
        return self

    @property
    def ids(self) -> Tensor:
        """[Vd] int64: the target's id of each draft token."""
        return torch.arange(self.config.vocabulary, device=self.rotary.inverse.device)

    def hit(self, log_q: Tensor, sure: Tensor) -> Tensor:
        """Log of the chance that a candidate is the target's choice: what its law says (EAGLE-2, section 4.1)."""
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
        if self._dtype is not None and not torch.is_grad_enabled():
            known = _packed.setdefault(head, {})
            if self._dtype not in known:
                known[self._dtype] = Packed.of(head, dtype=self._dtype)  # type: ignore[arg-type]
            return known[self._dtype](state)
        weight, bias = head.weight, getattr(head, "bias", None)
        return F.linear(state, weight.to(state.dtype), bias)  # type: ignore[arg-type]

    def pack(self, dtype: torch.dtype = torch.float32) -> None:
        """Packs linear layers for decoding on this machine; the weights must not change after that."""
        for module in self.modules():
            if isinstance(module, Linear | Layer):
                module.pack(dtype)
        head = self._target[1]
        if isinstance(head, nn.Linear) and can_pack(head.weight):
            self._dtype = dtype

    def tap(self, taps: Tensor, which: int) -> Tensor:
        """State number `which` of taps [..., T*H]: [..., H]."""
        H = self.config.hidden
        return taps.unflatten(-1, (-1, H))[..., which, :].to(self.dtype)

    def entries(self, layout: Layout, taps: Tensor, prompt: int) -> Entries:
        """Entries of columns 0 to L-1, whose tap states are `taps` [B, L, T*H]; the layout holds token L as well.

        prompt: how many columns the prompt has.
        """
        return self.kept(columns(layout, taps, self.embed, self.config.hidden, prompt))

    def kept(self, c: Columns) -> Entries:
        """The entries of a text; by default all of its columns."""
        return keep(c, c.real)[0]

    def feature(self, taps: Tensor) -> Tensor:
        """What a method makes of tap states [..., T*H]: [..., H]; by default the last of them."""
        return self.tap(taps, -1)

    @abstractmethod
    def entry(self, feature: Tensor, word: Tensor, image: Tensor, level: int) -> Tensor:
        """The layers' input at a text position.

        feature, word: [..., H]. image: as in `Entries`. level: 0 where the feature
        is the target's, else how deep in a draft.
        """

    def enter(self, found: Entries, feature: Tensor) -> Tensor:
        """Inputs [B, S, ...] of entries whose features are `feature` [B, S, H]."""
        x = self.entry(feature, found.word, found.image, 0)
        if found.fixed is None or found.given is None:
            return x
        return torch.where(found.fixed[..., None], found.given.to(x.dtype), x)

    def context(self, x: Tensor, positions: Tensor, visible: Tensor, store: Store | None = None) -> list[Keys]:
        """Keys and values for every layer of entries x [B, S, ...] at positions [B, S].

        store: puts a layer's keys to those that are there already and returns all. visible: [B, S, all] bool, which of
        them an entry sees, itself included; only deep context asks.
        """
        turn, alone, found = self.rotary(positions), self.rotary(positions[..., None]), []
        for i, layer in enumerate(self.stack):
            keys = layer.keys(x, turn)
            found.append(store(i, keys) if store else keys)
            if self.deep and i + 1 < len(self.layers):
                x = layer(x[:, :, None], alone, found[-1], visible)[0][:, :, 0]
        return found

    def step(
        self,
        x: Tensor,
        positions: Tensor,
        context: Sequence[Keys],
        visible: Tensor,
        own: list[Keys] | None = None,
        mask: Tensor | None = None,
    ) -> tuple[Tensor, list[Keys] | None]:
        """See `msd.drafters.msd.layer.step`; positions [B, A, n]."""
        return step(self.stack, x, self.rotary(positions), context, visible, own, mask)

    @abstractmethod
    def laws(self, context: Sequence[Keys], anchors: Anchors, newest: Tensor) -> Levels:
        """The draft laws of one step in decoding; one anchor per row, below the tokens `newest` [B]."""

    @abstractmethod
    def states(self, lesson: Lesson, first: Tensor, depth: int) -> Tensor:
        """States [B, A, D, H] below the answer tokens `first` [B, A], deeper words as written; D = depth."""

    def logits(self, states: Tensor, parents: Tensor) -> Tensor:
        """Draft logits [..., Vd] of states [..., H] below the tokens `parents` [...]; most do not ask for these."""
        return self.head(states)

    @abstractmethod
    def loss(self, lesson: Lesson, first: Tensor) -> tuple[Tensor, Parts]:
        """The published loss on drafts from the answer tokens `first` [B, A], and its parts for the log.

        The lesson's logits are the target's log p over `ids`.
        """


def whole(network: Rival, found: Entries, x: Tensor) -> tuple[list[Keys], Tensor]:
    """(keys, visible [B, S, S]) of a whole text's entries with inputs x."""
    entry = torch.arange(x.shape[1], device=x.device)
    visible = (entry[None] <= entry[:, None]) & found.present[:, None]
    return network.context(x, found.positions, visible | (entry[None] == entry[:, None])), visible
