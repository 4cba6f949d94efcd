"""A map between the drafter's vocabulary and the target's.

Two tokens are the same if their piece strings and kinds (special or normal) agree. Two models that extend one table,
such as LLaMA's 32,000 pieces, map its ids to themselves; in general the map is any one-to-one pairing. A piece that
only the drafter has is masked in the draft; one that only the target has is read as the drafter's unknown piece.

A saved map holds the hashes of both piece tables and is refused for other tables.
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
REMEDY = "remove the saved map, and a new one is built from the two tables"


@dataclass(frozen=True)
class Pieces:
    """A piece table. names: by id, None for an id without a piece. special: ids of special tokens.

    unknown: id of the unknown piece.
    """

    names: tuple[str | None, ...]
    special: frozenset[int]
    unknown: int = 0

    @classmethod
    def of(cls, tokenizer: Any) -> Pieces:
        """Reads the table of a `transformers` tokenizer."""
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
        """Returns JSON text for `from_json`."""
        raw = {"unknown": self.unknown, "special": sorted(self.special), "pieces": self.names}
        return json.dumps(raw, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> Pieces:
        """Parses the text of `as_json`; UserError if it is not a piece table."""
        try:
            raw = parse_json(text)
            names, special, unknown = raw["pieces"], raw["special"], raw["unknown"]
            if not all(isinstance(name, str | None) for name in names):
                raise TypeError("a piece is neither text nor null")
            if not all(isinstance(i, int) and 0 <= i < len(names) for i in (*special, unknown)):
                raise TypeError("an id is not one of its pieces")
            return cls(tuple(names), frozenset(special), unknown)
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"it is not a piece table ({error!r})") from error


@dataclass(frozen=True, eq=False)
class VocabularyMap:
    """Maps a drafter's N pieces to a target's M pieces and back.

    to_target: [N] int64, -1 if the target has no such piece. to_drafter: [M] int64, -1 if the drafter has no such
    piece. unknown: the drafter's id that such a token is read as. digests: hashes of the drafter's and the target's
    table; None for a map of ids without tables.
    """

    to_target: Tensor
    to_drafter: Tensor
    unknown: int = 0
    digests: tuple[str, str] | None = None

    @classmethod
    def between(cls, drafter: Pieces, target: Pieces) -> VocabularyMap:
        """Builds the map of two piece tables. UserError if they share no piece."""
        ids = {name: i for i, name in enumerate(target.names) if name is not None}
        same = [(i, ids[name]) for i, name in enumerate(drafter.names) if name in ids]
        pairs = [(i, j) for i, j in same if (i in drafter.special) == (j in target.special)]
        if not pairs:
            raise UserError("drafter and target share no piece of their vocabularies; choose a drafter that does")
        digests = drafter.digest, target.digest
        return cls.of_pairs(torch.tensor(pairs), len(drafter.names), len(target.names), drafter.unknown, digests)

    @classmethod
    def of_pairs(
        cls, pairs: Tensor, drafter: int, target: int, unknown: int = 0, digests: tuple[str, str] | None = None
    ) -> VocabularyMap:
        """Builds a map from pairs [n, 2] int64 (drafter's id, target's id), for vocabularies of these sizes."""
        to_target, to_drafter = torch.full((drafter,), -1), torch.full((target,), -1)
        to_target[pairs[:, 0]], to_drafter[pairs[:, 1]] = pairs[:, 1], pairs[:, 0]
        return cls(to_target, to_drafter, unknown, digests)

    @classmethod
    def identity(cls, count: int) -> VocabularyMap:
        """Builds the identity map of `count` ids."""
        same = torch.arange(count)
        return cls(same, same.clone())

    def sized(self, drafter: int, target: int) -> VocabularyMap:
        """Resizes the map to embeddings of these numbers of rows; pairs beyond them are dropped."""
        pairs = self.pairs
        pairs = pairs[(pairs[:, 0] < drafter) & (pairs[:, 1] < target)]
        return VocabularyMap.of_pairs(pairs, drafter, target, self.unknown, self.digests)

    def to(self, device: torch.device) -> VocabularyMap:
        """Returns the map on another device."""
        return VocabularyMap(self.to_target.to(device), self.to_drafter.to(device), self.unknown, self.digests)

    @cached_property
    def pairs(self) -> Tensor:
        """[n, 2] int64: (drafter's id, target's id) of each shared piece, ordered by the drafter's id."""
        own = (self.to_target >= 0).nonzero()[:, 0]
        return torch.stack([own, self.to_target[own]], 1)

    @cached_property
    def drafter_ids(self) -> Tensor:
        """[n] int64: the drafter's id of each shared piece."""
        return self.pairs[:, 0].contiguous()

    @cached_property
    def ids(self) -> Tensor:
        """[n] int64: the target's id of each shared piece; only these can be drafted."""
        return self.pairs[:, 1].contiguous()

    def read(self, tokens: Tensor) -> Tensor:
        """Maps the target's tokens [...] to the drafter's ids [...], or to its unknown piece."""
        known = tokens < len(self.to_drafter)
        ids = self.to_drafter[tokens.clamp_max(len(self.to_drafter) - 1)]
        return torch.where(known & (ids >= 0), ids, self.unknown)

    def shared(self, logits: Tensor) -> Tensor:
        """Selects the logits [..., n] of the shared pieces, in the order of `ids`, from [..., N or more]."""
        all_shared = len(self.drafter_ids) == len(self.to_target)
        return logits[..., : len(self.drafter_ids)] if all_shared else logits[..., self.drafter_ids]

    def save(self, path: Path) -> None:
        """Saves the hashes of the tables, and the pairs as runs (drafter's id, target's id, length)."""
        if self.digests is None:
            raise UserError("a map of bare ids cannot be saved; build one from two piece tables")
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
        """Loads a saved map, without comparing it with the tables (`check`). UserError if the file is not a map."""
        try:
            raw = parse_json(path.read_text(encoding="utf-8"))
            if raw["format"] != FORMAT:
                raise UserError(f"'{path}' is a vocabulary map of format {raw['format']}, not {FORMAT}; {REMEDY}")
            runs = [torch.arange(n)[:, None] + torch.tensor([own, theirs]) for own, theirs, n in raw["runs"]]
            own, theirs = raw["sizes"]
            return cls.of_pairs(torch.cat(runs), own, theirs, raw["unknown"], (raw["drafter"], raw["target"]))
        except (OSError, ValueError, KeyError, TypeError, IndexError, RuntimeError) as error:
            raise UserError(f"'{path}' is not a vocabulary map ({error!r}); {REMEDY}") from error

    def check(self, drafter: Pieces, target: Pieces) -> None:
        """Raises UserError unless the map was built for these tables."""
        if self.digests is None:
            return
        for side, known, table in zip(("drafter", "target"), self.digests, (drafter, target), strict=True):
            if known != table.digest:
                raise UserError(
                    f"the saved vocabulary map is for a {side} whose piece table has hash {known[:12]}, "
                    f"not {table.digest[:12]}; {REMEDY}"
                )
