"""Llama 4: layers without rotary positions scale their queries by the column of the query.

The model derives the column from the cache slot (`floor_scale`, 8192 columns by default); in a tree the two differ. A
hook corrects the queries where the scale differs, which is only where a tree is at a multiple of `floor_scale`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

from msd.core.tree import DraftTree
from msd.targets.base import Target
from msd.targets.state import State
from msd.targets.taps import text_decoder

_current: ContextVar[Tensor | None] = ContextVar("msd_llama4_scale", default=None)


class Llama4(Target):
    """Chunked attention and scaled queries."""

    @contextmanager
    def scoring(self, state: State, tree: DraftTree) -> Iterator[None]:
        """See `Target`."""
        base = torch.tensor(state.cache.base, device=tree.depths.device)[:, None]
        assumed = int(base.max()) + torch.arange(tree.size, device=base.device)
        ratio = (self._scale(base + tree.depths) / self._scale(assumed))[:, :, None]  # [R, N, 1]
        if not self.text_config.attn_temperature_tuning or bool((ratio == 1).all()):
            yield
            return
        token = _current.set(ratio)
        try:
            with ExitStack() as hooks:
                for layer in text_decoder(self.model).layers:
                    if not layer.self_attn.use_rope:
                        hooks.callback(layer.self_attn.q_proj.register_forward_hook(_corrected).remove)
                yield
        finally:
            _current.reset(token)

    def _scale(self, column: Tensor) -> Tensor:
        """The factor of queries in `column`, as in `Llama4TextAttention`."""
        steps = torch.floor((column.float() + 1.0) / self.text_config.floor_scale)
        return torch.log1p(steps) * self.text_config.attn_scale + 1.0


def _corrected(_module: torch.nn.Module, _arguments: tuple[Tensor, ...], queries: Tensor) -> Tensor:
    """Queries [R, N, D] of this context's pass, corrected; those of another thread unchanged."""
    ratio = _current.get()
    return queries if ratio is None else (queries * ratio).to(queries.dtype)
