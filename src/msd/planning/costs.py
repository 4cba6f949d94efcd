"""Seconds of a target pass over a tree of n nodes, measured once per machine and model and cached on disk.

    seconds(n, context) ≈ a(n) + b(n) · context

The curve is not linear in n: reading the weights costs the same for one row and for eight, and kernels change their
algorithm at some sizes. So it is measured at several sizes and two context lengths, and interpolated between them.
Recurrent layers run once per level of a tree, so their targets are measured with all drafted nodes on one level, and
each further level adds `Costs.level`.
"""

from __future__ import annotations

import hashlib
import json
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import platformdirs
import torch
from numpy.typing import NDArray
from pydantic import Field, TypeAdapter

from msd.core.tree import DraftTree
from msd.errors import UserError
from msd.system import machine
from msd.system.files import write_whole
from msd.targets.base import Target
from msd.targets.registry import fingerprint
from msd.targets.state import State

NODES = (1, 2, 3, 5, 9, 13, 17, 25, 33, 65)  # with the root
CONTEXTS = (64, 512)  # tokens
REPEATS = 5
LONG = 9  # nodes of the chain that shows the cost of a level
STATE_BYTES = 1 << 30  # that the recurrent states of all scored nodes may take


@dataclass(frozen=True)
class Costs:
    """Measured times: `seconds[j][i]`, of a pass of `nodes[i]` nodes with the root, after `contexts[j]` tokens.

    For one prompt; a batch counts the nodes of all its trees. level: further seconds for each level of drafted nodes
    below the first; 0 for targets without recurrent layers.
    """

    nodes: tuple[int, ...]
    contexts: tuple[int, ...]
    seconds: tuple[tuple[Annotated[float, Field(gt=0, allow_inf_nan=False)], ...], ...]
    level: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0

    def curve(self, largest: int, context: int) -> list[float]:
        """Returns the seconds of passes of 1, 2, … `largest` nodes after `context` tokens.

        Interpolates linearly between measured numbers of nodes and between the two contexts, and extrapolates linearly.
        """
        short, long = (self._interpolate(row, largest) for row in self.seconds)
        weight = (context - self.contexts[0]) / (self.contexts[1] - self.contexts[0])
        seconds: list[float] = np.maximum(short + weight * np.maximum(long - short, 0.0), 1e-9).tolist()
        return seconds

    def _interpolate(self, seconds: tuple[float, ...], largest: int) -> NDArray[np.float64]:
        """Seconds for 1 to `largest` nodes, from `seconds` for `nodes`."""
        count = np.arange(1, largest + 1)
        slope = (seconds[-1] - seconds[-2]) / (self.nodes[-1] - self.nodes[-2])
        beyond = np.maximum(count - self.nodes[-1], 0) * max(slope, 0.0)
        interpolated: NDArray[np.float64] = np.interp(count, self.nodes, seconds) + beyond
        return interpolated


def costs(target: Target, folder: Path | None = None) -> Costs:
    """The target's costs on this machine, from a file in `folder` (default: the user's cache), or measured and saved.

    A measurement is not saved if other processes disturbed it, or if the folder cannot be written to.
    """
    folder = folder or Path(platformdirs.user_cache_dir("msd", appauthor=False)) / "costs"
    path = folder / f"{_key(target)}.json"
    cached = _load(path)
    if cached is not None:
        return cached
    undisturbed, measured = machine.quietly(lambda: measure(target))
    if undisturbed:
        with suppress(OSError, UserError):
            folder.mkdir(parents=True, exist_ok=True)
            write_whole(path, json.dumps(asdict(measured)) + "\n")
    return measured


def _load(path: Path) -> Costs | None:
    """The saved measurement; None if there is no valid one."""
    try:
        loaded = TypeAdapter(Costs).validate_json(path.read_bytes())
    except (OSError, ValueError):
        return None
    rising = all(len(axis) > 1 and list(axis) == sorted(set(axis)) for axis in (loaded.nodes, loaded.contexts))
    whole = all(len(row) == len(loaded.nodes) for row in loaded.seconds)
    return loaded if rising and whole and len(loaded.seconds) == len(loaded.contexts) == len(CONTEXTS) else None


