"""A tiny engine as the page sees it: a router, subtrees, and images of 16 tokens, whose gain has a map."""

from __future__ import annotations

import torch
from transformers import CLIPImageProcessorPil, CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration

import tiny
import tiny_checkpoint
from msd.config import SpeculativeConfig
from msd.drafters.algorithms.msd import MSD, MSDConfig, MSDNetwork
from msd.drafters.algorithms.prompt_lookup import Repeats
from msd.model import SpeculativeVLM

SIDE = 32  # pixels


def routed() -> SpeculativeVLM:
    """A random MSD network with a router on a tiny LLaVA with a token per byte."""
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=SIDE, patch_size=8,
        projection_dim=16,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=vision, text_config=tiny._text(len(tiny_checkpoint.SPECIAL) + 256), image_token_id=tiny.IMAGE,
        image_seq_length=16, vision_feature_layer=-2, vision_feature_select_strategy="default",
    )  # fmt: skip
    model = tiny._finish(LlavaForConditionalGeneration(config), 10.0)
    processor = tiny_checkpoint.processor()
    processor.image_processor = CLIPImageProcessorPil(
        size={"height": SIDE, "width": SIDE}, do_center_crop=False, crop_size={"height": SIDE, "width": SIDE}
    )
    network = MSDNetwork(MSDConfig.for_target(model.config.get_text_config(), 200, rank=4, parent_rank=8))
    settings = SpeculativeConfig(adaptive=False, label=True)
    drafter = Repeats(MSD(network.attach(model).eval()), 2)  # a random network drafts little that is accepted
    return SpeculativeVLM(model, processor, settings, drafter)
