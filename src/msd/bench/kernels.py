"""How much of a target pass is spent outside its kernels: in Python, in dispatch, in moving arguments about."""

from __future__ import annotations

import time
from statistics import median

import torch

from msd.planning.costs import chain, words
from msd.targets.base import Target

CONTEXT = 128
NODES = (1, 9)  # of plain decoding, and of a tree of eight drafts
TIMES = 7


@torch.inference_mode()
def outside_kernels(target: Target) -> dict[str, float] | None:
    """Nodes of a pass -> share of its time outside operators, in [0, 1].

    None where work is queued, as on a GPU, and with a torch that no longer has this profiler. (`torch.profiler` writes
    two lines to stderr each time it is used.)

    The time inside is the sum of the operators' own times in profiled passes, the whole that of passes without the
    profiler; medians of both. An operator's own time holds its C++ dispatch and some of the profiler's work, so the
    share is a lower bound.
    """
    if target.model.device.type != "cpu":
        return None
    try:
        from torch.autograd.profiler_legacy import profile
    except ImportError:
        return None
    state, _ = target.prefill(words(CONTEXT, target)[None], {}, CONTEXT + max(NODES) + 1)
    found = {}
    for nodes in NODES:
        tree = chain(nodes, target)
        whole, inside = [], []
        for _ in range(TIMES):
            start = time.perf_counter()
            target.score(state, tree)
            whole.append(time.perf_counter() - start)
            with profile() as record:
                target.score(state, tree)
            inside.append(sum(event.self_cpu_time_total for event in record.function_events or ()) / 1e6)
        found[str(nodes)] = max(0.0, 1 - median(inside) / median(whole))
    return found
