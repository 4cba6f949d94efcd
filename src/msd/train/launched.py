"""The processes that `accelerate launch` started: which kinds are supported, and how they end."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs, PartialState
from accelerate.utils import DistributedType, parse_flag_from_env, patch_environment

from msd.drafters.toolkit import processes
from msd.errors import UserError

SHARED = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)  # one copy of the drafter each
REFUSED = ("DEEPSPEED", "MEGATRON_LM")  # as accelerate names them in the environment of a launched process
FSDP = "ACCELERATE_USE_FSDP"
FSDP_SETTINGS = {  # of accelerate -> what each must be, where it is given
    "version": "2", "offload_params": "false", "reshard_after_forward": "true", "activation_checkpointing": "false",
    "auto_wrap_policy": "transformer_based_wrap", "state_dict_type": "full_state_dict",
    "transformer_cls_to_wrap": None, "ignored_modules": None,
}  # fmt: skip
EVALUATION_LIMIT = timedelta(hours=12)  # for which the other processes wait for the main one


def splits_target() -> bool:
    """Returns whether `accelerate launch` asks for FSDP. UserError for settings that have no meaning here."""
    if not parse_flag_from_env(FSDP):
        return False
    for name, wanted in FSDP_SETTINGS.items():
        given = os.environ.get(f"FSDP_{name.upper()}")
        if given is not None and given.lower() != wanted:
            raise UserError(
                f"fsdp_{name} '{given}' is not supported, as only the target's layers are split; "
                + ("leave it out" if wanted is None else f"set it to {wanted}")
            )
    return True


def launched(device: torch.device, batch: int | None = None) -> Accelerator:
    """Returns the processes that `accelerate launch` started, or this one.

    batch: answers that they share in a step. Each has the whole drafter, also with FSDP (see `msd.train.split_target`).
    UserError for other kinds of processes, and for too few answers.
    """
    for kind in REFUSED:  # before accelerate prepares it, which needs a GPU
        if parse_flag_from_env(f"ACCELERATE_USE_{kind}"):
            raise _refused(kind)
    splits_target()
    with patch_environment(**{FSDP: "false"}):  # accelerate would split the drafter
        found = Accelerator(
            cpu=device.type == "cpu",
            kwargs_handlers=[
                DistributedDataParallelKwargs(find_unused_parameters=True),
                InitProcessGroupKwargs(timeout=EVALUATION_LIMIT),
            ],
        )
    if found.distributed_type not in SHARED:
        raise _refused(found.distributed_type.value)
    if batch is not None and batch < found.num_processes:
        raise UserError(
            f"{found.num_processes} processes cannot share a batch of {batch}; give --batch "
            f"{found.num_processes} or more"
        )
    return found


def _refused(kind: str) -> UserError:
    return UserError(
        f"training with {kind} is not supported, as the drafter fits one GPU; launch it with recipes/scale/ddp.yaml, "
        "or with fsdp.yaml beside it for a target that does not"
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
