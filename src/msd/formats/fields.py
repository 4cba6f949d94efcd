"""Fields of another project's `config.json`: typed access, sizes and rotary parameters."""

from __future__ import annotations

from typing import Any

from msd.drafters.toolkit.rotary import SCALINGS, frequencies
from msd.errors import UserError

SIZES = {  # their name -> ours
    "hidden_size": "hidden", "num_attention_heads": "heads", "num_key_value_heads": "kv_heads", "head_dim": "head_dim",
    "intermediate_size": "intermediate", "vocab_size": "vocabulary",
}  # fmt: skip
PLAIN: dict[str, Any] = {"rms_norm_eps": 1e-6}
LLAMA = PLAIN | {"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32}
QWEN3 = PLAIN | {
    "vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 22016, "num_attention_heads": 32,
    "num_key_value_heads": 32, "head_dim": 128,
}  # fmt: skip


class Fields:
    """A JSON object of a config, with the defaults of the class that its project reads it with.

    UserErrors name the field and its value.
    """

    def __init__(self, values: dict[str, Any], defaults: dict[str, Any] | None = None) -> None:
        self.values = (defaults or {}) | {key: value for key, value in values.items() if value is not None}

    def whole(self, key: str, default: int | None = None, least: int = 1) -> int:
        """Returns an integer of at least `least`."""
        value = self.values.get(key, default)
        if value is None:
            raise UserError(f"its config.json has no field '{key}'")
        if type(value) is not int or value < least:
            raise UserError(f"its config.json: field '{key}' is {value!r}, not an integer from {least}")
        return value

    def real(self, key: str, default: float) -> float:
        """Returns a positive number."""
        value = self.values.get(key, default)
        if type(value) not in (int, float) or not 0 < value < float("inf"):
            raise UserError(f"its config.json: field '{key}' is {value!r}, not a positive number")
        return float(value)

    def flag(self, key: str, default: bool = False) -> bool:
        """Returns a truth value."""
        value = self.values.get(key, default)
        if type(value) is not bool:
            raise UserError(f"its config.json: field '{key}' is {value!r}, not true or false")
        return value

    def choice(self, key: str, default: str, allowed: tuple[str, ...]) -> str:
        """Returns one of the `allowed` texts."""
        value = self.values.get(key, default)
        if value not in allowed:
            raise UserError(f"its config.json: field '{key}' is {value!r}; supported: {', '.join(allowed)}")
        return value

    def layers(self, key: str, shift: int) -> tuple[int, ...]:
        """Returns the taps of a list of layer ids, each `shift` more than the id; empty if there is no list."""
        ids = self.values.get(key, [])
        if not isinstance(ids, list) or any(type(i) is not int or i + shift < 0 for i in ids):
            raise UserError(f"its config.json: field '{key}' is {ids!r}, not a list of layer ids")
        if len(set(ids)) < len(ids):
            raise UserError(f"its config.json: field '{key}' names a layer twice: {ids!r}")
        return tuple(i + shift for i in ids)

    def part(self, key: str, defaults: dict[str, Any] | None = None) -> Fields:
        """Returns an object inside the object."""
        value = self.values.get(key, {})
        if not isinstance(value, dict):
            raise UserError(f"its config.json: field '{key}' is {value!r}, not an object")
        return Fields(value, defaults)

    def sizes(self, layers: int | None = 1) -> dict[str, Any]:
        """Returns the fields of our config that describe a decoder layer, with its rotary embedding.

        layers: the only supported number; None: any. UserError for what no network here computes.
        """
        H, heads = self.whole("hidden_size"), self.whole("num_attention_heads")
        defaults = {"num_key_value_heads": heads, "head_dim": H // heads}
        sizes: dict[str, Any] = {ours: self.whole(theirs, defaults.get(theirs)) for theirs, ours in SIZES.items()}
        if heads % sizes["kv_heads"]:
            raise UserError(f"its config.json: {heads} query heads cannot share {sizes['kv_heads']} key heads")
        count = self.whole("num_hidden_layers", 1)
        if layers is not None and count != layers:
            raise UserError(f"its config.json: field 'num_hidden_layers' is {count}; supported: {layers}")
        self.choice("hidden_act", "silu", ("silu",))
        for key in ("mlp_bias", "use_sliding_window"):
            if self.flag(key):
                raise UserError(f"its config.json: field '{key}' is true, which is not supported")
        if "sliding_attention" in (self.values.get("layer_types") or ()):
            raise UserError("its config.json: 'layer_types' has sliding_attention, which is not supported")
        return sizes | {"layers": count, "eps": self.real("rms_norm_eps", 1e-6), "rope_theta": self.rope()[0]}

    def rope(self) -> tuple[float, dict[str, Any] | None, tuple[int, ...], bool]:
        """Returns (θ, parameters of a scaling, M-RoPE sections, whether they are interleaved)."""
        rope = self.part("rope_scaling").values | self.part("rope_parameters").values
        theta = Fields(rope).real("rope_theta", self.real("rope_theta", 10000.0))
        rope.pop("rope_theta", None)
        kind, legacy = rope.pop("rope_type", None), rope.pop("type", None)
        kind = kind or legacy or "default"
        sections, interleaved = tuple(rope.pop("mrope_section", ())), bool(rope.pop("mrope_interleaved", False))
        if self.real("partial_rotary_factor", float(rope.pop("partial_rotary_factor", 1.0))) != 1.0:
            raise UserError("its config.json: 'partial_rotary_factor' is not 1, which is not supported")
        if kind in ("default", "mrope"):
            return theta, None, sections, interleaved
        if kind not in SCALINGS or "full_attention" in rope:
            raise UserError(f"its config.json: rotary scaling '{kind}' is not supported; known: {', '.join(SCALINGS)}")
        if kind == "yarn" and "max_position_embeddings" in self.values:
            rope.setdefault("original_max_position_embeddings", self.values["max_position_embeddings"])
        rope = {"rope_type": kind, **{key: value for key, value in rope.items() if type(value) in (int, float)}}
        try:
            frequencies(8, theta, rope)
        except Exception as error:  # the library reads the parameters unchecked
            raise UserError(
                f"its config.json: the parameters of rotary scaling '{kind}' are wrong ({error})"
            ) from error
        return theta, rope, sections, interleaved
