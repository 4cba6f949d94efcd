"""Loads a target that `accelerate launch` splits over its processes with FSDP, for one that no GPU holds.

The decoder layers are split (`fully_shard` of PyTorch): each process keeps its part of each layer, and gathers one
layer at a time in a pass. The rest of the target is whole everywhere, because drafters read its embeddings and its
output layer outside of the target's passes, and so is the drafter. Every process must run the same target passes.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import patch_environment
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from msd.errors import UserError
from msd.loading import load_target
from msd.targets.taps import text_decoder
from msd.train.launched import FSDP, launched, splits_target


def load(target: str | Path, device: str | None, batch: int | None = None) -> tuple[PreTrainedModel, Any]:
    """Loads (model, processor) as `load_target` does, split if the launcher asks for FSDP and several processes.

    The processes of a machine load one after the other, so that its memory holds one whole target at a time. batch: as
    for `launched`. Raises UserError as there, and for a target that cannot be split.
    """
    if not splits_target():
        return load_target(target, device)
    kind = _kind(device)
    processes = launched(torch.device(kind), batch)
    if processes.num_processes == 1:
        return load_target(target, device)
    if processes.device.type != kind:
        raise UserError(f"device '{device}' cannot be used here; --device cpu always can")
    mesh = init_device_mesh(kind, (processes.num_processes,))
    for turn in range(processes.num_processes):
        if turn == processes.local_process_index:
            with patch_environment(**{FSDP: "false"}):  # else transformers leaves the weights to accelerate
                model, processor = load_target(target, None, dtype=torch.float32 if kind == "cpu" else "auto")
            _split(model.requires_grad_(False), mesh)
            model.to(processes.device)
        processes.wait_for_everyone()
    _report(model, processes)
    return model, processor


def _split(model: PreTrainedModel, mesh: Any) -> None:
    """Splits the decoder layers over the processes of a mesh, and moves them to its device."""
    decoder = text_decoder(model)
    inside = {weight for layer in decoder.layers for weight in layer.parameters()}
    others = {weight for weight in model.parameters() if weight not in inside}
    try:
        for layer in decoder.layers:
            fully_shard(layer, mesh=mesh, reshard_after_forward=True)
        fully_shard(decoder, mesh=mesh, ignored_params=others)  # the root, which gathers the next layer early
    except (TypeError, ValueError, AssertionError, RuntimeError) as error:
        raise UserError(f"'{model.config.model_type}' cannot be split with FSDP: {error}") from error


def _report(model: nn.Module, processes: Accelerator) -> None:
    sizes = [(_bytes(w.to_local() if isinstance(w, DTensor) else w), _bytes(w)) for w in model.parameters()]
    here, in_all = (sum(column) / 1e9 for column in zip(*sizes, strict=True))
    if processes.is_main_process:
        print(f"msd: the target is split: {here:.3g} of {in_all:.3g} GB of its weights are here", file=sys.stderr)


def _bytes(weight: torch.Tensor) -> int:
    return weight.numel() * weight.element_size()


def _kind(device: str | None) -> str:
    return (device or "cpu").partition(":")[0]


@contextmanager
def own_copy(file: Path, device: str | None) -> Iterator[Path]:
    """Yields `file`, or a temporary copy of it in all but the first process of a split target.

    For a command that does the same work in all processes, as a split target requires, and adds lines to `file`.
    """
    processes = launched(torch.device(_kind(device))) if splits_target() else None
    if processes is None or processes.num_processes == 1:
        yield file
        return
    with tempfile.TemporaryDirectory() as folder:
        own = file if processes.is_main_process else Path(folder) / file.name
        if own != file and file.exists():
            shutil.copyfile(file, own)
        processes.wait_for_everyone()  # before the first process adds to the file
        yield own


def is_split(model: nn.Module) -> bool:
    """Returns whether a part of the model is in other processes, so that all of them must run its passes together."""
    return any(isinstance(weight, DTensor) for weight in model.parameters())
