"""VisionCache: a picture is encoded once, whatever request or turn it comes in.

The key is the content: bytes, shape and dtype of every tensor that describes the picture (pixels, tile sizes), and the
settings that a request gives the encoder; never a name, and never bytes without their shape (CVE-2025-46722). Least
recently used features leave first. All leave when the modules that make them have changed, or another model's come in;
where these have hooks nothing is remembered, since hooks are to see every picture.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from torch import Tensor, uint8
from transformers import PreTrainedModel

from msd.backends.revision import Revision, inside
from msd.targets.pictures import Features, Pictures


class VisionCache:
    """Features of up to `limit` pieces (see `msd.targets.pictures`); `hits` and `misses` count pieces.

    For several threads.
    """

    def __init__(self, limit: int = 32) -> None:
        self.limit, self.hits, self.misses = limit, 0, 0
        self._features: OrderedDict[str, Features] = OrderedDict()
        self._made_by: Revision | None = None
        self._lock = threading.RLock()

    def clear(self) -> None:
        """Forgets all features and counts."""
        with self._lock:
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
                features = self._features_of(model, kind, pieces, kind.settings(model, inputs))
                outputs[kind.modality] = kind.joined(features)
        return {**rest, "mm_encoder_outputs": outputs} if outputs else rest

    def _features_of(
        self, model: PreTrainedModel, kind: Pictures, pieces: list[dict[str, Tensor]], settings: dict[str, Any]
    ) -> list[Features]:
        maker = _maker(model)
        if maker.hooked():
            return kind.encode(model, pieces, settings)
        with self._lock:
            if self._made_by is None or not maker.same(self._made_by):
                self._features.clear()
                self._made_by = maker
                maker.read()
            return self._remembered(model, kind, pieces, settings)

    def _remembered(
        self, model: PreTrainedModel, kind: Pictures, pieces: list[dict[str, Tensor]], settings: dict[str, Any]
    ) -> list[Features]:
        way = f"{kind.modality}{settings or ''}"
        keys = [_key(way, kind.identity(piece)) for piece in pieces]
        fresh = {key: i for i, key in reversed(list(enumerate(keys))) if key not in self._features}
        self.misses += len(fresh)
        self.hits += len(pieces) - len(fresh)
        found = {key: self._features[key] for key in keys if key in self._features}
        if fresh:
            order = sorted(fresh.values())
            encoded = kind.encode(model, [pieces[i] for i in order], settings)
            found.update({keys[i]: f for i, f in zip(order, encoded, strict=True)})
        for key in keys:
            self._features[key] = found[key]
            self._features.move_to_end(key)
        while len(self._features) > self.limit:
            self._features.popitem(last=False)
        return [found[key] for key in keys]


def _maker(model: PreTrainedModel) -> Revision:
    """All of a model that features may come from: what does not belong to its language model."""
    text = [part for part in (model.get_decoder(), model.get_output_embeddings()) if part is not None]
    modules, around = inside(model, text)
    return Revision(modules, unhooked=around)


def _key(way: str, tensors: dict[str, Tensor]) -> str:
    """Content hash of named tensors: name, dtype, shape and bytes of each. way: how they are encoded."""
    digest = hashlib.sha256(way.encode())
    for name, tensor in sorted(tensors.items()):
        array = tensor.detach().contiguous().cpu()
        digest.update(f"{name}|{array.dtype}|{tuple(array.shape)}|".encode())
        digest.update(array.reshape(-1).view(uint8).numpy().data)
    return digest.hexdigest()
