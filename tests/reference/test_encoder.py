"""The folded encoder equals a second implementation of the published architecture, with batch norms."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from recipes.reference_vlm.base import load_encoder
from recipes.reference_vlm.fold import compact, fold_batch_norms
from torch import Tensor
from transformers import AutoModel

from msd.reference.encoder import LITE0_STAGES, EfficientNetLite, EfficientNetLiteConfig

EPS = 1e-3


def published_state() -> dict[str, Tensor]:
    """Returns random weights with the names of the published Lite0 checkpoint."""
    generator = torch.Generator().manual_seed(0)
    state: dict[str, Tensor] = {"_fc.weight": torch.zeros(10, 1280), "_fc.bias": torch.zeros(10)}

    def add(conv: str, norm: str, outputs: int, inputs: int, kernel: int) -> None:
        fan = inputs * kernel * kernel
        state[f"{conv}.weight"] = torch.randn(outputs, inputs, kernel, kernel, generator=generator) * (2 / fan) ** 0.5
        state[f"{norm}.weight"] = 0.5 + torch.rand(outputs, generator=generator)
        state[f"{norm}.bias"] = 0.3 * torch.randn(outputs, generator=generator)
        state[f"{norm}.running_mean"] = 0.3 * torch.randn(outputs, generator=generator)
        state[f"{norm}.running_var"] = 0.5 + torch.rand(outputs, generator=generator)
        state[f"{norm}.num_batches_tracked"] = torch.tensor(1)

    add("_conv_stem", "_bn0", 32, 3, 3)
    width, index = 32, 0
    for repeats, kernel, _, expansion, outputs in LITE0_STAGES:
        for _ in range(repeats):
            block, inner = f"_blocks.{index}.", width * expansion
            if expansion > 1:
                add(f"{block}_expand_conv", f"{block}_bn0", inner, width, 1)
            add(f"{block}_depthwise_conv", f"{block}_bn1", inner, 1, kernel)
            add(f"{block}_project_conv", f"{block}_bn2", outputs, inner, 1)
            width, index = outputs, index + 1
    add("_conv_head", "_bn1", 1280, width, 1)
    return state


def unfolded_features(state: dict[str, Tensor], x: Tensor) -> Tensor:
    """Applies the published layers one by one: [B, 3, S, S] -> [B, 1280, S / 32, S / 32]."""

    def layer(x: Tensor, conv: str, norm: str, stride: int = 1, depthwise: bool = False, act: bool = True) -> Tensor:
        weight = state[f"{conv}.weight"]
        kernel, size = weight.shape[-1], x.shape[-1]
        pad = max((-(-size // stride) - 1) * stride + kernel - size, 0)  # TensorFlow's "same"
        x = F.pad(x, (pad // 2, pad - pad // 2) * 2)
        x = F.conv2d(x, weight, stride=stride, groups=x.shape[1] if depthwise else 1)
        statistics = (state[f"{norm}.{key}"] for key in ("running_mean", "running_var", "weight", "bias"))
        x = F.batch_norm(x, *statistics, eps=EPS)
        return x.clamp(0, 6) if act else x

    x, index = layer(x, "_conv_stem", "_bn0", stride=2), 0
    for repeats, _, stride, expansion, _ in LITE0_STAGES:
        for i in range(repeats):
            block, before = f"_blocks.{index}.", x
            if expansion > 1:
                x = layer(x, f"{block}_expand_conv", f"{block}_bn0")
            x = layer(x, f"{block}_depthwise_conv", f"{block}_bn1", stride if i == 0 else 1, depthwise=True)
            x = layer(x, f"{block}_project_conv", f"{block}_bn2", act=False)
            x, index = (x + before if x.shape == before.shape else x), index + 1
    return layer(x, "_conv_head", "_bn1")


def folded(state: dict[str, Tensor], size: int) -> EfficientNetLite:
    model = EfficientNetLite(EfficientNetLiteConfig(image_size=size))
    missing, left_over = model.load_state_dict(fold_batch_norms(state), strict=False)
    assert set(missing) == {
        "norm.weight", "norm.bias", "position", "colour.weight",
    }  # fmt: skip
    assert not left_over
    return model


def test_folding_preserves_the_outputs() -> None:
    torch.manual_seed(0)
    state, pixels = published_state(), torch.rand(2, 3, 96, 96) * 2 - 1
    ours, theirs = folded(state, 96).features(pixels), unfolded_features(state, pixels).flatten(2).transpose(1, 2)
    assert theirs.std() > 0.1
    assert (ours - theirs).norm() / theirs.norm() < 1e-4


def test_the_bundled_file_is_small_and_close_to_float32() -> None:
    state, pixels = published_state(), torch.rand(2, 3, 64, 64) * 2 - 1
    exact, model = folded(state, 64).features(pixels), folded(state, 64)
    small = compact(fold_batch_norms(state))
    assert sum(weight.numel() * weight.element_size() for weight in small.values()) < 7_200_000
    model.load_state_dict(small, strict=False)
    assert (model.features(pixels) - exact).norm() / exact.norm() < 0.01


def test_cells_come_row_by_row() -> None:
    pixels = torch.zeros(1, 3, 256, 256)
    pixels[..., 192:, :] = 1  # a stripe along the bottom: the last two of eight rows of cells
    encoder = load_encoder()
    change = (encoder.features(pixels) - encoder.features(torch.zeros_like(pixels))).norm(dim=-1)  # [1, 64]
    assert change[0, 48:].mean() > 3 * change[0, :32].mean()


def test_llava_finds_the_tokens_last_and_the_features_before() -> None:
    encoder = load_encoder()
    with torch.no_grad():
        encoder.position.normal_()
    pixels = torch.rand(2, 3, 256, 256) * 2 - 1
    output = encoder(pixels, output_hidden_states=-1)
    features = encoder.features(pixels)
    assert output.last_hidden_state.shape == (2, 64, 1280)
    torch.testing.assert_close(output.hidden_states[-1], F.layer_norm(features, (1280,)) + encoder.position)
    torch.testing.assert_close(output.hidden_states[-2], features)


def test_only_norm_positions_and_colours_are_trainable() -> None:
    model = EfficientNetLite(EfficientNetLiteConfig(image_size=32)).train()
    model(torch.rand(1, 3, 32, 32)).last_hidden_state.square().sum().backward()
    assert {n for n, p in model.named_parameters() if p.grad is not None} == {
        "norm.weight", "norm.bias", "position", "colour.weight",
    }  # fmt: skip


def test_it_is_saved_and_loaded_by_the_auto_classes(tmp_path: Path) -> None:
    model = EfficientNetLite(EfficientNetLiteConfig(image_size=32))
    model.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path)
    assert isinstance(again, EfficientNetLite)
    pixels = torch.rand(1, 3, 32, 32)
    torch.testing.assert_close(again(pixels).last_hidden_state, model(pixels).last_hidden_state)


@pytest.mark.parametrize("shape", [(1, 3, 224, 224), (3, 256, 256), (1, 3, 256, 128)])
def test_other_sizes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="256, 256"):
        load_encoder().features(torch.zeros(shape))


def test_impossible_configurations_are_refused() -> None:
    with pytest.raises(ValueError, match="patch_size is 16"):
        EfficientNetLiteConfig(patch_size=16)
    with pytest.raises(ValueError, match="250"):
        EfficientNetLiteConfig(image_size=250)
