"""The growth of draft trees: equal to a plain implementation, one look at the host, and few operators."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_msd import network
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import rivals
import tiny
from msd.backends import norms
from msd.config import SpeculativeConfig
from msd.core.foresight import Outlook
from msd.core.tree import DraftTree
from msd.core.trust import scale
from msd.drafters import Drafter
from msd.drafters.algorithms.draft_model import DraftModel
from msd.drafters.algorithms.msd.drafter import MSD
from msd.drafters.toolkit.chance import NodeFeatures, corrected
from msd.drafters.toolkit.drafter import TrainedDrafter
from msd.drafters.toolkit.growth import Distributions, Shape, Subtrees, grow
from msd.drafters.toolkit.level_cost import LevelCost
from msd.drafters.toolkit.selection import NEVER
from msd.model import SpeculativeVLM
from msd.planning.costs import Costs
from msd.planning.plan import Budget

MODEL = tiny.llava()
V, FIRST, EXPERTS = 12, 5, 3  # draft vocabulary, its first target id, modalities
Path = tuple[int, ...]


def below(seed: int, row: int, subtree: int, path: Path) -> tuple[Tensor, float, list[float]]:
    """Random (logits [V], confidence, modality weights) below a path; the subtrees differ at the root only."""
    key = hash((seed, row, subtree if not path else -1, path)) % 2**31
    random = torch.Generator().manual_seed(key)
    weights = torch.rand(EXPERTS, generator=random).tolist()
    return torch.randn(V, generator=random) * 3, float(torch.randn((), generator=random)), weights


class RandomLevels:
    """See `Levels`: distributions that depend on the path alone."""

    def __init__(self, seed: int, rows: int) -> None:
        self.seed, self.rows = seed, rows
        self.paths: list[list[tuple[int, Path]]] = []

    def root(self, weights: Tensor) -> Distributions:
        self.paths = [[(m, ()) for m in range(weights.shape[1])] for _ in range(self.rows)]
        return self._distributions()

    def below(self, tokens: Tensor, above: Tensor) -> Distributions:
        rows = zip(self.paths, tokens.tolist(), above.tolist(), strict=True)
        self.paths = [[(p[a][0], (*p[a][1], t)) for t, a in zip(ts, at, strict=True)] for p, ts, at in rows]
        return self._distributions()

    def _distributions(self) -> Distributions:
        found = [[below(self.seed, b, m, path) for m, path in row] for b, row in enumerate(self.paths)]
        logits, confidence, weights = (
            torch.stack([torch.stack([torch.as_tensor(x[i]) for x in row]) for row in found]) for i in range(3)
        )
        return Distributions(logits, confidence, weights)


class Vocabulary:
    """See `DraftVocabulary`."""

    ids = torch.arange(FIRST, FIRST + V)

    def log_acceptance(self, node: NodeFeatures) -> Tensor:
        return torch.nn.functional.logsigmoid(node.log_q + 2 + 0.3 * node.confidence)


@dataclass
class Grown:
    """A node of the plain implementation."""

    path: Path
    score: float
    q: float
    weights: list[float] = field(default_factory=list)


def plain_subtree(
    seed: int, row: int, subtree: int, shape: Shape, depth: int, heat: float | None, noise: Tensor | None
) -> list[Grown]:
    """All candidates of one subtree: beam search, written as EAGLE-2 describes it. noise: of the draws [levels, V]."""
    frontier, out = [Grown((), 0.0, 1.0)], []
    for at in range(min(shape.depth, depth)):
        level = []
        for node in frontier:
            logits, confidence, weights = below(seed, row, subtree, node.path)
            log_q = (logits if heat is None else logits / heat).log_softmax(-1)
            log_q = log_q if noise is None else (log_q.exp() / noise[at]).log().log_softmax(-1)
            for index in log_q.argsort(descending=True)[: shape.width].tolist():
                q = log_q[index]
                fitted = heat is None or noise is not None
                chance = float(Vocabulary().log_acceptance(NodeFeatures(q, torch.tensor(confidence))) if fitted else q)
                level.append(Grown((*node.path, index + FIRST), node.score + chance - 1e-5, math.exp(q), weights))
        out += level
        frontier = sorted(level, key=lambda n: -n.score)[: shape.width]
    return out


def plain_tree(found: list[list[Grown]], share: list[float], nodes: int) -> list[Grown]:
    """The nodes that subtrees with the candidates `found` contribute: first within their shares, then to fill up."""
    exact = [s / sum(share) * nodes for s in share]
    count = [int(x) for x in exact]
    for m in sorted(range(len(share)), key=lambda m: count[m] - exact[m])[: nodes - sum(count)]:
        count[m] += 1
    ranked = [sorted(one, key=lambda n: -n.score) for one in found]
    whole = sum(share)
    weighted = lambda part: sorted(  # noqa: E731
        ((n, m) for m, one in enumerate(part) for n in one), key=lambda x: -x[0].score - math.log(share[x[1]] / whole)
    )
    within = weighted([one[:n] for one, n in zip(ranked, count, strict=True)])
    over = weighted([one[n:] for one, n in zip(ranked, count, strict=True)])
    tree: dict[Path, Grown] = {}
    for node, _ in (within + over)[: nodes * len(share)]:
        known = tree.get(node.path)
        if known is not None:
            known.score = max(known.score, node.score)
        elif len(tree) < nodes:
            tree[node.path] = node
    return list(tree.values())


def plain_best(rows: list[list[Grown]], seconds: list[float]) -> list[list[Grown]]:
    """The nodes of highest score, as many as maximise tokens per second."""
    ranked = [sorted(row, key=lambda n: -n.score) for row in rows]
    most = max(map(len, rows))
    rate = [(len(rows) + sum(math.exp(n.score) for r in ranked for n in r[:k])) / seconds[k] for k in range(most + 1)]
    best = rate.index(max(rate))
    return [[n for n in row if n in kept[:best]] for row, kept in zip(rows, ranked, strict=True)]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_trees_equal_those_of_a_plain_implementation(data: st.DataObject) -> None:
    rows, nodes = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 20))
    depth = data.draw(st.lists(st.integers(1, 5), min_size=rows, max_size=rows))
    many = data.draw(st.booleans())
    shape = st.builds(Shape, st.integers(1, 5), st.integers(1, 5))
    shapes = data.draw(st.lists(shape, min_size=3, max_size=3)) if many else [data.draw(shape)]
    share = torch.tensor([[0.5, 0.3, 0.2], [0.7, 0.3, 0.0], [0.0, 0.0, 1.0]])[:rows] if many else torch.ones(rows, 1)
    heat = data.draw(st.sampled_from([None, 1.0, 0.7]))
    seconds = data.draw(st.sampled_from([None, [0.03 + 0.002 * n for n in range(nodes + 1)]]))
    seed = data.draw(st.integers(0, 10_000))
    noise = None
    if heat is not None and data.draw(st.booleans()):
        noise = torch.empty(rows, 5, FIRST + V).exponential_(generator=torch.Generator().manual_seed(seed))
    known = [None if noise is None else noise[b, :, FIRST:] for b in range(rows)]

    expected = []
    for b in range(rows):
        own = [m for m in range(len(shapes)) if share[b, m]]
        widest = sum(s.width for s in shapes)
        if nodes < widest and len(own) > 1:
            nodes_enough = sum(shapes[m].width for m in own) <= nodes
            if not nodes_enough:
                return  # several subtrees share a frontier of `nodes` places: no plain description
        found = [plain_subtree(seed, b, m, shapes[m], depth[b], heat, known[b]) for m in own]
        expected.append(plain_tree(found, [float(share[b, m]) for m in own], nodes))
    if seconds is not None:
        expected = plain_best(expected, seconds)
    weights = torch.eye(EXPERTS).expand(rows, -1, -1)[:, : len(shapes)]
    budget = Budget(nodes, depth, seconds=None if seconds is None else tuple(seconds))
    roots = torch.arange(rows)
    outlook = None if heat is None else lambda levels: Outlook(lambda logits: logits / heat, noise)
    tree = grow(
        RandomLevels(seed, rows), Vocabulary(), Subtrees(weights, share, shapes), [7, 8, 9], roots, budget, outlook
    )

    assert tree.tokens[:, 0].tolist() == roots.tolist()
    for b, wanted in enumerate(expected):
        paths: list[Path] = [()]
        for n in range(1, int(tree.valid[b].sum())):
            parent = int(tree.parents[b, n])
            paths.append((*paths[parent], int(tree.tokens[b, n])))
            assert int(tree.depths[b, n]) == len(paths[-1])
        assert paths[1:] == [n.path for n in wanted]
        assert tree.q is not None
        torch.testing.assert_close(tree.q[b, 1 : len(paths)], torch.tensor([n.q for n in wanted]), rtol=1e-4, atol=1e-6)
        kinds = [7 + max(range(EXPERTS), key=n.weights.__getitem__) for n in wanted]
        assert tree.modality[b, 1 : len(paths)].tolist() == kinds
    assert tree.height == max(max((len(n.path) for n in row), default=0) for row in expected)
    assert tree.size == 1 + max(map(len, expected)) and NEVER < -1e29


def test_each_row_has_its_own_correction() -> None:
    """Of two rows with the same distributions, the second one's chances are shifted."""

    class Same(RandomLevels):
        def _distributions(self) -> Distributions:
            self.paths = [self.paths[0]] * self.rows
            both = super()._distributions()
            return Distributions(*(x[:1].expand(2, *x.shape[1:]) for x in (both.logits, both.confidence, both.weights)))

    def drafted(shift: tuple[float, ...] | None) -> list[dict[tuple[int, int], float]]:
        subtrees = Subtrees(torch.eye(EXPERTS).expand(2, -1, -1)[:, :1], torch.ones(2, 1), [Shape(4, 1)])
        tree = grow(Same(3, 2), Corrected(), subtrees, [7, 8, 9], torch.arange(2), Budget(4, [1, 1], shift=shift))
        assert tree.forecast is not None
        tokens = tree.tokens.tolist()
        return [
            {(parent, tokens[b][n]): chance for n, (parent, chance) in enumerate(row, 1)}
            for b, row in enumerate(tree.forecast)
        ]

    class Corrected(Vocabulary):
        def log_acceptance(self, node: NodeFeatures) -> Tensor:
            return corrected(node.log_q, node.correction)

    plain, (first, second) = drafted(None), drafted((0.0, -2.0))
    assert first == pytest.approx(plain[0], abs=1e-4) and first.keys() == second.keys()
    for node, chance in second.items():
        odds = math.log(first[node] / (1 - first[node]))
        assert chance == pytest.approx(1 / (1 + math.exp(2.0 - odds * scale(-2.0))), abs=1e-4)


