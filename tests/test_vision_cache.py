"""VisionCache: encodes each image once, and never returns features of a different image."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import tiny
from msd.model import SpeculativeVLM
from msd.result import Result
from msd.targets.vision import VisionCache

Inputs = dict[str, Tensor]


def counted(model: Any, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list to which each encoder pass appends its number of images."""
    seen: list[int] = []
    encode = model.base_model.get_image_features

    def count(pixel_values: Tensor, **kwargs: Any) -> Any:
        seen.append(len(pixel_values))
        return encode(pixel_values=pixel_values, **kwargs)

    monkeypatch.setattr(model.base_model, "get_image_features", count)
    return seen


def features(model: Any, cache: VisionCache, inputs: Inputs) -> list[Tensor]:
    return list(cache.encode(model, inputs)["mm_encoder_outputs"]["image"].pooler_output)


@pytest.mark.parametrize(
    "make, inputs", [(tiny.llava, tiny.llava_inputs(images=2)), (tiny.llava_next, tiny.llava_next_inputs())]
)
def test_features_are_the_models_own_and_are_computed_once(
    make: Any, inputs: Inputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make()
    pixels = {k: v for k, v in inputs.items() if k in ("pixel_values", "image_sizes")}
    with torch.no_grad():
        expected = model.base_model.get_image_features(**pixels, return_dict=True).pooler_output
    seen = counted(model, monkeypatch)
    cache = VisionCache()
    for _ in range(3):
        for ours, theirs in zip(features(model, cache, inputs), expected, strict=True):
            torch.testing.assert_close(ours, theirs)
    count = len(inputs["pixel_values"])
    assert seen == [count]
    assert (cache.misses, cache.hits) == (count, 2 * count)


def test_only_new_images_are_encoded_and_order_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    model, cache = tiny.llava(), VisionCache()
    seen = counted(model, monkeypatch)
    a, b, c = torch.randn(3, 1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    single = [features(model, cache, {"pixel_values": x})[0] for x in (a, b)]
    mixed = features(model, cache, {"pixel_values": torch.cat([c, b, c, a])})
    assert seen == [1, 1, 1], "c is encoded once although it occurs twice"
    torch.testing.assert_close(mixed[1], single[1])
    torch.testing.assert_close(mixed[3], single[0])
    torch.testing.assert_close(mixed[0], mixed[2])
    assert not torch.allclose(mixed[0], mixed[1])
    assert (cache.misses, cache.hits) == (3, 3)


def test_inputs_without_images_pass_unchanged() -> None:
    inputs = tiny.llava_inputs(images=0)
    assert VisionCache().encode(tiny.llava(), inputs) is inputs


def test_only_pixel_tensors_are_replaced() -> None:
    inputs = tiny.llava_next_inputs()
    out = VisionCache().encode(tiny.llava_next(), inputs)
    assert set(out) == {"input_ids", "attention_mask", "mm_encoder_outputs"}
    assert "pixel_values" in inputs, "the caller's dictionary is unchanged"


def test_the_same_bytes_in_another_shape_are_another_image(monkeypatch: pytest.MonkeyPatch) -> None:
    """CVE-2025-46722: with a key of bytes only, the two would share features."""
    model, cache = tiny.llava_next(), VisionCache()
    seen = counted(model, monkeypatch)
    inputs = tiny.llava_next_inputs()
    wide = features(model, cache, inputs)[0]
    tall = features(model, cache, {**inputs, "image_sizes": torch.tensor([[32, 16]])})[0]
    assert seen == [1, 1]
    assert wide.shape != tall.shape
    tiles = inputs["pixel_values"]
    stacked = VisionCache()
    flat = {"pixel_values": tiles[0, :1].reshape(1, 3, 16, 16)}
    other = {"pixel_values": tiles[0, :1].reshape(1, 3, 8, 32)}
    llava = tiny.llava()
    monkeypatch.setattr(llava.base_model, "get_image_features", lambda pixel_values, **_: _sizes(pixel_values))
    assert [f.tolist() for f in features(llava, stacked, flat) + features(llava, stacked, other)] == [[16, 16], [8, 32]]


def _sizes(pixels: Tensor) -> Any:
    """Replaces an encoder for any size: the features are the image's height and width."""
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    return BaseModelOutputWithPooling(pooler_output=[torch.tensor(p.shape[-2:]) for p in pixels])  # type: ignore


def test_dtype_is_part_of_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    llava, cache = tiny.llava(), VisionCache()
    monkeypatch.setattr(llava.base_model, "get_image_features", lambda pixel_values, **_: _sizes(pixel_values))
    for dtype in (torch.int16, torch.float16, torch.bfloat16):
        features(llava, cache, {"pixel_values": torch.zeros(1, 3, 16, 16, dtype=dtype)})
    assert (cache.misses, cache.hits) == (3, 0)


def test_the_least_recently_used_are_dropped_first(monkeypatch: pytest.MonkeyPatch) -> None:
    model, cache = tiny.llava(), VisionCache(limit=2)
    a, b, c = ({"pixel_values": torch.full((1, 3, 16, 16), float(i))} for i in range(3))
    for image in (a, b, a, c):  # c replaces b
        features(model, cache, image)
    assert (cache.misses, cache.hits) == (3, 1)
    features(model, cache, a)
    assert (cache.misses, cache.hits) == (3, 2)
    features(model, cache, b)
    assert (cache.misses, cache.hits) == (4, 2)


def test_more_images_at_once_than_the_cache_holds() -> None:
    model, cache = tiny.llava(), VisionCache(limit=2)
    pixels = torch.randn(5, 3, 16, 16)
    assert len(features(model, cache, {"pixel_values": pixels})) == 5
    features(model, cache, {"pixel_values": pixels[3:]})
    assert (cache.misses, cache.hits) == (5, 2)


def test_clear() -> None:
    model, cache = tiny.llava(), VisionCache()
    inputs = tiny.llava_inputs()
    features(model, cache, inputs)
    cache.clear()
    features(model, cache, inputs)
    assert (cache.misses, cache.hits) == (1, 0)


def test_engines_of_one_model_share_features_and_answers_stay_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.llava()
    inputs = tiny.llava_inputs(images=2)
    wanted = model.generate(**inputs, max_new_tokens=12)[0, inputs["input_ids"].shape[1] :].tolist()
    seen = counted(model, monkeypatch)
    first = SpeculativeVLM(model, None, drafter="prompt-lookup")
    for vlm in (first, first, first.with_method("ar")):
        result = vlm.generate(**inputs, max_new_tokens=12)
        assert isinstance(result, Result)
        assert result.tokens == wanted
    assert seen == [2]
