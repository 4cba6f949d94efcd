"""A map between two vocabularies: which token of the drafter's is which of the target's.

Two tokens are the same when piece strings and kinds (special or normal) agree. Where one vocabulary extends the other,
as Video-LLaVA's and EventGPT's both extend LLaMA's 32,000 pieces, that is the identity on what they share; in general
it is any pairing. What only one side has, the other never says: such tokens are masked in the draft, and read as
the drafter's unknown piece.

A map is tied to both piece tables by their hashes, so that one saved for other tables is refused.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from msd.errors import UserError
from msd.system.files import parse_json, write_whole

FILE, FORMAT = "vocabulary.json", 1
REMEDY = "leave the saved map out and a new one is made from the two tables"


@dataclass(frozen=True)
class Pieces:
    """A piece table. names: by id, None where an id has no piece. special: ids that are marks and not text.

    unknown: id of the piece that stands for what the table lacks.
    """

    names: tuple[str | None, ...]
    special: frozenset[int]
    unknown: int = 0

    @classmethod
    def of(cls, tokenizer: Any) -> Pieces:
        """The table of a `transformers` tokenizer."""
        ids: dict[str, int] = tokenizer.get_vocab()
        names: list[str | None] = [None] * (1 + max(ids.values()))
        for name, i in ids.items():
            names[i] = name
        added = getattr(tokenizer, "added_tokens_decoder", {})
        special = frozenset(i for i, token in added.items() if token.special)
        return cls(tuple(names), special, getattr(tokenizer, "unk_token_id", None) or 0)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of pieces, ids and kinds, in hexadecimal."""
        text = json.dumps([self.names, sorted(self.special)], ensure_ascii=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def as_json(self) -> str:
        """JSON text that `from_json` reads back."""
        raw = {"unknown": self.unknown, "special": sorted(self.special), "pieces": self.names}
        return json.dumps(raw, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> Pieces:
        """UserError where it is no such table."""
        try:
            raw = parse_json(text)
            names, special, unknown = raw["pieces"], raw["special"], raw["unknown"]
            if not all(isinstance(name, str | None) for name in names):
                raise TypeError("a piece is neither text nor null")
            if not all(isinstance(i, int) and 0 <= i < len(names) for i in (*special, unknown)):
                raise TypeError("an id is not one of its pieces")
            return cls(tuple(names), frozenset(special), unknown)
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"it is no piece table ({error!r})") from error


@dataclass(frozen=True, eq=False)
class VocabularyMap:
    """Between a drafter's N pieces and a target's M.

    to_target: [N] int64, -1 where the target has no such piece. to_drafter: [M] int64, -1 where the drafter has none.
    unknown: the drafter's id that stands for these when they are read. digests: of the drafter's table and the
    target's; None for a map of bare ids, which has no tables.
    """

    to_target: Tensor
    to_drafter: Tensor
    unknown: int = 0
    digests: tuple[str, str] | None = None

    @classmethod
    def between(cls, drafter: Pieces, target: Pieces) -> VocabularyMap:
        """Of two piece tables. UserError where they share no piece."""
        places = {name: i for i, name in enumerate(target.names) if name is not None}
        found = [places.get(name, -1) if name is not None else -1 for name in drafter.names]
        pairs = [
            (i, j) for i, j in enumerate(found) if j >= 0 and (i in drafter.special) == (j in target.special)
        ]  # fmt: skip
        if not pairs:
            raise UserError("drafter and target share no piece of their vocabularies; choose a drafter that does")
        digests = drafter.digest, target.digest
        return cls.of_pairs(torch.tensor(pairs), len(drafter.names), len(target.names), drafter.unknown, digests)

    @classmethod
    def of_pairs(
        cls, pairs: Tensor, drafter: int, target: int, unknown: int = 0, digests: tuple[str, str] | None = None
    ) -> VocabularyMap:
        """Of pairs (drafter's id, target's id), [n, 2] int64, for tables of so many ids."""
        to_target, to_drafter = torch.full((drafter,), -1), torch.full((target,), -1)
        to_target[pairs[:, 0]], to_drafter[pairs[:, 1]] = pairs[:, 1], pairs[:, 0]
        return cls(to_target, to_drafter, unknown, digests)

    @classmethod
    def identity(cls, count: int) -> VocabularyMap:
        """Of `count` ids that mean the same on both sides."""
        same = torch.arange(count)
        return cls(same, same.clone())

    def sized(self, drafter: int, target: int) -> VocabularyMap:
        """For models whose embeddings have so many rows: what lies beyond is masked on either side."""
        pairs = self.pairs
        pairs = pairs[(pairs[:, 0] < drafter) & (pairs[:, 1] < target)]
        return VocabularyMap.of_pairs(pairs, drafter, target, self.unknown, self.digests)

    def to(self, device: torch.device) -> VocabularyMap:
        """On another device."""
        return VocabularyMap(self.to_target.to(device), self.to_drafter.to(device), self.unknown, self.digests)

    @cached_property
    def pairs(self) -> Tensor:
        """[n, 2] int64: (drafter's id, target's id) of every shared piece, by the drafter's id."""
        own = (self.to_target >= 0).nonzero()[:, 0]
        return torch.stack([own, self.to_target[own]], 1)

    @cached_property
    def own(self) -> Tensor:
        """[n] int64: the drafter's id of every shared piece."""
        return self.pairs[:, 0].contiguous()

    @cached_property
    def ids(self) -> Tensor:
        """[n] int64: the target's id of every shared piece. What is drafted is among these."""
        return self.pairs[:, 1].contiguous()

    @cached_property
    def whole(self) -> bool:
        """Whether every id of the drafter's is shared."""
        return len(self.own) == len(self.to_target)

    def read(self, tokens: Tensor) -> Tensor:
        """The drafter's ids [...] of the target's tokens [...]; the unknown piece for what it has not."""
        known = tokens < len(self.to_drafter)
        found = self.to_drafter[tokens.clamp_max(len(self.to_drafter) - 1)]
        return torch.where(known & (found >= 0), found, self.unknown)

    def shared(self, logits: Tensor) -> Tensor:
        """The drafter's logits [..., N or more] of the n shared pieces: normalised, a distribution over `ids`."""
        return logits[..., : len(self.own)] if self.whole else logits[..., self.own]

    def save(self, path: Path) -> None:
        """Writes a map that has tables: their hashes, and the pairs as runs (drafter's id, target's id, length)."""
        if self.digests is None:
            raise UserError("this map is of bare ids; one that is saved has the piece tables of both sides")
        breaks = (self.pairs.diff(dim=0) != 1).any(1).nonzero()[:, 0] + 1
        first = torch.cat([torch.zeros(1, dtype=torch.long), breaks])
        length = torch.cat([first[1:], torch.tensor([len(self.pairs)])]) - first
        raw = {
            "format": FORMAT, "drafter": self.digests[0], "target": self.digests[1],
            "sizes": [len(self.to_target), len(self.to_drafter)], "unknown": self.unknown,
            "runs": torch.cat([self.pairs[first], length[:, None]], 1).tolist(),
        }  # fmt: skip
        write_whole(path, json.dumps(raw) + "\n")

    @classmethod
    def load(cls, path: Path) -> VocabularyMap:
        """A saved map, which `check` has yet to compare with the tables at hand. UserError for what is none."""
        try:
            raw = parse_json(path.read_text(encoding="utf-8"))
            if raw["format"] != FORMAT:
                raise UserError(f"'{path}' is a vocabulary map of format {raw['format']}, not {FORMAT}; {REMEDY}")
            runs = [torch.arange(n)[:, None] + torch.tensor([own, theirs]) for own, theirs, n in raw["runs"]]
            own, theirs = raw["sizes"]
            return cls.of_pairs(torch.cat(runs), own, theirs, raw["unknown"], (raw["drafter"], raw["target"]))
        except (OSError, ValueError, KeyError, TypeError, IndexError, RuntimeError) as error:
            raise UserError(f"'{path}' is no vocabulary map ({error!r}); {REMEDY}") from error

    def check(self, drafter: Pieces, target: Pieces) -> None:
        """UserError unless it was made for these very tables."""
        if self.digests is None:
            return
        for side, known, table in zip(("drafter", "target"), self.digests, (drafter, target), strict=True):
            if known != table.digest:
                raise UserError(
                    f"the saved vocabulary map is for a {side} whose piece table has hash {known[:12]}, "
                    f"not {table.digest[:12]}; {REMEDY}"
                )
