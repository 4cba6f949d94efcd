"""Revision: a record of some modules' code, settings and tensors, to detect later that one of them has changed.

Tensors are compared by address, version counter and content, because `weight.data.copy_` changes only the content. The
content of a large tensor is the sum of each block of 257 eight-byte words, computed at memory speed; that of a small
one is its bytes. The effect of hooks cannot be compared; a revision with active hooks equals no other.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from transformers import PreTrainedConfig

from msd.backends.comparison import Dispatcher

BLOCK = 257  # words; an odd number, so that blocks of successive rows begin at different columns
SMALL = 1 << 14  # bytes up to which all of a tensor is kept
INERT = ("transformers.utils.output_capturing", "msd.targets.taps")  # modules whose hooks only record
INSTALLED = "_output_capturing_hooks_installed"  # attribute that transformers sets when it adds these hooks
METHODS = ("forward", "get_image_features", "get_video_features")
SCALARS = frozenset((bool, int, float, str, torch.dtype))
IGNORED = frozenset((type(None), OrderedDict, set, Tensor))


class Revision:
    """The current state of `modules` and of the `functions` they call. unhooked: modules whose hooks are ignored."""

    def __init__(
        self, modules: Sequence[nn.Module], functions: Sequence[Any] = (), unhooked: Sequence[nn.Module] = ()
    ) -> None:
        configs = {id(m.config): m.config for m in modules if isinstance(vars(m).get("config"), PreTrainedConfig)}
        self._references: list[Any] = [*modules, *configs.values()]  # keeps the objects alive, so that ids stay unique
        self._tensors: list[Tensor] = []
        kinds = dict.fromkeys(type(m) for m in modules)
        self.structure = [
            [self._describe(m) for m in modules],
            [_attributes(vars(c))[0] for c in configs.values()],
            [(kind, [getattr(kind, name, None) for name in METHODS]) for kind in kinds],
            list(functions),
        ]
        self._versions = _versions(self._tensors)
        self._hooks = [
            hooks for m in modules if m not in unhooked for hooks in (m._forward_pre_hooks, m._forward_hooks)
        ]
        self._content: dict[int, bytes] = {}  # by id of the tensor

    def read(self, tensors: Sequence[Tensor] | None = None) -> list[bytes]:
        """The content of each of the `tensors`, all by default, at its first call."""
        chosen = self._tensors if tensors is None else tensors
        for tensor in chosen:
            if id(tensor) not in self._content:
                self._content[id(tensor)] = _content(tensor)
        return [self._content[id(tensor)] for tensor in chosen]

    def moved(self) -> bool:
        """Whether the address or version counter of a tensor has changed since."""
        return _versions(self._tensors) != self._versions

    def hooked(self) -> bool:
        """Whether one of the modules, or torch's global registry, now has a hook that may observe or change a pass."""
        everywhere = (torch_module._global_forward_pre_hooks, torch_module._global_forward_hooks)
        found = [hook for hooks in (*everywhere, *self._hooks) if hooks for hook in hooks.values()]
        return any(getattr(hook, "__module__", None) not in INERT for hook in found)

    def same(self, earlier: Revision, tensors: Sequence[Tensor] | None = None) -> bool:
        """Whether nothing but the content of tensors outside `tensors` (all by default) can differ.

        False with hooks, and where `earlier` has not read these tensors.
        """
        chosen = self._tensors if tensors is None else tensors
        return (
            self.structure == earlier.structure
            and self._versions == earlier._versions
            and not self.hooked()
            and not earlier.hooked()
            and all(id(tensor) in earlier._content for tensor in chosen)
            and self.read(chosen) == earlier.read(chosen)
        )

    def _describe(self, module: nn.Module) -> list[Any]:
        """Class, settings, and the name and id of each function, child and tensor of one module."""
        held = vars(module)
        settings, code = _attributes(held)
        tensors = [nt for group in (held["_parameters"], held["_buffers"]) for nt in group.items() if nt[1] is not None]
        self._references += [value for _, value in code]
        self._tensors += [tensor for _, tensor in tensors]
        return [type(module), settings, [(n, id(v)) for n, v in (*code, *held["_modules"].items(), *tensors)]]


def inside(root: nn.Module, without: Sequence[nn.Module] = ()) -> tuple[list[nn.Module], list[nn.Module]]:
    """(`root` and its descendants except the subtrees `without`, those of them that contain such a subtree)."""
    found: dict[nn.Module, bool] = {}

    def visit(module: nn.Module) -> bool:
        if module in without:
            return True
        if module not in found:
            found[module] = False
            excluded = [visit(child) for child in module._modules.values() if child is not None]
            found[module] = any(excluded)
        return found[module]

    visit(root)
    return list(found), [module for module, parent in found.items() if parent]


def whole(tensor: Tensor) -> Tensor:
    """The tensor itself; the gathered values of one that is split over processes, which all call this together."""
    gather = getattr(tensor, "full_tensor", None)  # of DTensor, which is slow to import
    return tensor if gather is None else gather()


def plain_tensors(tensor: Tensor) -> list[Tensor]:
    """The tensor itself, or the plain tensors (numbers, scales) inside a quantised one."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return [tensor]
    return [part for name in tensor.__tensor_flatten__()[0] for part in plain_tensors(getattr(tensor, name))]


def _attributes(held: dict[str, Any]) -> tuple[list[tuple[str, Any]], list[tuple[str, Any]]]:
    """(plain values, lists and dictionaries among an object's attributes; its callables)."""
    settings, code = [], []
    for name, value in held.items():
        kind = type(value)
        if kind in SCALARS and name != INSTALLED:
            settings.append((name, value))
        elif kind in IGNORED:
            continue
        elif kind in (list, tuple, dict) and name[0] != "_":
            settings.append((name, repr(value)))
        elif callable(value) and kind is not Dispatcher:
            code.append((name, value))
    return settings, code


def _versions(tensors: Sequence[Tensor]) -> list[tuple[int, int]]:
    """Address and version counter of each tensor."""
    return [(t.data_ptr(), -1 if t.is_inference() else t._version) for t in tensors]


def _content(tensor: Tensor) -> bytes:
    """Dtype, shape and content; see the module. A meta tensor has no content."""
    header = f"{tensor.dtype}{tuple(tensor.shape)}".encode()
    if tensor.device.type == "meta":
        return header
    if hasattr(tensor, "__tensor_flatten__"):
        return header + b"".join(map(_content, plain_tensors(tensor)))
    raw = tensor.detach().contiguous().view(-1).view(torch.uint8)
    raw = raw.clone() if raw.storage_offset() % 8 else raw
    whole = 0 if raw.numel() <= SMALL else raw.numel() // (8 * BLOCK) * (8 * BLOCK)
    rest = raw[whole:].cpu().numpy().tobytes()
    if raw.device.type != "cpu":
        return header + rest + raw[:whole].view(torch.int64).view(-1, BLOCK).sum(1).cpu().numpy().tobytes()
    words = raw[:whole].numpy().view(np.int64).reshape(-1, BLOCK)  # numpy reads twice as fast as torch with 2 threads
    return header + rest + np.add.reduce(words, axis=1).tobytes()
