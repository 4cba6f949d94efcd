"""What the target said of a batch, noted so that later passes over the same answers need no target.

Noted are the tap states in `dtype`, of which the last is what the target's output layer reads, and the normaliser of
every law. The laws over the draft vocabulary follow from these. A lesson is the same bits whether it was just taught or
recalled, so a run that was stopped goes on to the same result. Nothing is written to disk.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from copy import copy
from dataclasses import replace

import torch
from torch import Tensor, nn

from msd.targets.teacher import Lesson

Taught = tuple[Lesson, Tensor]


class Notebook:
    """Keeps lessons while they fit into `gigabytes`; later ones are taught anew each time.

    head: the target's output layer; ids [Vd]: the draft vocabulary; layers: the tapped ones, of which the last feeds
    the head. A head whose logits are more than its product with the last tap (soft-capped, scaled) is found on the
    first lesson, and nothing is noted then.
    """

    def __init__(
        self,
        head: nn.Module,
        ids: Tensor,
        layers: Sequence[int],
        gigabytes: float,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        self.head, self.layers = head, tuple(layers)
        self.left, self.dtype = gigabytes * 1e9, dtype
        self._read_as(ids, layers)
        self.plain: bool | None = None  # whether the head is nothing but its matrix
        self._notes: dict[Hashable, tuple[Lesson, Tensor]] = {}

    def read_by(self, ids: Tensor, layers: Sequence[int]) -> Notebook:
        """The same notes for a network that drafts other words from some of the layers.

        ValueError for a layer that was not noted, or another last one.
        """
        if not set(layers) <= set(self.layers) or layers[-1] != self.layers[-1]:
            raise ValueError(f"layers {tuple(layers)} cannot be read from notes of layers {self.layers}")
        other = copy(self)
        other._read_as(ids, layers)
        return other

    def _read_as(self, ids: Tensor, layers: Sequence[int]) -> None:
        params = {name: p.detach() for name, p in self.head.named_parameters(recurse=False)}
        self.ids = ids.to(params["weight"].device)
        self.rows = params["weight"][self.ids].float()
        self.bias = params["bias"][self.ids].float() if "bias" in params else None
        self.columns = [self.layers.index(layer) for layer in layers]

    def recall(self, key: Hashable, teach: Callable[[], Taught]) -> Taught:
        """The lesson known as `key`, its `logits` being log p over the draft vocabulary [B, A, Vd], and its labels."""
        if key not in self._notes:
            lesson, labels = teach()
            if not self._is_plain(lesson):
                logits = lesson.logits.log_softmax(-1)[..., self.ids]
                return replace(lesson, taps=self._read_layers(lesson), logits=logits), labels
            assert lesson.taps is not None
            noted = replace(lesson, taps=lesson.taps.to(self.dtype), logits=lesson.logits.logsumexp(-1, keepdim=True))
            parts = (noted.taps, noted.logits, noted.beside, labels)
            size = sum(t.numel() * t.element_size() for t in parts if t is not None)
            if size > self.left:
                return self._read(noted), labels
            self.left -= size
            self._notes[key] = noted, labels
        noted, labels = self._notes[key]
        return self._read(noted), labels

    def _read(self, noted: Lesson) -> Lesson:
        taps = self._read_layers(noted).float()
        return replace(noted, taps=taps, logits=self._logits(noted, taps) - noted.logits)

    def _read_layers(self, lesson: Lesson) -> Tensor:
        """The states of the layers that are read, [B, L, T*H]."""
        assert lesson.taps is not None
        every = lesson.taps.unflatten(-1, (len(self.layers), -1))
        return every[:, :, self.columns].flatten(2)

    def _logits(self, lesson: Lesson, taps: Tensor) -> Tensor:
        last = taps[:, lesson.prompt - 1 : -1, -self.rows.shape[1] :]
        return nn.functional.linear(last, self.rows, self.bias)

    def _is_plain(self, lesson: Lesson) -> bool:
        """Whether the head's logits follow from the last tap; looked at once."""
        if self.plain is None:
            assert lesson.taps is not None
            gap = (self._logits(lesson, lesson.taps.float()) - lesson.logits[..., self.ids])[lesson.spoken()]
            self.plain = bool(gap.abs().max() < 0.02 * lesson.logits.abs().max())
        return self.plain
