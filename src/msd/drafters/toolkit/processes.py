"""Sums over the processes that train a network together (`accelerate launch`).

Process r of P holds the rows r, r + P, … of every batch. Gradients are averaged over the processes, so a process
computes P times its own share of a loss: the average is the loss of the whole batch. One process communicates nothing.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor


def place() -> tuple[int, int]:
    """Returns (this process's number, the number of processes)."""
    alone = not (dist.is_available() and dist.is_initialized())
    return (0, 1) if alone else (dist.get_rank(), dist.get_world_size())


def summed(values: Tensor) -> Tensor:
    """Returns the sum of `values` over all processes, without gradient."""
    return _reduced(values, "SUM")


def largest(values: Tensor) -> Tensor:
    """Returns the largest of each of the `values` among all processes, without gradient."""
    return _reduced(values, "MAX")


def _reduced(values: Tensor, operation: str) -> Tensor:
    if place()[1] == 1:
        return values.detach()
    total = values.detach().clone()
    dist.all_reduce(total, getattr(dist.ReduceOp, operation))
    return total


def averaged(values: Mapping[str, float], device: torch.device) -> dict[str, float]:
    """Returns the average over the processes of each of the named values; every process gives the same names."""
    total = summed(torch.tensor(list(values.values()), dtype=torch.float64, device=device)) / place()[1]
    return dict(zip(values, total.tolist(), strict=True))


def anywhere(flag: bool, device: torch.device) -> bool:
    """Returns whether the flag is set in any process."""
    return flag if place()[1] == 1 else bool(largest(torch.tensor(int(flag), device=device)))


def mean(values: Tensor, weight: Tensor, least: float = 1e-6) -> Tensor:
    """Computes this process's share of the weighted mean of `values` over all rows; both are [B, ...].

    The mean is over all dimensions. Averaged over the processes, it is the mean over all their rows. least: the
    smallest total weight to divide by.
    """
    return ratio((values * weight).sum(), weight.sum(), least)


def ratio(part: Tensor, weight: Tensor, least: float = 1e-6) -> Tensor:
    """Computes this process's share of Σ part / Σ weight, both summed over the processes; see `mean`."""
    return place()[1] * part / summed(weight).clamp_min(least)


def uniform(like: Tensor) -> tuple[Tensor, int]:
    """Draws from U(0, 1) for rows [B, S, ...], with the same generator state in every process.

    Returns (the numbers, like `like`; the largest S of all processes). A row has the numbers of a run in one process,
    if S is the length of the longest row.
    """
    rank, count = place()
    rows, width = like.shape[:2]
    if count > 1:
        rows = int(summed(torch.tensor(rows, device=like.device)))
        width = int(largest(torch.tensor(width, device=like.device)))
    every = torch.rand((rows, width, *like.shape[2:]), dtype=like.dtype, device=like.device)
    return every[rank::count, : like.shape[1]], width
