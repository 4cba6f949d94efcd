"""Run by `accelerate launch` in each process of `test_split_target`: writes what it holds of targets, as JSON.

Arguments: the folders of the targets. Process r writes `r.json` into each.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

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


def figures(place: Path) -> dict[str, Any]:
    """What this process holds of a target, before and in a pass, and how the pass differs from that of a whole one."""
    plain, _ = load_target(place)
    model, _ = split_target.load(place, None, 2)
    layers, peaks = text_decoder(model).layers, list[int]()
    for layer in layers:  # inside of a layer, which is whole during its own pass
        layer.mlp.register_forward_hook(lambda *_: peaks.append(held(list(layers.parameters()))))
    ids = torch.arange(4, 40)[None]
    with torch.no_grad():
        expected, found = plain(input_ids=ids).logits, model(input_ids=ids).logits
    whole = held(list(text_decoder(plain).layers.parameters()))
    return {
        "difference": (expected - found).abs().max().item(), "prints": [fingerprint(plain), fingerprint(model)],
        "layers": whole, "layer": whole // len(layers), "peaks": peaks, "here": held(list(layers.parameters())),
        "all": [held(list(m.parameters())) for m in (plain, model)],
    }  # fmt: skip


def main() -> None:
    with launched.ending_together():
        for place in map(Path, sys.argv[1:]):
            found = figures(place)
            (place / f"{processes.place()[0]}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
