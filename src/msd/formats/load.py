"""Loads published heads: checks every tensor of one against its format, and builds our network from it."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from msd.drafters import Drafter, registry
from msd.drafters.toolkit import checkpoint
from msd.drafters.toolkit.network import PADDING, DraftNetwork, NetworkConfig
from msd.drafters.toolkit.own_head import draft_ids
from msd.drafters.toolkit.variant import PLAIN
from msd.errors import UserError
from msd.formats.engines import ENGINES, Engine, serving
from msd.formats.fields import Fields
from msd.formats.folder import Head, local, read
from msd.formats.format import Format
from msd.formats.table import format_named, format_of

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
THEIRS = ("architectures", "hidden_size", "model_type", "transformer_layer_config", "speculators_model_type")
SHOWN = 3  # faults that an error message names


@dataclass(frozen=True)
class Checked:
    """What `check` finds. format: "msd" for a folder of ours. config: of our network; None if it cannot be made.

    faults: every reason why the head is refused, one sentence each. engines: those that serve it as it is. remarks: how
    its input in the engine that was asked for differs from what it was trained on.
    """

    place: str
    format: str
    config: Any
    faults: list[str]
    remarks: list[str] = field(default_factory=list)

    @property
    def engines(self) -> list[str]:
        """Names of the engines that serve it."""
        return [] if self.config is None or self.faults else serving(self.format, self.config)

    def as_dict(self) -> dict[str, Any]:
        """For `msd check --json`."""
        c = self.config
        target = (
            None if c is None else {"hidden_size": c.hidden, "vocabulary": c.vocabulary, "layers_read": list(c.taps)}
        )
        method = getattr(c, "method", None if c is None else registry.DEFAULT)
        return {
            "path": self.place, "format": self.format, "method": method, "target": target, "faults": self.faults,
            "engines": self.engines, "remarks": self.remarks,
        }  # fmt: skip


def check(place: Path | str, name: str | None = None, target: Any = None) -> Checked:
    """Checks a head of ours or of another project.

    name: the format to expect, or the engine that must serve it; by default the format that it looks like. target: the
    text config of a target that it must fit. UserError if there is nothing to check, or for an unknown format.
    """
    folder, engine = local(place), ENGINES.get(name or "")
    if name in (None, "msd", *ENGINES) and is_ours(folder):
        network = registry.load(folder)
        faults = [f"it is a folder of msd; 'msd export --to {name}' writes one for {engine.title}"] if engine else []
        return Checked(str(place), "msd", network.config, faults + _misfits(network.config, target))
    head = read(folder)
    form = format_of(head) if name is None or engine else format_named(name)
    try:
        config = _config(head, form)
    except UserError as error:
        return Checked(str(place), form.name, None, [str(error)])
    faults = [] if engine is None else _unserved(head, form, config, engine)
    remarks = [] if engine is None else engine.remarks(config)
    faults += _faults(head, form, config) + _misfits(config, target)
    return Checked(str(place), form.name, config, faults, remarks)


def load(place: Path | str, dtype: torch.dtype = torch.float32) -> DraftNetwork:
    """Loads the network of a head, ours or published, on the CPU and without a target.

    UserError names what is wrong with it.
    """
    folder = local(place)
    if is_ours(folder):
        network: DraftNetwork = registry.load(folder, dtype)
        return network
    head = read(folder)
    form = format_of(head)
    try:
        config = _config(head, form)
    except UserError as error:
        raise UserError(f"head '{place}' of format {form.name}: {error}") from error
    faults = _faults(head, form, config)
    if faults:
        more = f"; and {len(faults) - SHOWN} more, see 'msd check {place}'" if len(faults) > SHOWN else ""
        raise UserError(f"head '{place}' of format {form.name}: {'; '.join(faults[:SHOWN])}{more}")
    network = registry.trainable(form.method)(config)
    own = network.state_dict()
    network.load_state_dict({n: head.tensors.get(form.theirs(n), t) for n, t in own.items()})
    if network.embed_tokens is not None:
        network.embed_tokens.requires_grad_(False)
    return network.to(dtype).eval()


def drafter(place: Path | str) -> Drafter:
    """Creates the drafter of a head, ours or published. UserError as in `load`."""
    kind = type(network := load(place))
    found: Drafter = kind.drafter(kind.adopted(network))
    return found


def register_folder(place: Path | str) -> str:
    """Makes a head, ours or published, the one that its method uses, and returns the method's name."""
    folder = local(place)
    if is_ours(folder):
        return registry.register_folder(folder)
    network = load(place)
    registry.register_network(network, network.method)
    return network.method


def method_of(place: Path | str) -> str:
    """Returns the method of a head, ours or published."""
    folder = local(place)
    if is_ours(folder):
        return checkpoint.method(folder) or registry.DEFAULT
    return format_of(read(folder)).method


def is_ours(folder: Path) -> bool:
    """Whether a folder's config is one that `msd train` wrote. UserError without a readable config."""
    config = json.loads(checkpoint.configuration(folder))
    return not any(key in config for key in THEIRS)


