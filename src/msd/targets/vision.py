"""VisionCache: an image is encoded once, whatever request or turn it comes in.

The key is the content: bytes, shape and dtype of every tensor that describes the image (pixels, tile sizes), never a
name, and never bytes without their shape (CVE-2025-46722). Least recently used features leave first.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

PIXELS = "pixel_values"
PER_IMAGE = (PIXELS, "image_sizes")  # tensors whose first dimension counts images


class VisionCache:
    """Features of up to `limit` images; `hits` and `misses` count images."""

    def __init__(self, limit: int = 32) -> None:
        self.limit, self.hits, self.misses = limit, 0, 0
        self._features: OrderedDict[str, Tensor] = OrderedDict()

    def clear(self) -> None:
        """Forgets all features and counts."""
        self._features.clear()
        self.hits = self.misses = 0

    def encode(self, model: PreTrainedModel, inputs: dict[str, Any]) -> dict[str, Any]:
        """Processor output with `mm_encoder_outputs` in the place of its per-image tensors.

        pixel_values [I, 3, h, w] or [I, tiles, 3, h, w], image_sizes [I, 2] for I images in reading order; features
        are one [tokens, H] tensor per image, as the model's `get_image_features` returns them.
        """
        if inputs.get(PIXELS) is None:
            return inputs
        images = {k: inputs[k] for k in PER_IMAGE if inputs.get(k) is not None}
        count = len(images[PIXELS])
        keys = [_key({k: v[i] for k, v in images.items()}) for i in range(count)]
        fresh = {key: i for i, key in reversed(list(enumerate(keys))) if key not in self._features}
        self.misses += len(fresh)
        self.hits += count - len(fresh)
        found = {key: self._features[key] for key in keys if key in self._features}
        if fresh:
            order = sorted(fresh.values())
            with torch.no_grad():
                output = model.base_model.get_image_features(
                    **{k: v[order].to(model.device) for k, v in images.items()}, return_dict=True
                )
            found.update({keys[i]: f for i, f in zip(order, output.pooler_output, strict=True)})
        for key in keys:
            self._features[key] = found[key]
            self._features.move_to_end(key)
        while len(self._features) > self.limit:
            self._features.popitem(last=False)
        rest = {k: v for k, v in inputs.items() if k not in PER_IMAGE}
        outputs = {"image": BaseModelOutputWithPooling(pooler_output=[found[key] for key in keys])}
        return {**rest, "mm_encoder_outputs": outputs}


def _key(tensors: dict[str, Tensor]) -> str:
    """Content hash of named tensors: name, dtype, shape and bytes of each."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        array = tensor.detach().contiguous().cpu()
        digest.update(f"{name}|{array.dtype}|{tuple(array.shape)}|".encode())
        digest.update(array.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
