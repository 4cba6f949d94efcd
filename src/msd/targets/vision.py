"""VisionCache: a picture is encoded once, whatever request or turn it comes in.

The key is the content: bytes, shape and dtype of every tensor that describes the picture (pixels, tile sizes), never a
name, and never bytes without their shape (CVE-2025-46722). Least recently used features leave first.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from torch import Tensor, uint8
from transformers import PreTrainedModel

from msd.targets.pictures import Features, Pictures


class VisionCache:
    """Features of up to `limit` pieces (see `msd.targets.pictures`); `hits` and `misses` count pieces."""

    def __init__(self, limit: int = 32) -> None:
        self.limit, self.hits, self.misses = limit, 0, 0
        self._features: OrderedDict[str, Features] = OrderedDict()

    def clear(self) -> None:
        """Forgets all features and counts."""
        self._features.clear()
        self.hits = self.misses = 0

    def encode(
        self, model: PreTrainedModel, inputs: dict[str, Any], kinds: Sequence[Pictures] = (Pictures(),)
    ) -> dict[str, Any]:
        """Processor output with `mm_encoder_outputs` in the place of its pixel tensors; unchanged without pictures.

        kinds: how the model's family lays out its images, and its videos.
        """
        rest, outputs = inputs, {}
        for kind in kinds:
            if inputs.get(kind.pixels) is None:
                continue
            pieces = kind.pieces(inputs)
            rest = {k: v for k, v in rest.items() if k not in kind.spent}
            if pieces:
                outputs[kind.modality] = kind.joined(self._features_of(model, kind, pieces))
        return {**rest, "mm_encoder_outputs": outputs} if outputs else rest

    def _features_of(self, model: PreTrainedModel, kind: Pictures, pieces: list[dict[str, Tensor]]) -> list[Features]:
        keys = [_key(kind.modality, kind.identity(piece)) for piece in pieces]
        fresh = {key: i for i, key in reversed(list(enumerate(keys))) if key not in self._features}
        self.misses += len(fresh)
        self.hits += len(pieces) - len(fresh)
        found = {key: self._features[key] for key in keys if key in self._features}
        if fresh:
            order = sorted(fresh.values())
            encoded = kind.encode(model, [pieces[i] for i in order])
            found.update({keys[i]: f for i, f in zip(order, encoded, strict=True)})
        for key in keys:
            self._features[key] = found[key]
            self._features.move_to_end(key)
        while len(self._features) > self.limit:
            self._features.popitem(last=False)
        return [found[key] for key in keys]


def _key(modality: str, tensors: dict[str, Tensor]) -> str:
    """Content hash of named tensors: name, dtype, shape and bytes of each."""
    digest = hashlib.sha256(modality.encode())
    for name, tensor in sorted(tensors.items()):
        array = tensor.detach().contiguous().cpu()
        digest.update(f"{name}|{array.dtype}|{tuple(array.shape)}|".encode())
        digest.update(array.reshape(-1).view(uint8).numpy().data)
    return digest.hexdigest()
