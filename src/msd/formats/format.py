"""What describes one published format: how it is recognised, its tensors, and its config in both directions."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

from msd.drafters.toolkit.network import NetworkConfig
from msd.drafters.toolkit.variant import Variant
from msd.formats.fields import Fields

OURS = "msd"  # key of a config for what a format has no field for: the shape of the tree, and what image positions read
CONVENTIONS = ("placeholders", "columns", "first_axis")  # switches of what a head sees at image positions
POSITIONS = 131072  # our networks have no largest position; vLLM does not start without one, others assume few
LAYER = (  # our part of a tensor's name -> theirs, in every format
    (".input_norm.word.", ".input_layernorm."), (".input_norm.feature.", ".hidden_norm."),
    (".input_norm.", ".input_layernorm."), (".mlp_norm.", ".post_attention_layernorm."),
    *((f".{name}.", f".self_attn.{name}.") for name in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")),
    *((f".{name}.", f".mlp.{name}.") for name in ("gate_proj", "up_proj", "down_proj")),
)  # fmt: skip
Names = frozenset[str]


@dataclass(frozen=True)
class Format:
    """One format.

    name: as in `msd check --format`. method: ours that has the network. published: who publishes heads in it.
    recognises: from a head's config and the names of its tensors. network: the configuration of our network, from the
    same; UserError for what it cannot be. config: the inverse, for `msd export`; None: it is not written.
    renames: our prefixes of tensor names -> theirs, besides `LAYER`. fits: says why a network cannot be written, or "".
    """

    name: str
    method: str
    published: str
    recognises: Callable[[dict[str, Any], Names], bool]
    network: Callable[[Fields, Names], NetworkConfig]
    renames: tuple[tuple[str, str], ...] = ()
    config: Callable[[NetworkConfig], dict[str, Any]] | None = None
    fits: Callable[[NetworkConfig], str] = lambda config: ""

    def theirs(self, name: str) -> str:
        """Returns the format's name of our tensor `name`."""
        if name.startswith("layers."):
            head, number, rest = name.split(".", 2)
            for ours, other in LAYER:
                if f".{rest}".startswith(ours):
                    name = f"{head}.{number}{other}{f'.{rest}'.removeprefix(ours)}"
                    break
        for ours, other in self.renames:
            if name.startswith(ours):
                return other + name.removeprefix(ours)
        return name

    def spare(self, config: NetworkConfig) -> set[str]:
        """Returns our tensors that a file may leave out: the map of a draft vocabulary that is the target's."""
        return {"d2t", "t2d"} if config.draft_vocabulary == config.vocabulary else set()


def network_config(method: str, fields: Fields, sizes: dict[str, Any], variant: Variant, **more: Any) -> NetworkConfig:
    """Returns the configuration of our network for a published head.

    more: its own fields; width and depth are the authors' defaults, unless the file has ours under `OURS`.
    """
    tree = fields.part(OURS)
    own = {"method": method, "draft_vocabulary": sizes["vocabulary"], "options": {}} | sizes | more
    own |= {name: tree.whole(name, own[name]) for name in ("width", "depth")}
    merged: dict[str, Any] = {name: tree.flag(name, getattr(variant, name)) for name in CONVENTIONS}
    return NetworkConfig(**own, variant=replace(variant, published=True, **merged))


def flat(c: NetworkConfig, architecture: str, model_type: str = "llama", **more: Any) -> dict[str, Any]:
    """Returns a config of LLaMA's kind for our network, with what the format has no field for under `OURS`."""
    v = c.variant
    scaling: dict[str, Any] | None = dict(v.rope) if v.rope else None
    if v.sections:
        scaling = {
            "type": "default", "rope_type": "default", "mrope_section": list(v.sections),
            "mrope_interleaved": v.interleaved,
        }  # fmt: skip
    return {
        "architectures": [architecture],
        "model_type": model_type,
        "hidden_act": "silu",
        "hidden_size": c.hidden,
        "intermediate_size": c.intermediate,
        "num_attention_heads": c.heads,
        "num_hidden_layers": c.layers,
        "num_key_value_heads": c.kv_heads,
        "head_dim": c.head_dim,
        "rms_norm_eps": c.eps,
        "rope_scaling": scaling,
        "rope_theta": c.rope_theta,
        "tie_word_embeddings": False,
        "vocab_size": c.vocabulary,
        "max_position_embeddings": POSITIONS,
        **more,
        OURS: {"width": c.width, "depth": c.depth, **{name: getattr(v, name) for name in CONVENTIONS}},
    }


def architecture_of(config: dict[str, Any]) -> str:
    """Returns the first architecture that a config names, or ""."""
    names = config.get("architectures")
    return names[0] if isinstance(names, list) and names and isinstance(names[0], str) else ""


def has(names: Iterable[str], prefix: str) -> bool:
    """Whether a tensor's name starts with `prefix`."""
    return any(name.startswith(prefix) for name in names)


def differs(c: NetworkConfig, **allowed: Any) -> str:
    """Says which switch of a network a format cannot express, or "".

    allowed: the values of switches, besides the defaults, that it can.
    """
    free = {"published", "embedding", *CONVENTIONS, "rope", *(k for k, v in allowed.items() if v is ...)}
    plain = replace(Variant(), **{name: value for name, value in allowed.items() if value is not ...})
    for name in Variant.__dataclass_fields__:
        if name not in free and getattr(c.variant, name) != getattr(plain, name):
            return f"it has no place for {name}={getattr(c.variant, name)!r}"
    return ""