def _config(head: Head, form: Format) -> NetworkConfig:
    """Returns the configuration of our network; UserError if the head's config cannot be."""
    return form.network(Fields(head.config), frozenset(head.tensors))


def _faults(head: Head, form: Format, config: NetworkConfig) -> list[str]:
    """Returns what is wrong with the tensors of a head."""
    try:
        with torch.device("meta"):
            wanted = registry.trainable(form.method)(config).state_dict()
    except Exception as error:  # impossible sizes fail in many ways
        return [f"no network can be made of its config.json ({type(error).__name__}: {error})"]
    spare = form.spare(config)
    named = {form.theirs(name): tensor for name, tensor in wanted.items()}
    optional = {form.theirs(name) for name in spare}
    rows = head.tensors.get("fc.weight", torch.empty(config.hidden, 0)).shape[0]
    if rows != config.hidden:
        return [f"its config.json is of hidden size {config.hidden}, its tensor 'fc.weight' of {rows}"]
    faults = _misnamed(named, head.tensors)
    if not faults:
        faults = [f"tensor '{name}' is missing" for name in named if name not in head.tensors and name not in optional]
        faults += [f"tensor '{name}' is unknown" for name in sorted(head.tensors.keys() - named.keys())]
    for name, tensor in sorted(head.tensors.items()):
        if name in named:
            faults += _tensor_faults(name, tensor, named[name])
    return faults or _vocabulary_faults(head.tensors, config)


def _unserved(head: Head, form: Format, config: NetworkConfig, engine: Engine) -> list[str]:
    """Returns why an engine does not serve a head of format `form` as it is."""
    if form.method not in engine.formats:
        return [f"{engine.title} serves no heads of method '{form.method}'"]
    wanted = format_named(engine.formats[form.method])
    if form is wanted:
        return [reason] if (reason := engine.refuses(config)) else []
    with torch.device("meta"):
        names = {
            wanted.theirs(name): tensor for name, tensor in registry.trainable(form.method)(config).state_dict().items()
        }
    faults = [f"{engine.title} reads {wanted.published}; this is {form.published}"]
    return faults + _misnamed(names, head.tensors)


def _misnamed(wanted: dict[str, Tensor], found: dict[str, Tensor]) -> list[str]:
    """Names the layer if a file calls it `layers.0` where the format has `midlayer`, or the other way."""
    for right, wrong in (("midlayer.", "layers.0."), ("layers.0.", "midlayer.")):
        has_wrong = any(name.startswith(wrong) for name in found)
        if has_wrong and any(n.startswith(right) for n in wanted) and not any(n.startswith(right) for n in found):
            return [f"its tensors '{wrong}*' are named '{right}*' in this format"]
    return []


def _tensor_faults(name: str, tensor: Tensor, wanted: Tensor) -> list[str]:
    if tensor.shape != wanted.shape:
        return [f"tensor '{name}' has shape {list(tensor.shape)}, not {list(wanted.shape)}"]
    if wanted.is_floating_point():
        if tensor.dtype not in FLOATS:
            return [f"tensor '{name}' has {tensor.dtype}, not one of {', '.join(map(str, FLOATS))}"]
        return [] if tensor.isfinite().all() else [f"tensor '{name}' holds numbers that are not finite"]
    return [] if tensor.dtype == wanted.dtype else [f"tensor '{name}' has {tensor.dtype}, not {wanted.dtype}"]


def _vocabulary_faults(tensors: dict[str, Tensor], config: NetworkConfig) -> list[str]:
    """Returns what is wrong with the draft vocabulary, d2t [Vd] and t2d [V]."""
    if "d2t" not in tensors:
        return []
    ids, V = draft_ids(tensors["d2t"]), config.vocabulary
    outside = ((ids < 0) | (ids >= V)).nonzero()
    if len(outside):
        row = int(outside[0])
        return [f"tensor 'd2t' maps draft token {row} to id {int(ids[row])}, outside 0…{V - 1}"]
    if len(ids.unique()) < len(ids):
        return ["tensor 'd2t' maps two draft tokens to one id"]
    marked = torch.zeros(V, dtype=torch.bool).index_fill_(0, ids, True)
    if config.draft_vocabulary < V and not torch.equal(marked, tensors["t2d"]):
        return ["tensor 't2d' does not mark the ids of 'd2t'"]
    return []


def _misfits(config: Any, target: Any) -> list[str]:
    """Returns why a head cannot draft for a target with this text config."""
    if target is None:
        return []
    faults = []
    if target.hidden_size != config.hidden:
        faults.append(f"the target's hidden size is {target.hidden_size}, the head's {config.hidden}")
    variant = getattr(config, "variant", PLAIN)
    if abs(target.vocab_size - config.vocabulary) > (PADDING if variant.published else 0):
        faults.append(f"the target has {target.vocab_size} tokens, the head {config.vocabulary}")
    outside = [tap for tap in config.taps if tap > target.num_hidden_layers]
    if outside:
        faults.append(f"it reads state {outside[0]} of a target with {target.num_hidden_layers} layers")
    return faults
