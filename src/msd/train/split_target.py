"""Loads a target that `accelerate launch` splits over its processes with FSDP, for one that no GPU holds.

The decoder layers are split (`fully_shard` of PyTorch): each process reads its part of them from the checkpoint, and
gathers one layer at a time in a pass. The rest of the target is whole everywhere, because drafters read its embeddings
and its output layer outside of the target's passes, and so is the drafter. Every process runs the same target passes.
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
from accelerate.utils import patch_environment
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from msd.errors import UserError
from msd.loading import load_target
from msd.targets import adapt
from msd.targets.taps import text_decoder
from msd.train.launched import FSDP, launched, splits_target


def load(target: str | Path, device: str | None, batch: int | None = None) -> tuple[PreTrainedModel, Any]:
    """Loads (model, processor) as `load_target` does, split if the launcher asks for FSDP and several processes.

    batch: as for `launched`. Raises UserError as there, and for a target that cannot be split.
    """
    if not splits_target():
        return load_target(target, device)
    kind = _kind(device)
    processes = launched(torch.device(kind), batch)
    if processes.num_processes == 1:
        return load_target(target, device)
    try:
        from transformers.distributed import DistributedConfig

        plan = DistributedConfig(fsdp_size=processes.num_processes)
    except (ImportError, TypeError) as error:
        raise UserError(f"this version of transformers cannot split a target ({error}); install a newer one") from error
    with patch_environment(**{FSDP: "false"}):  # else transformers leaves the weights to accelerate
        model, processor = load_target(target, device, distributed_config=plan)
    if model.device.type != kind:
        raise UserError(f"FSDP put the target on {model.device.type}, not {kind}; give --device {model.device.type}")
    _keep_whole(model.requires_grad_(False))
    if processes.is_main_process:
        here, in_all = (sum(sizes) / 1e9 for sizes in zip(*map(_bytes, model.parameters()), strict=True))
        print(f"msd: the target is split: {here:.3g} of {in_all:.3g} GB of its weights are here", file=sys.stderr)
    return model, processor


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


def _kind(device: str | None) -> str:
    return (device or "cpu").partition(":")[0]


def _bytes(weight: torch.Tensor) -> tuple[int, int]:
    """Returns (bytes of the weight in this process, in all)."""
    here = weight.to_local() if isinstance(weight, DTensor) else weight
    return here.numel() * here.element_size(), weight.numel() * weight.element_size()


def _keep_whole(model: PreTrainedModel) -> None:
    """Gathers what lies outside of the decoder layers for good. UserError if the layers are not split then."""
    layers = {module for layer in text_decoder(model).layers for module in layer.modules()}
    others = [module for module in model.modules() if isinstance(module, FSDPModule) and module not in layers]
    for module in others:
        module.set_reshard_after_forward(False, recurse=False)
        module.set_reshard_after_backward(False, recurse=False)
    placeholders = adapt(model).placeholders
    token = next(i for i in range(len(placeholders) + 1) if i not in placeholders)
    with torch.no_grad():  # PyTorch requires that the whole model runs before a part of it does
        model(input_ids=torch.tensor([[token]], device=model.device))
    for module in others:
        module.unshard()
    model.tie_weights()  # gathering made a copy of an output layer that is the embedding
    inside = {id(weight) for layer in text_decoder(model).layers for weight in layer.parameters()}
    wrong = [n for n, p in model.named_parameters() if isinstance(p, DTensor) != (id(p) in inside)]
    if wrong:
        raise UserError(
            f"'{model.config.model_type}' cannot be split with FSDP: {wrong[0]} would be "
            f"{'whole' if not is_split(model) else 'in the wrong place'}; train with recipes/scale/ddp.yaml"
        )
