"""A proposer for vLLM's own speculative decoding: long repeats, with draft lengths by modality.

    vllm serve MODEL --speculative-config '{"method": "custom_class",
        "model": "msd.serve.vllm_proposer.RepeatProposer", "num_speculative_tokens": 8}'

vLLM calls `propose` after each step with token ids alone. So what this carries over is the lookup: a row whose last
tokens occurred before drafts what followed them, searched from the longest match down. How much it drafts depends on
the length of the match, and on how many drafts after such matches were accepted before, counted apart for requests with
and without images. Trained drafters need the target's states, trees need more than one draft per row: docs/vllm.md.

This module imports nothing but numpy, as it runs in vLLM's environment.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

LONGEST, SHORTEST = 12, 2  # tokens of a match
# tokens of a match, and of what follows it the mean number that are equal: measured on 4,400 answers of the reference
# model (msd/drafters/algorithms/prompt_lookup.py)
CLASSES = ((12, 5.3), (10, 3.7), (5, 1.6), (SHORTEST, 1.3))
PRIOR = 8.0  # drafts that these figures count for
LEAST = 0.3  # a token is drafted if the chance that all drafts up to it are accepted is at least so large


@dataclass(frozen=True)
class Drafted:
    """What a row drafted. start: its number of tokens then. last: the newest of them. kind: see `Chances`."""

    start: int
    last: int
    tokens: list[int]
    kind: tuple[bool, int]


class Chances:
    """How far drafts are accepted, for each kind: (whether the request has images, the class of its match)."""

    def __init__(self, depth: int) -> None:
        rates = [mean / (1 + mean) for _, mean in CLASSES]  # of a geometric distribution with this mean
        survival = np.array([[rate ** (k + 1) for k in range(depth)] for rate in rates])
        self.tried = np.full((2, len(CLASSES), depth), PRIOR)
        self.accepted = np.stack([survival, survival]) * PRIOR

    def length(self, kind: tuple[bool, int]) -> int:
        """Returns the number of tokens to draft."""
        enough = self.accepted[int(kind[0]), kind[1]] >= LEAST * self.tried[int(kind[0]), kind[1]]
        return len(enough) if enough.all() else int(enough.argmin())

    def observe(self, kind: tuple[bool, int], drafted: int, accepted: int) -> None:
        """Counts a draft of `drafted` tokens, of which the first `accepted` were accepted."""
        self.tried[int(kind[0]), kind[1], :drafted] += 1
        self.accepted[int(kind[0]), kind[1], :accepted] += 1


def match(tokens: NDArray[Any], marks: Sequence[int]) -> tuple[int, int]:
    """Finds the longest earlier occurrence of the last tokens; of equally long ones the newest.

    tokens: [L] ids of one request. marks: placeholder ids, which match nothing. Returns (the length of the match, at
    most `LONGEST`; the index of the token after it), or (0, 0) for one shorter than `SHORTEST`.
    """
    size = len(tokens)
    ends = np.arange(SHORTEST, size)  # candidates: the index after an earlier occurrence
    found = (0, 0)
    for back in range(1, min(LONGEST, size - 1) + 1):
        newest = tokens[size - back]
        if newest in marks:
            break
        ends = ends[(ends >= back) & (tokens[ends - back] == newest)]
        if not len(ends):
            break
        if back >= SHORTEST:
            found = back, int(ends[-1])
    return found


class RepeatProposer:
    """The object that vLLM makes from its configuration, and asks for drafts."""

    def __init__(self, vllm_config: Any) -> None:
        self.depth = int(vllm_config.speculative_config.num_speculative_tokens)
        self.limit = int(vllm_config.model_config.max_model_len)
        config = vllm_config.model_config.hf_config
        names = [f"{kind}_token_{form}" for kind in ("image", "video", "audio") for form in ("id", "index")]
        self.marks = [mark for name in names if isinstance(mark := getattr(config, name, None), int)]
        self.chances = Chances(self.depth)
        self.drafted: dict[int, Drafted] = {}

    def load_model(self, *_: Any, **__: Any) -> None:
        """Does nothing: there are no weights. vLLM's runner for CPUs calls it."""

    def propose(
        self,
        sampled_token_ids: Sequence[Sequence[int]],
        num_tokens_no_spec: NDArray[Any],
        token_ids_cpu: NDArray[Any],
        slot_mappings: Any = None,
    ) -> list[list[int]]:
        """Returns the drafts of each row of the batch.

        sampled_token_ids: what each row emitted in the step; empty while its prompt is read. num_tokens_no_spec: [B],
        each row's tokens with these. token_ids_cpu: [B, C] ids. slot_mappings: unused.
        """
        drafts: list[list[int]] = []
        for row, emitted in enumerate(sampled_token_ids):
            count = int(num_tokens_no_spec[row])
            tokens = token_ids_cpu[row, :count]
            self._observe(row, tokens, len(emitted))
            drafts.append(self._draft(row, tokens) if len(emitted) and count < self.limit else [])
        return drafts

    def _observe(self, row: int, tokens: NDArray[Any], emitted: int) -> None:
        """Counts what was accepted of the row's draft, unless the row has another request since."""
        before = self.drafted.pop(row, None)
        if before is None or not emitted or len(tokens) - emitted != before.start:
            return
        if before.start and tokens[before.start - 1] == before.last:
            pairs = zip(before.tokens, tokens[before.start :].tolist(), strict=False)
            equal = next((i for i, (draft, token) in enumerate(pairs) if draft != token), emitted)
            self.chances.observe(before.kind, len(before.tokens), min(equal, len(before.tokens), emitted))

    def _draft(self, row: int, tokens: NDArray[Any]) -> list[int]:
        """Returns what followed the longest match, as far as its kind is accepted."""
        length, start = match(tokens, self.marks)
        if not length:
            return []
        number = next(i for i, (least, _) in enumerate(CLASSES) if length >= least)
        kind = bool(np.isin(tokens, self.marks).any()), number
        most = min(self.chances.length(kind), self.limit - len(tokens))
        draft: list[int] = tokens[start : start + most].tolist()
        draft = draft[: next((i for i, token in enumerate(draft) if token in self.marks), len(draft))]
        if draft:
            self.drafted[row] = Drafted(len(tokens), int(tokens[-1]), draft, kind)
        return draft
