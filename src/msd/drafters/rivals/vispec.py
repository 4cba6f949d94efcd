"""`vispec`: an image as one compressed token and a global vector (ViSpec, arXiv 2509.15235, section 3).

Two learned queries attend to an image's embeddings. What the first gives stands at the image's last position, past
`fc`; what the second gives, g, tells every later text position of the image: its feature is img_fc([h; g]) [2H -> H],
which begins as h. Text keeps its positions.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from msd.backends.packed import Linear
from msd.drafters.msd.context import pick
from msd.drafters.rivals.config import RivalConfig
from msd.drafters.rivals.eagle2 import Eagle2
from msd.drafters.rivals.entries import Columns, Entries, keep
from msd.drafters.rivals.images import Images
from msd.drafters.rivals.network import Parts, whole
from msd.drafters.rivals.teaching import Truth, distance, eagle_terms, ranking
from msd.modality import LANGUAGE
from msd.targets.teacher import Lesson


class Adaptor(nn.Module):
    """Learned queries over an image: [I, n, H] -> [I, queries, H]."""

    def __init__(self, hidden: int, heads: int, queries: int) -> None:
        super().__init__()
        self.heads = heads
        self.q = nn.Parameter(torch.randn(queries, heads, hidden // heads) * (hidden // heads) ** -0.5)
        self.k_proj, self.v_proj = Linear(hidden, hidden, bias=False), Linear(hidden, hidden, bias=False)
        self.o_proj = Linear(hidden, hidden, bias=False)

    def forward(self, states: Tensor, mask: Tensor) -> Tensor:
        """mask: [I, n] bool, False is padding."""
        k, v = (p(states).unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in (self.k_proj, self.v_proj))
        q = self.q.transpose(0, 1).expand(len(states), -1, -1, -1)
        seen = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None])
        out: Tensor = self.o_proj(seen.transpose(1, 2).flatten(-2))
        return out.to(states.dtype)


class ViSpec(Eagle2):
    """With several images, text knows of the one before it; images side by side are one."""

    method = "vispec"
    width, depth = 8, 3
    stages = (0.3, 0.0, 1.0, 0.0)
    options: ClassVar[dict[str, float]] = {"noise": 0.1}

    def __init__(self, config: RivalConfig) -> None:
        super().__init__(config)
        H = config.hidden
        self.adaptor = Adaptor(H, config.heads, 2)
        self.img_fc = Linear(2 * H, H, bias=True)
        with torch.no_grad():
            self.img_fc.weight.copy_(torch.eye(H, 2 * H))
            self.img_fc.bias.zero_()

    def kept(self, c: Columns) -> Entries:
        """Text, and the last column of every image."""
        images = Images.of(c)
        stay, given, seen = c.real & ~c.visual, torch.zeros_like(c.word), torch.zeros_like(c.word)
        if images.places:
            adapted = self.adaptor(images.states, images.mask)
            rows, at, which = images.last(c, [1] * len(images.places))
            stay, given = (
                stay.index_put((rows, at), stay.new_ones(())),
                given.index_put((rows, at), adapted[which[:, 0], 0]),
            )
            before = torch.zeros_like(stay, dtype=torch.long)  # images before a column, counted over the whole batch
            for i, (row, _, end) in enumerate(images.places):
                before[row, end:] = i + 1
            seen = torch.cat([torch.zeros_like(adapted[:1, 1]), adapted[:, 1]])[before]
        found, order = keep(c, stay)
        found.fixed, found.given, found.image = c.visual.gather(1, order), pick(given, order), pick(seen, order)
        return found

    def entry(self, feature: Tensor, word: Tensor, image: Tensor, level: int) -> Tensor:
        """fc([emb; img_fc([h; g])])."""
        told = self.img_fc(torch.cat([feature, image.expand_as(feature)], -1))
        return super().entry(told, word, image, level)

    def loss(self, lesson: Lesson, first: Tensor) -> tuple[Tensor, Parts]:
        """Stage 1, text: EAGLE's loss + 0.01 × ranking. Stage 2: 10 × ‖p − q‖₁ + 0.1 × ranking, on the plain pass and
        on one whose features are those that the plain pass drafted.
        """
        assert lesson.taps is not None
        truth = Truth.of(lesson, first, 1, self.config.hidden)
        found = self.entries(lesson.layout, lesson.taps[:, :-1], lesson.prompt)
        at = found.slot.gather(1, first + lesson.prompt - 1)
        plain = self.everywhere(found, self.noisy(self.feature(found.taps)))
        if bool((lesson.layout.modality == LANGUAGE.id).all()):
            states = pick(plain, at)[:, :, None]
            logits = self.head(states)
            loss, parts = eagle_terms(states, logits, truth)
            return loss + 0.01 * truth.mean(ranking(logits, truth.p)), parts
        drafted = torch.cat([self.feature(found.taps[:, :1]), plain[:, :-1]], 1)
        logits = self.head(torch.stack([pick(s, at) for s in (plain, self.everywhere(found, drafted))])[..., None, :])
        apart = torch.stack([truth.mean(distance(z, truth.p)) for z in logits]).mean()
        order = torch.stack([truth.mean(ranking(z, truth.p)) for z in logits]).mean()
        return 10 * apart + 0.1 * order, {"distance": apart, "ranking": order}

    def everywhere(self, found: Entries, feature: Tensor) -> Tensor:
        """The states [B, S, H] of all entries with the features [B, S, H]."""
        x = self.enter(found, feature)
        context, visible = whole(self, found, x)
        return self.step(x[:, :, None], found.positions[..., None], context, visible)[0][:, :, 0]