@torch.inference_mode()
def measure(target: Target, nodes: tuple[int, ...] = NODES, contexts: tuple[int, ...] = CONTEXTS) -> Costs:
    """Measures the fastest of several passes over arbitrary tokens; a disturbance only makes a pass slower.

    The trees are chains. Of a target with recurrent layers they have one level of drafted nodes and no more nodes than
    `STATE_BYTES` allows, and a chain shows what a level costs.
    """
    limit = target.context_length or 10**9
    contexts = tuple(min(c, max(1, limit - max(nodes) - 1) - (len(contexts) - 1 - i)) for i, c in enumerate(contexts))
    rows, level = [], 0.0
    for context in contexts:
        state, _ = target.prefill(arbitrary_tokens(context, target)[None], {}, context + max(nodes) + 1)
        node_bytes = state.cache.node_bytes
        if not node_bytes:
            rows.append(_fastest(target, state, [chain(n, target) for n in nodes]))
            continue
        nodes = tuple(n for n in nodes if n <= max(nodes[1], most_nodes(node_bytes)))
        long = max(nodes[1], *(n for n in nodes if n <= LONG))
        *seconds, of_chain = _fastest(target, state, [*(flat(n, target) for n in nodes), chain(long, target)])
        rows.append(tuple(seconds))
        level = max(0.0, of_chain - seconds[nodes.index(long)]) / max(1, long - 2)
    return Costs(nodes, contexts, tuple(rows), level)


def _fastest(target: Target, state: State, trees: list[DraftTree]) -> tuple[float, ...]:
    """The seconds of the fastest pass over each tree.

    Each repeat runs all trees in turn, so that a short disturbance does not affect all passes of one tree.
    """
    times: list[list[float]] = [[] for _ in trees]
    for repeat in range(REPEATS + 1):
        for i, tree in enumerate(trees):
            start = time.perf_counter()
            target.score(state, tree)
            if target.model.device.type == "cuda":
                torch.cuda.synchronize(target.model.device)
            if repeat:  # the first one warms up
                times[i].append(time.perf_counter() - start)
    return tuple(min(t) for t in times)


def most_nodes(node_bytes: int, state_bytes: int = STATE_BYTES) -> int:
    """The number of scored nodes, of all rows together, whose states fit in `state_bytes`."""
    return state_bytes // max(1, node_bytes)


def flat(nodes: int, target: Target) -> DraftTree:
    """A tree of `nodes` arbitrary tokens, all but the root on one level."""
    tokens = arbitrary_tokens(nodes, target)
    return DraftTree.from_lists(tokens[:1], [tokens[1:].tolist()], [[0] * (nodes - 1)])


def chain(nodes: int, target: Target) -> DraftTree:
    """A tree that is a chain of `nodes` arbitrary tokens, with the root."""
    tokens = arbitrary_tokens(nodes, target)
    return DraftTree.from_lists(tokens[:1], [tokens[1:].tolist()], [list(range(nodes - 1))])


def arbitrary_tokens(count: int, target: Target) -> torch.Tensor:
    """[count] arbitrary token ids, without placeholders."""
    size = target.model.get_input_embeddings().weight.shape[0]
    ids = (torch.arange(count, device=target.model.device) * 37 + 5) % size
    for placeholder in target.placeholders:
        ids = torch.where(ids == placeholder, (placeholder + 1) % size, ids)
    return ids


def _key(target: Target) -> str:
    """A hash of everything that a measurement depends on."""
    device = target.model.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else machine.processor()
    parts = (
        fingerprint(target.model), str(target.model.dtype), target.backend.name, target.backend.choice, name,
        torch.get_num_threads(), torch.__version__, NODES, CONTEXTS,
    )  # fmt: skip
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]
