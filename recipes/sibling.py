"""Writes a smaller sibling of a target: the same model with fewer decoder layers, as a folder for `--draft-model`.

    python -m recipes.sibling DIR [--target reference] [--layers 10] [--first]

The layers that are kept are evenly spaced, with the first and the last; with `--first`, they are the first ones.
Nothing is trained, so the same target gives the same sibling, and a weak drafter, unlike a published smaller model.
`msd bench --draft-model DIR --method text-only,draft-model` compares it with a trained one.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from msd.errors import UserError
from msd.loading import load_target


def kept(layers: int, count: int, first: bool) -> list[int]:
    """Indices of the layers to keep."""
    if not 1 <= count <= layers:
        raise UserError(f"--layers {count}: the target has {layers} layers; give 1 to {layers}")
    return list(range(count)) if first else torch.linspace(0, layers - 1, count).round().long().tolist()


def shorten(model: PreTrainedModel, indices: list[int]) -> PreTrainedModel:
    """Keeps the decoder layers `indices` of a model, in place."""
    decoder = model.get_decoder()
    decoder.layers = nn.ModuleList(decoder.layers[i] for i in indices)
    for number, layer in enumerate(decoder.layers):
        layer.self_attn.layer_idx = number
    for config in (model.config.get_text_config(decoder=True), decoder.config):
        config.num_hidden_layers = len(indices)
    types = getattr(decoder.config, "layer_types", None)
    if types:
        decoder.config.layer_types = [types[i] for i in indices]
    return model


def main() -> None:
    """Writes the folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--target", default="reference")
    parser.add_argument("--layers", type=int, default=10)
    parser.add_argument("--first", action="store_true")
    given = parser.parse_args()
    model, processor = load_target(given.target)
    indices = kept(len(model.get_decoder().layers), given.layers, given.first)
    shorten(model, indices).save_pretrained(given.folder)
    processor.save_pretrained(given.folder)
    print(f"{given.folder}: layers {', '.join(map(str, indices))} of '{given.target}'")


if __name__ == "__main__":
    main()
