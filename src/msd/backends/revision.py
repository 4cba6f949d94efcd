"""Revision: modules of a model as they are at one moment, so that a later look tells what has changed since.

Code, settings and parts of modules are compared, and tensors by place, version and content. Content, because
`weight.data.copy_` changes neither place nor version: of a large tensor the sum of every block of 257 eight-byte words,
read at the speed of memory; a small one byte by byte. What hooks do cannot be compared, so they are only looked for.
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

from msd.backends.trial import Dispatcher

BLOCK = 257  # words; an odd number, so that blocks begin at other columns in every row
SMALL = 1 << 14  # bytes up to which a tensor is kept as it is
INERT = ("transformers.utils.output_capturing", "msd.targets.taps")  # whose hooks only look on, when asked to
INSTALLED = "_output_capturing_hooks_installed"  # what the library writes on a model when it installs these hooks
METHODS = ("forward", "get_image_features", "get_video_features")
SCALARS = frozenset((bool, int, float, str, torch.dtype))
OTHERS = frozenset((type(None), OrderedDict, set, Tensor))


class Revision:
    """`modules` now, and `functions` that they call. unhooked: those of them whose hooks do not count."""

    def __init__(
        self, modules: Sequence[nn.Module], functions: Sequence[Any] = (), unhooked: Sequence[nn.Module] = ()
    ) -> None:
        configs = {id(m.config): m.config for m in modules if isinstance(vars(m).get("config"), PreTrainedConfig)}
        self._alive: list[Any] = [*modules, *configs.values()]  # so that no other object takes over an id
        self._tensors: list[Tensor] = []
        kinds = dict.fromkeys(type(m) for m in modules)
        self.structure = [
            [self._facts(m) for m in modules],
            [_settings(vars(c))[0] for c in configs.values()],
            [(kind, [getattr(kind, name, None) for name in METHODS]) for kind in kinds],
            list(functions),
        ]
        self.places = _places(self._tensors)
        self._hooks = [
            hooks for m in modules if m not in unhooked for hooks in (m._forward_pre_hooks, m._forward_hooks)
        ]
        self._content: list[bytes] | None = None

    def read(self) -> list[bytes]:
        """What stands in every tensor; as it was when this was first called."""
        if self._content is None:
            self._content = [_content(t) for t in {id(t): t for t in self._tensors}.values()]
        return self._content

    def moved(self) -> bool:
        """Whether a tensor has another place or version by now."""
        return _places(self._tensors) != self.places

    def hooked(self) -> bool:
        """Whether hooks stand on the modules by now, or on all modules there are, that see passes or change them."""
        everywhere = (torch_module._global_forward_pre_hooks, torch_module._global_forward_hooks)
        found = [hook for hooks in (*everywhere, *self._hooks) if hooks for hook in hooks.values()]
        return any(getattr(hook, "__module__", None) not in INERT for hook in found)

    def same(self, earlier: Revision) -> bool:
        """Whether passes then and now say the same, for certain; never where hooks stand, or nothing was read then."""
        return (
            self.structure == earlier.structure
            and self.places == earlier.places
            and not self.hooked()
            and not earlier.hooked()
            and earlier._content is not None
            and self.read() == earlier._content
        )

    def _facts(self, module: nn.Module) -> list[Any]:
        """Class, settings, and what else hangs on one module by name; not what is inside its parts."""
        own = vars(module)
        settings, code = _settings(own)
        tensors = [nt for held in (own["_parameters"], own["_buffers"]) for nt in held.items() if nt[1] is not None]
        self._alive += [value for _, value in code]
        self._tensors += [tensor for _, tensor in tensors]
        return [
            type(module),
            settings,
            [(n, id(v)) for some in (code, own["_modules"].items(), tensors) for n, v in some],
        ]


def inside(root: nn.Module, without: Sequence[nn.Module] = ()) -> tuple[list[nn.Module], list[nn.Module]]:
    """(`root` and all modules in it, without those in `without`; those among them that hold one of `without`)."""
    found: dict[nn.Module, bool] = {}

    def visit(module: nn.Module) -> bool:
        if module in without:
            return True
        if module not in found:
            found[module] = False
            holding = [visit(part) for part in module._modules.values() if part is not None]
            found[module] = any(holding)
        return found[module]

    visit(root)
    return list(found), [module for module, holds in found.items() if holds]


def _settings(held: dict[str, Any]) -> tuple[list[tuple[str, Any]], list[tuple[str, Any]]]:
    """Of an object's attributes (those that are plain values or lists and tables of them, those that are code)."""
    settings, code = [], []
    for name, value in held.items():
        kind = type(value)
        if kind in SCALARS and name != INSTALLED:
            settings.append((name, value))
        elif kind in OTHERS:
            continue
        elif kind in (list, tuple, dict) and name[0] != "_":
            settings.append((name, repr(value)))
        elif callable(value) and kind is not Dispatcher:
            code.append((name, value))
    return settings, code


def _places(tensors: Sequence[Tensor]) -> list[tuple[int, int]]:
    """Where the tensors lie and how often each was written to."""
    return [(t.data_ptr(), -1 if t.is_inference() else t._version) for t in tensors]


def _content(tensor: Tensor) -> bytes:
    """See the module; dtype and shape belong to it. Of a tensor that is not here, nothing."""
    about = f"{tensor.dtype}{tuple(tensor.shape)}".encode()
    if tensor.device.type == "meta":
        return about
    if hasattr(tensor, "__tensor_flatten__"):  # quantised: numbers and scales
        return about + b"".join(_content(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    raw = tensor.detach().contiguous().view(-1).view(torch.uint8)
    raw = raw.clone() if raw.storage_offset() % 8 else raw
    whole = 0 if raw.numel() <= SMALL else raw.numel() // (8 * BLOCK) * (8 * BLOCK)
    rest = raw[whole:].cpu().numpy().tobytes()
    if raw.device.type != "cpu":
        return about + rest + raw[:whole].view(torch.int64).view(-1, BLOCK).sum(1).cpu().numpy().tobytes()
    words = raw[:whole].numpy().view(np.int64).reshape(-1, BLOCK)  # numpy reads twice as fast as torch with 2 threads
    return about + rest + np.add.reduce(words, axis=1).tobytes()
