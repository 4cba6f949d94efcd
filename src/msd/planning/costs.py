"""What a target pass costs here: seconds for a tree of n nodes, measured once per machine and model, kept on disk.

    seconds(n, context) ≈ a(n) + b(n) · context

The curve is far from a line in n: reading the weights costs the same for one row and for eight, and kernels change
their method at certain sizes. So it is measured at some sizes, at two lengths of context, and interpolated between.
"""

from __future__ import annotations

import hashlib
import json
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import platformdirs
import torch
from numpy.typing import NDArray
from pydantic import TypeAdapter

from msd.core.tree import DraftTree
from msd.errors import UserError
from msd.system import machine
from msd.system.files import parse_json, write_whole
from msd.targets.base import Target
from msd.targets.registry import fingerprint

NODES = (1, 2, 3, 5, 9, 13, 17, 25, 33, 65)  # the root included
CONTEXTS = (64, 512)
TIMES = 5


@dataclass(frozen=True)
class Costs:
    """Seconds of a pass over `nodes[i]` nodes after `contexts[j]` tokens: seconds[j][i]."""

    nodes: tuple[int, ...]
    contexts: tuple[int, ...]
    seconds: tuple[tuple[float, ...], ...]

    def of(self, largest: int, context: int) -> list[float]:
        """Seconds of a pass over 1, 2, … `largest` nodes after `context` tokens; more than measured go on in a line."""
        near, far = (self._curve(row, largest) for row in self.seconds)
        share = (context - self.contexts[0]) / (self.contexts[1] - self.contexts[0])
        found: list[float] = np.maximum(near + share * np.maximum(far - near, 0.0), 1e-9).tolist()
        return found

    def _curve(self, seconds: tuple[float, ...], largest: int) -> NDArray[np.float64]:
        """Of 1 to `largest` nodes, from those of `nodes`."""
        count = np.arange(1, largest + 1)
        slope = (seconds[-1] - seconds[-2]) / (self.nodes[-1] - self.nodes[-2])
        beyond = np.maximum(count - self.nodes[-1], 0) * max(slope, 0.0)
        found: NDArray[np.float64] = np.interp(count, self.nodes, seconds) + beyond
        return found


def costs(target: Target, folder: Path | None = None) -> Costs:
    """The target's costs on this machine: from `folder` (the user's cache by default), or measured and kept there."""
    folder = folder or Path(platformdirs.user_cache_dir("msd", appauthor=False)) / "costs"
    path = folder / f"{_key(target)}.json"
    kept = _kept(path)
    if kept is not None:
        return kept
    undisturbed, found = machine.quietly(lambda: measure(target))
    if not undisturbed:
        return found  # a curve from beside a busy neighbour is of no lasting use: measured again next time
    with suppress(OSError, UserError):  # a cache that can't be written is measured again next time
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(asdict(found)) + "\n")
    return found


def _kept(path: Path) -> Costs | None:
    """An earlier measurement; None where there is none that could be one: what is damaged is measured again."""
    try:
        text = path.read_text(encoding="utf-8")
        parse_json(text)  # refuses numbers that are not finite
        found = TypeAdapter(Costs).validate_json(text)
    except (OSError, ValueError):
        return None
    rising = all(len(axis) > 1 and list(axis) == sorted(set(axis)) for axis in (found.nodes, found.contexts))
    timed = all(len(row) == len(found.nodes) and min(row) > 0 for row in found.seconds)
    return found if rising and timed and len(found.seconds) == len(found.contexts) == len(CONTEXTS) else None


@torch.inference_mode()
def measure(target: Target, nodes: tuple[int, ...] = NODES, contexts: tuple[int, ...] = CONTEXTS) -> Costs:
    """Fastest of several passes over chains of arbitrary tokens: what disturbs a pass only makes it slower.

    The sizes are taken in turn, so that a slow moment spoils none of them.
    """
    limit = target.context_length or 10**9
    contexts = tuple(min(c, max(1, limit - max(nodes) - 1) - (len(contexts) - 1 - i)) for i, c in enumerate(contexts))
    rows = []
    for context in contexts:
        state, _ = target.prefill(words(context, target)[None], {}, context + max(nodes) + 1)
        trees = [chain(n, target) for n in nodes]
        times: list[list[float]] = [[] for _ in nodes]
        for turn in range(TIMES + 1):
            for i, tree in enumerate(trees):
                start = time.perf_counter()
                target.score(state, tree)
                if target.model.device.type == "cuda":
                    torch.cuda.synchronize(target.model.device)
                if turn:
                    times[i].append(time.perf_counter() - start)
        rows.append(tuple(min(t) for t in times))
    return Costs(nodes, contexts, tuple(rows))


def chain(nodes: int, target: Target) -> DraftTree:
    """A tree that is one chain of arbitrary tokens, the root included in `nodes`."""
    tokens = words(nodes, target)
    return DraftTree.from_lists(tokens[:1], [tokens[1:].tolist()], [list(range(nodes - 1))])


def words(count: int, target: Target) -> torch.Tensor:
    """[count] arbitrary token ids, none of them an image's."""
    size = target.model.get_input_embeddings().weight.shape[0]
    ids = (torch.arange(count, device=target.model.device) * 37 + 5) % size
    for placeholder in target.placeholders:
        ids = torch.where(ids == placeholder, (placeholder + 1) % size, ids)
    return ids


def _key(target: Target) -> str:
    """What a measurement depends on."""
    device = target.model.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else machine.processor()
    parts = (
        fingerprint(target.model), str(target.model.dtype), target.backend.name, target.backend.choice, name,
        torch.get_num_threads(), torch.__version__, NODES, CONTEXTS,
    )  # fmt: skip
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]
