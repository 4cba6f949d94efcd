"""`specvlm`: an elastic visual compressor in front of EAGLE-2's layer (SpecVLM, arXiv 2509.11815, section 3).

A gate reads the question and the image and chooses the compression: pruning, pooling, convolution, resampling, or
removal of the image; by Gumbel-softmax in training, by argmax at inference. The remaining tokens are the layer's inputs
at the image's last positions, bypassing `fc`. The layer has an input norm, as the paper's EagleVLM.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from msd.backends.packed import Linear
from msd.drafters.registry import learned
from msd.drafters.toolkit.context import Columns, Images, Selection, pick, select_columns
from msd.drafters.toolkit.layers import Adaptor, Layer
from msd.drafters.toolkit.levels import EagleNetwork
from msd.drafters.toolkit.network import NetworkConfig
from msd.train.losses.published import eagle_loss

BRANCHES = ("prune", "pool", "conv", "resample", "text")


class Compressor(nn.Module):
    """Compresses the embeddings [I, n, H] of I images to `tokens` each, by the branch that the gate chooses."""

    def __init__(self, hidden: int, heads: int, tokens: int) -> None:
        super().__init__()
        self.tokens = tokens
        self.gate = nn.Linear(2 * hidden, len(BRANCHES))
        self.score = nn.Linear(hidden, 1)
        self.near = nn.Conv1d(hidden, hidden, 3, padding=1, groups=hidden)
        self.mix = Linear(hidden, hidden, bias=False)
        self.resampler = Adaptor(hidden, heads, tokens)

    def forward(self, states: Tensor, mask: Tensor, question: Tensor) -> tuple[Tensor, Tensor]:
        """Returns (tokens [I, K, H], the branch of each image [I]); an image with n < K positions uses n tokens.

        mask: [I, n] bool, False at padding. question: [I, H].
        """
        size = mask.sum(1)
        small = self._pooling(mask, size)
        masked = states * mask[..., None]
        mean = masked.sum(1) / size[:, None]
        logits = self.gate(torch.cat([question, mean], -1)).float()
        if self.training:
            choice = F.gumbel_softmax(logits, hard=True)
        else:
            choice = F.one_hot(logits.argmax(-1), len(BRANCHES)).float()
        convolved = self.mix(F.silu(self.near(masked.transpose(1, 2)).transpose(1, 2)))
        branches = torch.stack([
            self._pruned(states, mask), small @ states, small @ convolved.to(states.dtype),
            self.resampler(states, mask), states.new_zeros(len(states), self.tokens, states.shape[-1]),
        ])  # fmt: skip
        tokens = torch.einsum("ib,bikh->ikh", choice.to(states.dtype), branches)
        return tokens.to(states.dtype), choice.argmax(-1)

    def _pooling(self, mask: Tensor, size: Tensor) -> Tensor:
        """Returns the matrix [I, K, n] that averages K runs of adjacent positions of each image."""
        kept = size.clamp_max(self.tokens)[:, None]
        run = torch.arange(mask.shape[1], device=mask.device) * kept // size[:, None]
        inside = (run[:, None] == torch.arange(self.tokens, device=mask.device)[:, None]) & mask[:, None]
        return inside / inside.sum(-1, keepdim=True).clamp_min(1)

    def _pruned(self, states: Tensor, mask: Tensor) -> Tensor:
        """Returns the K positions of highest score, in order; the score learns by the straight-through estimator."""
        score = torch.sigmoid(self.score(states).squeeze(-1)).masked_fill(~mask, -1.0)
        best = score.topk(min(self.tokens, mask.shape[1]), -1).indices.sort(-1).values
        own = pick(score, best)[..., None].to(states.dtype)
        out = pick(states, best) * (1 + own - own.detach())
        return F.pad(out, (0, 0, 0, self.tokens - out.shape[1]))


@learned("specvlm", loss=eagle_loss)
class SpecVLM(EagleNetwork):
    """The loss is EAGLE's, on the live target's logits and last states ("online")."""

    layer = Layer
    options: ClassVar[dict[str, float]] = {"tokens": 4}

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__(config)
        self.compressor = Compressor(config.hidden, config.heads, int(config.options["tokens"]))

    def select_columns(self, c: Columns) -> Selection:
        """Selects the text columns and the compressed tokens of every image."""
        images = Images.of(c.visual, c.embedding)
        if images is None:
            return select_columns(c, c.real)[0]
        text = c.real & ~c.visual
        prompt = (text & (torch.arange(text.shape[1], device=text.device) < c.prompt - 1))[..., None]
        question = (c.embedding * prompt).sum(1) / prompt.sum(1).clamp_min(1)
        tokens, branch = self.compressor(images.states, images.mask, question[images.rows])
        removed = (branch == BRANCHES.index("text")).tolist()
        return images.replaced(c, tokens, [0 if none else self.compressor.tokens for none in removed])[0]
