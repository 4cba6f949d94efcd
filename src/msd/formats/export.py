"""Writes a trained head in the format of another project.

The tensors have the narrowest type that holds every value exactly, so that a head that was read is written unchanged.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as packed
from torch import Tensor

from msd.drafters.toolkit import checkpoint
from msd.drafters.toolkit.network import DraftNetwork
from msd.errors import UserError
from msd.formats.card import CARD, card
from msd.formats.engines import ENGINES, engine_named
from msd.formats.folder import WEIGHTS, local
from msd.formats.format import OURS
from msd.formats.load import load
from msd.formats.table import FORMATS, format_named
from msd.system.files import make_folder, read_json, write_whole

# --to -> the formats that it can mean, one for each kind of network
LAYOUTS = {
    "eagle": ("eagle3",),
    "eagle2": ("eagle2", "msd-qwen2-vl", "msd-llava", "vispec"),
    "speculators": ("speculators", "speculators-dflash", "speculators-dspark"),
    "specforge": ("specforge",),
    "dflash": ("dflash", "dspark"),
    **{name: tuple(engine.formats.values()) for name, engine in ENGINES.items()},
}
NARROW = (torch.float16, torch.bfloat16, torch.float32)


def export(head: Path | str, layout: str, out: Path) -> str:
    """Writes a head, ours or published, and a model card to the folder `out`; returns the format's name.

    layout: a key of `LAYOUTS`. UserError, in one line, for a network that the layout cannot express or the engine
    does not compute.
    """
    if layout not in LAYOUTS:
        raise UserError(f"--to '{layout}' is unknown; choose one of {', '.join(LAYOUTS)}")
    network = load(head)
    c: Any = network.config
    candidates = [f for f in FORMATS if f.name in LAYOUTS[layout] and f.method == network.method]
    if not candidates:
        methods = sorted({f.method for f in FORMATS if f.name in LAYOUTS[layout]})
        raise UserError(
            f"a head of method '{network.method}' has no place in layout '{layout}', which is for "
            f"{', '.join(methods)}; train one with 'msd train --method {methods[0]}'"
        )
    reasons = [f.fits(c) for f in candidates]
    form = next((f for f, reason in zip(candidates, reasons, strict=True) if not reason), None)
    if form is None or form.config is None:
        raise UserError(f"head '{head}' cannot be written in layout '{layout}': {reasons[0]}")
    refused = ENGINES[layout].refuses(c) if layout in ENGINES else ""
    if refused:
        raise UserError(f"head '{head}' cannot be written for {ENGINES[layout].title}: {refused}")
    spare, tensors = form.spare(c), network.state_dict()
    own = {name for name in tensors if name in spare or name.startswith(checkpoint.ENDING)}  # engines do not have them
    tensors = {form.theirs(name): t for name, t in tensors.items() if name not in own}
    _check_replaceable(out)
    make_folder(out)
    write_whole(out / "model.safetensors", packed(_narrowed(tensors), metadata={"format": "pt"}))
    write_whole(out / "config.json", json.dumps(form.config(c) | {"dtype": _dtype(tensors)}, indent=2) + "\n")
    if not (out / CARD).exists():
        write_whole(out / CARD, card(form.name, c, checkpoint.training(local(head)), out.name, None))
    return form.name


def _check_replaceable(out: Path) -> None:
    """Raises UserError if the folder holds a model or a head that `export` did not write."""
    config = out / "config.json"
    if config.is_file() and OURS in read_json(config, "choose another folder"):
        return
    if found := next((name for name in (config.name, WEIGHTS[0]) if (out / name).exists()), None):
        raise UserError(f"'{out}' has a {found} that 'msd export' did not write; choose another folder")


def prepare(network: DraftNetwork, engine: str) -> DraftNetwork:
    """Makes a network read at image positions what it gets there in an engine, before it is trained.

    UserError if it could not be written for the engine.
    """
    found, c = engine_named(engine), network.config
    found.check_method(network.method)
    reason = format_named(found.formats[network.method]).fits(c) or found.refuses(c)
    if reason:
        raise UserError(f"this network cannot be trained for {found.title}: {reason}")
    network.config = replace(c, variant=found.seen(c.variant))
    return network


def _narrowed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns the tensors in the narrowest floating-point type that holds all their values exactly."""
    kind = getattr(torch, _dtype(tensors))
    return {n: (t.to(kind) if t.is_floating_point() else t).contiguous() for n, t in sorted(tensors.items())}


def _dtype(tensors: dict[str, Tensor]) -> str:
    floats = [t for t in tensors.values() if t.is_floating_point()]
    exact = next(kind for kind in NARROW if all(torch.equal(t.to(kind).to(t.dtype), t) for t in floats))
    return str(exact).removeprefix("torch.")
