"""Low-rank updates of frozen linear layers (LoRA, Hu et al. 2021): W + scale · B · A."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SCALE = 2.0


class LowRankLinear(nn.Module):
    """A frozen linear layer plus `scale · B · A`.

    `A` is [rank, in] and `B` [out, rank], in float32; they are cast to the input's dtype. The frozen layer keeps its
    dtype. `B` starts at zero, so the initial update is zero.
    """

    def __init__(self, base: nn.Linear, rank: int, scale: float = SCALE):
        super().__init__()
        self.base, self.scale = base.requires_grad_(False), scale
        device = base.weight.device
        self.A = nn.Parameter(torch.randn(rank, base.in_features, device=device) / math.sqrt(base.in_features))
        self.B = nn.Parameter(torch.zeros(base.out_features, rank, device=device))

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out], in the dtype of `x`."""
        update: Tensor = F.linear(F.linear(x, self.A.to(x.dtype)), (self.scale * self.B).to(x.dtype))
        return self.base(x) + update


def adapt(model: nn.Module, suffixes: Iterable[str], rank: int, scale: float = SCALE) -> list[str]:
    """Replaces every linear layer whose name ends in one of `suffixes` by its low-rank form. Returns the names."""
    wanted = tuple(suffixes)
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n.endswith(wanted)]
    if not names:
        raise ValueError(f"no linear layer of {type(model).__name__} ends in any of {wanted}")
    for name in names:
        parent, _, leaf = name.rpartition(".")
        owner = model.get_submodule(parent)
        setattr(owner, leaf, LowRankLinear(getattr(owner, leaf), rank, scale))
    return names


def load_factors(model: nn.Module, factors: Mapping[str, Tensor], prefix: str = "") -> None:
    """Copies saved factors (`{prefix}{layer}.A` and `.B`) into the first rows of `A` and columns of `B`.

    With a higher rank, the rest keeps its initial values (random in `A`, zero in `B`), so the update equals the saved
    one. Raises ValueError for a factor without a layer, or one of a higher rank than its layer.
    """
    layers = {f"{prefix}{n}": m for n, m in model.named_modules() if isinstance(m, LowRankLinear)}
    with torch.no_grad():
        for name, value in factors.items():
            layer = layers.get(name[:-2])
            if layer is None or name[-2:] not in (".A", ".B"):
                raise ValueError(f"{name}: no low-rank layer of that name")
            factor = layer.A if name.endswith(".A") else layer.B.T
            saved = value if name.endswith(".A") else value.T
            if len(saved) > len(factor):
                raise ValueError(f"{name}: rank {len(saved)} does not fit into rank {len(factor)}")
            factor[: len(saved)] = saved.to(factor)


def factors(model: nn.Module, prefix: str = "") -> dict[str, Tensor]:
    """Returns the detached factors by name: `{prefix}{layer}.A` [rank, in] and `{prefix}{layer}.B` [out, rank]."""
    out: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, LowRankLinear):
            out[f"{prefix}{name}.A"], out[f"{prefix}{name}.B"] = module.A.detach(), module.B.detach()
    return out