class Operators(TorchDispatchMode):
    """Counts operators, and reads of tensor values by the host."""

    READS = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero")

    def __init__(self, counts: list[int]) -> None:
        super().__init__()
        self.counts = counts

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[0] += 1
        self.counts[1] += func.overloadpacket.__name__ in self.READS
        return func(*args, **(kwargs or {}))


def counted(
    drafter: Drafter, monkeypatch: pytest.MonkeyPatch, inputs: dict[str, Tensor] | None = None
) -> list[tuple[int, int, int]]:
    """Decodes; returns (operators, reads by the host, levels allowed) of each draft, with the storing of states before.

    Levels that are allowed are drafted, as far as the drafter's own depth.
    """
    counts = [0, 0]

    def watched(call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            with Operators(counts):
                return call(*args)

        return run

    def reading(name: str) -> None:
        plain = getattr(Tensor, name)

        def read(self: Tensor, *args: Any) -> Any:
            counts[1] += 1
            return plain(self, *args)

        monkeypatch.setattr(Tensor, name, read)

    engine = SpeculativeVLM(MODEL, None, SpeculativeConfig(backend="plain", adaptive=False), drafter)
    if isinstance(drafter, MSD):
        drafter.network.pack()  # as the default backend does; it prepares the draft vocabulary
    engine.plan.costs = Costs((1, 9), (1, 500), ((1e6, 1e6 + 1), (1e6, 1e6 + 1)))
    monkeypatch.setattr(engine.plan, "learn", lambda *_: None)  # no pause
    monkeypatch.setattr(LevelCost, "levels", lambda self, deepest, *_: deepest)  # every level pays
    monkeypatch.setattr(norms, "SMALL", 0)  # a norm is one operator, as on a GPU
    found: list[tuple[int, int, int]] = []
    propose = watched(drafter.propose)

    def proposing(state: Any, budget: Budget, sampler: Any) -> DraftTree:
        monkeypatch.setattr(Tensor, "tolist", tolist)
        reading("tolist")
        tree: DraftTree = propose(state, budget, sampler)
        monkeypatch.setattr(Tensor, "tolist", tolist)
        found.append((counts[0], counts[1], max(budget.depth)))
        counts[:] = [0, 0]
        return tree

    tolist = Tensor.tolist
    monkeypatch.setattr(drafter, "propose", proposing)
    monkeypatch.setattr(drafter, "observe", watched(drafter.observe))
    engine.generate(**(inputs or tiny.llava_inputs()), max_new_tokens=24, min_new_tokens=24, do_sample=False)
    return found


# operators of (a whole draft, one level), views included, a tenth more than measured. A level without layers has top-k
# and the next frontier, 29 operators; one with a layer 45 more; three subtrees, the router and experts 40 more.
# "msd:ar" and "msd:block" have all parts, "msd" those that it has by default.
LIMITS = {
    "msd": (685, 97), "msd:ar": (760, 110), "msd:block": (590, 57), "eagle3": (780, 83), "eagle2": (570, 79),
    "vispec": (425, 83), "dflash": (470, 34), "dspark": (520, 46),
}  # fmt: skip


def trained(name: str) -> TrainedDrafter:
    if name.startswith("msd"):
        without = ("readout", *(("experts", "transfer", "vision") if name == "msd" else ()))
        return MSD(network("block" if name == "msd:block" else "ar", **dict.fromkeys(without, False)))
    return TrainedDrafter(rivals.network(MODEL, name))


@pytest.mark.parametrize("name", LIMITS)
def test_a_draft_is_read_once_and_has_few_operators(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each operator takes about 3 µs on a CPU and each launch on a GPU about 5; each read stops a GPU."""
    drafter = trained(name)
    drafts, depth = counted(drafter, monkeypatch), drafter.network.config.depth
    later = [draft for draft in drafts[1:] if draft[2]]
    assert len(later) > 10 and drafts[0][0] > later[0][0], "the first draft reads the prompt"
    assert {reads for _, reads, _ in later} == {1}
    most = {min(levels, depth): operators for operators, _, levels in later}  # the last draft with so many levels
    shallow = sorted(most)[1]
    assert max(most) == depth > shallow
    assert max(operators for operators, _, _ in later) <= LIMITS[name][0]
    assert (most[depth] - most[shallow]) / (depth - shallow) <= LIMITS[name][1]


@pytest.mark.parametrize("name", ["msd", "eagle3"])
def test_a_batch_is_read_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of unequal lengths, which end at different steps; operators depend little on the number of rows."""
    drafts = counted(trained(name), monkeypatch, rivals.prompts(3))
    later = [draft for draft in drafts[1:] if draft[2]]
    assert len(later) > 10 and {reads for _, reads, _ in later} == {1}
    assert max(operators for operators, _, _ in later) <= 1.3 * LIMITS[name][0]


def test_levels_of_another_model_need_no_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second model reads the emitted tokens on the host, and translates them: three reads, whatever it drafts."""
    later = counted(DraftModel(tiny.llava(seed=1)), monkeypatch)[1:]
    assert {reads for _, reads, levels in later if levels} == {4}
    assert len({levels for _, _, levels in later}) > 3
