"""Measures how much of a cross-model drafter's prefill overlaps with the target's prefill.

python -m recipes.events.overlap                # the reference model with 8 frames, and a random EventGPT
python -m recipes.events.overlap --layers 24    # with more layers

Prints milliseconds to the first token if the drafter reads recording and prompt in a thread during the target's
encoding and prefill, and if it reads them afterwards. The two alternate; figures are medians. The drafter's weights are
random; the times do not depend on them.
"""

from __future__ import annotations

import argparse
import json
import time
from statistics import median
from typing import Any

import torch
from PIL import Image

from msd import SpeculativeConfig, SpeculativeVLM, events
from msd.bench.data import BUNDLED
from msd.drafters.algorithms.eventgpt import EventGPT, EventGPTDrafter, Pieces
from msd.events import EventStream
from msd.loading import load_target

SIZE, FRAMES = (240, 180), 8


class InTurn(EventGPTDrafter):
    """Reads the prompt after the target's prefill."""

    read_prompt: Any = None


@torch.inference_mode()
def run(engine: SpeculativeVLM, clip: list[Image.Image], stream: EventStream) -> dict[str, float]:
    """Times one request that ends with its first token, in milliseconds."""
    engine.target.vision.clear()
    begin = time.perf_counter()
    overlapping = not isinstance(engine.drafter, InTurn)
    assert isinstance(engine.drafter, EventGPTDrafter)
    seen: dict[str, Any] = {"events": stream} if overlapping else {"auxiliary": engine.drafter.encode(stream)[None]}
    answer = engine.generate(clip, "What happens?", max_new_tokens=1, do_sample=False, **seen)
    parts = {"first token": time.perf_counter() - begin, **answer.statistics.seconds}
    names = ("first token", "prefill", *(("beside", "beside_overlap", "beside_wait") if overlapping else ()))
    return {name: 1000 * parts[name] for name in names}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int, default=12, help="of the drafter's language model")
    parser.add_argument("--repeats", type=int, default=9)
    chosen = parser.parse_args()
    photo = Image.open(BUNDLED / "puppy.jpg")
    camera = events.Camera(photo, SIZE)
    clip = [camera.picture(t * 1_000_000 // FRAMES) for t in range(FRAMES)]
    stream = events.events_of_photo(photo, SIZE)
    model, processor = load_target()
    pieces = Pieces.of(processor.tokenizer)
    torch.manual_seed(0)
    network = EventGPT.for_text(
        model.config.get_text_config(decoder=True), layers=chosen.layers, vocabulary=len(pieces.names), image_size=224,
        patch_size=16, vision_hidden=384, vision_intermediate=1536, vision_layers=6, vision_heads=6,
    )  # fmt: skip
    kinds = {"overlapping": EventGPTDrafter, "in turn": InTurn}
    engines = {
        name: SpeculativeVLM(model, processor, SpeculativeConfig(adaptive=False), kind(network, pieces))
        for name, kind in kinds.items()
    }
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in engines}
    for _ in range(chosen.repeats + 1):  # the first warms up
        for name, engine in engines.items():
            runs[name].append(run(engine, clip, stream))
    medians = {name: {k: round(median(r[k] for r in rows[1:]), 1) for k in rows[0]} for name, rows in runs.items()}
    print(json.dumps({"events": len(stream), "threads": torch.get_num_threads(), "ms": medians}))


if __name__ == "__main__":
    main()
