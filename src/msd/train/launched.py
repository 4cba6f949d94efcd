"""The processes that `accelerate launch` started: which kinds are supported, and how they end."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs, PartialState
from accelerate.utils import DistributedType, parse_flag_from_env

from msd.drafters.toolkit import processes
from msd.errors import UserError

SHARED = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)  # one copy of the drafter each
SPLIT = ("FSDP", "DEEPSPEED", "MEGATRON_LM")  # as accelerate names them in the environment of a launched process
EVALUATION_LIMIT = timedelta(hours=12)  # for which the other processes wait for the main one


def launched(device: torch.device, batch: int) -> Accelerator:
    """Returns the processes that `accelerate launch` started, or this one. UserError for FSDP and too few answers."""
    for kind in SPLIT:  # before accelerate prepares it, which needs a GPU
        if parse_flag_from_env(f"ACCELERATE_USE_{kind}"):
            raise _refused(kind)
    found = Accelerator(
        cpu=device.type == "cpu",
        kwargs_handlers=[
            DistributedDataParallelKwargs(find_unused_parameters=True), InitProcessGroupKwargs(timeout=EVALUATION_LIMIT)
        ],
    )  # fmt: skip
    if found.distributed_type not in SHARED:
        raise _refused(found.distributed_type.value)
    if batch < found.num_processes:
        raise UserError(
            f"{found.num_processes} processes cannot share a batch of {batch}; give --batch "
            f"{found.num_processes} or more"
        )
    return found


def _refused(kind: str) -> UserError:
    return UserError(
        f"training with {kind} is not supported, as the drafter fits one GPU; launch it with recipes/scale/ddp.yaml"
    )


@contextmanager
def ending_together() -> Iterator[None]:
    """Ends the processes that were launched inside the block at the same time, and their communication before them.

    A thread of gloo may still hold the last tensors it sent. Dropping them while the interpreter ends aborts the
    process (pytorch/pytorch#179291), so the threads end first. After an error no process waits for the others.
    """
    try:
        yield
        if processes.place()[1] > 1:
            PartialState().wait_for_everyone()
    finally:
        if processes.place()[1] > 1:
            gc.collect()  # a network that averages its gradients holds the group
            dist.destroy_process_group()
