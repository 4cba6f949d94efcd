"""EfficientNet-Lite0 as a vision tower: one token per 32x32 cell of the image.

The network is EfficientNet (Tan & Le, arXiv 1905.11946) in its "lite" form: no squeeze-and-excitation, ReLU6
everywhere, stem and head of fixed width. It is frozen. Batch norms are folded into the convolutions, so training and
evaluation modes compute the same function. Three parts are trained: a LayerNorm, a position vector per cell, and a
linear map of the cell's 4x4 thumbnail. The thumbnail supplies colour, which the encoder, trained on recoloured photos
(AutoAugment), hardly represents.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

LITE0_STAGES = (
    # repeats, kernel, stride of the first repeat, expansion, output channels
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
THUMBNAIL = 4  # pixels per side of a cell's thumbnail


class EfficientNetLiteConfig(PretrainedConfig):
    """Shape of the tower; the defaults are Lite0 at 256x256.

    stages: (repeats, kernel, stride, expansion, channels) per stage. ValueError unless the product of all strides,
    including the stem's 2, equals `patch_size`, and `image_size` is a multiple of it.
    """

    model_type = "msd_efficientnet_lite0"
    base_config_key = "vision_config"

    def __init__(
        self,
        image_size: int = 256,
        patch_size: int = 32,
        num_channels: int = 3,
        stem_size: int = 32,
        hidden_size: int = 1280,
        stages: Sequence[Sequence[int]] = LITE0_STAGES,
        layer_norm_eps: float = 1e-5,
        **kwargs: object,
    ) -> None:
        super().__init__(**kwargs)
        self.image_size = image_size
        self.patch_size = patch_size
        self.num_channels = num_channels
        self.stem_size = stem_size
        self.hidden_size = hidden_size
        self.stages = [list(stage) for stage in stages]
        self.layer_norm_eps = layer_norm_eps
        reduction = 2 * math.prod(stage[2] for stage in self.stages)
        if reduction != patch_size:
            raise ValueError(f"patch_size is {patch_size}, but the strides of the stages reduce by {reduction}")
        if image_size % patch_size:
            raise ValueError(f"image_size {image_size} is not a multiple of patch_size {patch_size}")

    @property
    def num_cells(self) -> int:
        """Number of image tokens: (image_size / patch_size) squared."""
        return int((self.image_size // self.patch_size) ** 2)


class SameConv(nn.Conv2d):
    """Convolution with TensorFlow's "same" padding: with stride 2, one pixel more at the bottom and right."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> None:
        super().__init__(
            inputs, outputs, kernel, stride, padding=(kernel - 1) // 2 if stride == 1 else 0, groups=groups
        )
        total = kernel - stride  # valid if the stride divides the input's size, as it does here
        self.pad = (total // 2, total - total // 2) * 2 if stride > 1 else None

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C', H / stride, W / stride]."""
        return super().forward(F.pad(x, self.pad) if self.pad else x)


class InvertedResidual(nn.Module):
    """1x1 expansion, depthwise convolution, 1x1 projection; adds the input if the shapes agree."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        inner = inputs * expansion
        self.expand = SameConv(inputs, inner) if expansion > 1 else None
        self.depthwise = SameConv(inner, inner, kernel, stride, groups=inner)
        self.project = SameConv(inner, outputs)
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C', H / stride, W / stride]."""
        inner = x if self.expand is None else F.relu6(self.expand(x))
        out = self.project(F.relu6(self.depthwise(inner)))
        return x + out if self.residual else out


class EfficientNetLite(PreTrainedModel):
    """The tower that `LlavaForConditionalGeneration` builds from a config of type `msd_efficientnet_lite0`.

    It requires `vision_feature_layer=-1` and `vision_feature_select_strategy="full"`: there is no class token.
    """

    config_class = EfficientNetLiteConfig
    base_model_prefix = "encoder"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    # the tower has no attention, so it supports every implementation
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config: EfficientNetLiteConfig) -> None:
        super().__init__(config)
        self.stem = SameConv(config.num_channels, config.stem_size, kernel=3, stride=2)
        width, blocks = config.stem_size, []
        for repeats, kernel, stride, expansion, outputs in config.stages:
            for i in range(repeats):
                blocks.append(InvertedResidual(width, outputs, kernel, stride if i == 0 else 1, expansion))
                width = outputs
        self.blocks = nn.ModuleList(blocks)
        self.head = SameConv(width, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.position = nn.Parameter(torch.zeros(config.num_cells, config.hidden_size))
        self.colour = nn.Linear(config.num_channels * THUMBNAIL**2, config.hidden_size, bias=False)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, SameConv):
            nn.init.kaiming_normal_(module.weight, mode="fan_out")
            nn.init.zeros_(module.bias)  # type: ignore[arg-type]
        elif isinstance(module, nn.Linear):
            nn.init.zeros_(module.weight)
        elif isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, EfficientNetLite):
            nn.init.zeros_(module.position)

    @torch.no_grad()
    def features(self, pixel_values: Tensor) -> Tensor:
        """Computes features without gradient, before the trained parts; training precomputes them.

        Args:
            pixel_values: [B, 3, S, S] float, (x - 127) / 128 of 8-bit RGB, S = `config.image_size`.

        Returns:
            [B, (S / 32)^2, 1280], cells row by row, values in [0, 6].

        Raises:
            ValueError: the image is not S x S.
        """
        size = self.config.image_size
        if pixel_values.ndim != 4 or tuple(pixel_values.shape[-2:]) != (size, size):
            raise ValueError(f"expected pixel_values [B, 3, {size}, {size}], got {list(pixel_values.shape)}")
        x = F.relu6(self.stem(pixel_values.to(self.stem.weight.dtype)))
        for block in self.blocks:
            x = block(x)
        return F.relu6(self.head(x)).flatten(2).transpose(1, 2)

    def forward(self, pixel_values: Tensor, **kwargs: object) -> BaseModelOutput:
        """Computes image tokens, the input of the projector, from pixels as in `features`.

        Ignores `kwargs`, which LLaVA passes to towers with attention. Returns `last_hidden_state` [B, cells, 1280] and
        `hidden_states` = (features, last_hidden_state).
        """
        features = self.features(pixel_values)
        shown = thumbnails(pixel_values.to(features.dtype), self.config.image_size // self.config.patch_size)
        tokens = self.norm(features) + self.position + self.colour(shown)
        return BaseModelOutput(last_hidden_state=tokens, hidden_states=(features, tokens))


def thumbnails(pixel_values: Tensor, side: int) -> Tensor:
    """Shrinks each of side x side cells to 4x4 mean colours: [B, 3, S, S] -> [B, side², 48], row by row."""
    small = F.adaptive_avg_pool2d(pixel_values, side * THUMBNAIL)
    cells = small.unflatten(3, (side, THUMBNAIL)).unflatten(2, (side, THUMBNAIL))  # [B, 3, side, 4, side, 4]
    return cells.permute(0, 2, 4, 1, 3, 5).reshape(len(small), side**2, -1)


AutoConfig.register(EfficientNetLiteConfig.model_type, EfficientNetLiteConfig)
AutoModel.register(EfficientNetLiteConfig, EfficientNetLite)
