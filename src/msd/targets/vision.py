"""VisionCache: encodes each image or video once, in whatever request or turn it appears.

The key is a hash of the content: bytes, shape and dtype of each tensor that describes the item (pixels, tile sizes),
and the request's encoder options; never a name, and never bytes without their shape (CVE-2025-46722). The least
recently used features are dropped first. All are dropped when the encoder's modules change or another model is used.
An encoder with hooks is not cached, because its hooks must run for each image.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from torch import uint8
from transformers import PreTrainedModel

from msd.backends.revision import Revision, inside
from msd.targets.pictures import Features, Pictures, VisionItem


class VisionCache:
    """Features of up to `limit` items (see `msd.targets.pictures`). `hits` and `misses` count items. Thread-safe."""

    def __init__(self, limit: int = 32) -> None:
        self.limit, self.hits, self.misses = limit, 0, 0
        self._features: OrderedDict[str, Features] = OrderedDict()
        self._revision: Revision | None = None  # of the encoder that computed them
        self._lock = threading.RLock()

    def clear(self) -> None:
        """Drops all features and resets the counts."""
        with self._lock:
            self._features.clear()
            self.hits = self.misses = 0

    def encode(
        self,
        model: PreTrainedModel,
        inputs: dict[str, Any],
        kinds: Sequence[Pictures] = (Pictures(),),
        frozen: bool = False,
    ) -> dict[str, Any]:
        """Returns the processor output `inputs` with the encoder's outputs (`mm_encoder_outputs`) in place of pixels.

        Encodes only what the cache lacks. Inputs without pixel tensors are returned unchanged. kinds: which tensors of
        the inputs describe the images and videos of this model family. frozen: the caller says that the encoder's
        weights do not change, so their content is not compared.
        """
        rest, outputs = inputs, {}
        for kind in kinds:
            if inputs.get(kind.pixels) is None:
                continue
            items = kind.split(inputs)
            rest = {k: v for k, v in rest.items() if k not in kind.consumed}
            if items:
                features = self._encode(model, kind, items, kind.options(model, inputs), frozen)
                outputs[kind.modality] = kind.join_features(features)
        return {**rest, "mm_encoder_outputs": outputs} if outputs else rest

    def _encode(
        self, model: PreTrainedModel, kind: Pictures, items: list[VisionItem], options: dict[str, Any], frozen: bool
    ) -> list[Features]:
        """Features of the items, from the cache where the encoder is unchanged."""
        revision = _encoder_revision(model, kind)
        if revision.hooked():
            return kind.encode(model, items, options)
        keys = [_key(f"{kind.modality}{options or ''}", kind.unpadded(item)) for item in items]
        with self._lock:
            if self._revision is None or not revision.same(self._revision, () if frozen else None):
                self._features.clear()
                self._revision = revision
                if not frozen:
                    revision.read()
            missing = {key: i for i, key in reversed(list(enumerate(keys))) if key not in self._features}
            self.misses += len(missing)
            self.hits += len(items) - len(missing)
            found = {key: self._features[key] for key in keys if key in self._features}
            if missing:
                order = sorted(missing.values())
                encoded = kind.encode(model, [items[i] for i in order], options)
                found.update({keys[i]: f for i, f in zip(order, encoded, strict=True)})
            for key in keys:
                self._features[key] = found[key]
                self._features.move_to_end(key)
            while len(self._features) > self.limit:
                self._features.popitem(last=False)
        return [found[key] for key in keys]


def _encoder_revision(model: PreTrainedModel, kind: Pictures) -> Revision:
    """The revision of the modules that vision features may depend on: all outside the language model.

    The text embeddings too where the encoder reads them.
    """
    text = [part for part in (model.get_decoder(), model.get_output_embeddings()) if part is not None]
    modules, parents = inside(model, text)
    return Revision([*modules, *([model.get_input_embeddings()] if kind.reads_embeddings else [])], unhooked=parents)


def _key(encoding: str, tensors: VisionItem) -> str:
    """Hash of `encoding` (modality and encoder options) and of name, dtype, shape and bytes of each tensor."""
    digest = hashlib.sha256(encoding.encode())
    for name, tensor in sorted(tensors.items()):
        array = tensor.detach().contiguous().cpu()
        digest.update(f"{name}|{array.dtype}|{tuple(array.shape)}|".encode())
        digest.update(array.reshape(-1).view(uint8).numpy().data)
    return digest.hexdigest()
