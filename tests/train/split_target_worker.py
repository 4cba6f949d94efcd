"""Run by `accelerate launch` in each process of `test_split_target`: prints what it holds of a target, as JSON.

Arguments: the folder of the target, and that of the answers.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor

from msd.drafters.toolkit import processes
from msd.loading import load_target
from msd.targets.registry import fingerprint
from msd.targets.taps import text_decoder
from msd.train import launched, split_target


def held(weights: list[torch.Tensor]) -> int:
    """Bytes of the weights in this process now."""
    storages = [(w.to_local() if isinstance(w, DTensor) else w).untyped_storage() for w in weights]
    return sum({s.data_ptr(): s.nbytes() for s in storages}.values())


def main() -> None:
    place, out = map(Path, sys.argv[1:])
    with launched.ending_together():
        plain, _ = load_target(place)
        model, _ = split_target.load(place, None, 2)
        layers, peaks = text_decoder(model).layers, list[int]()
        for layer in layers:  # inside of a layer, which is whole during its own pass
            layer.mlp.register_forward_hook(lambda *_: peaks.append(held(list(layers.parameters()))))
        ids = torch.arange(4, 40)[None]
        with torch.no_grad():
            expected, found = plain(input_ids=ids).logits, model(input_ids=ids).logits
        whole = list(text_decoder(plain).layers.parameters())
        rank = processes.place()[0]
        figures = {
            "difference": (expected - found).abs().max().item(),
            "fingerprints": [fingerprint(plain), fingerprint(model)],
            "layers": held(whole), "layer": held(whole) // len(layers), "peaks": peaks,
            "here": held(list(layers.parameters())), "rest": [held(list(m.parameters())) for m in (plain, model)],
        }  # fmt: skip
        (out / f"{rank}.json").write_text(json.dumps(figures))


if __name__ == "__main__":
    main()
