"""Serving engines: the formats that they read, and what a head sees there.

Sources: vLLM 0.32 (`llama_eagle3`, `qwen3_dflash`, `v1/spec_decode/llm_base_proposer`), SGLang of 2026
(`llama_eagle3`, `dflash`; older versions ignore `fc_norm`). At image positions vLLM gives a head the embedding of the
placeholder token and the position of M-RoPE's first axis, SGLang the projector's output and the column.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from msd.drafters.toolkit.network import NetworkConfig
from msd.drafters.toolkit.variant import Variant
from msd.errors import UserError


@dataclass(frozen=True)
class Engine:
    """An engine.

    formats: our method -> the format of its heads. placeholders: whether image positions have the placeholder's
    embedding, or else the projector's output. columns: whether positions count columns, or else are those of M-RoPE's
    first axis. own_embedding: whether a head's own embedding is used. refuses: says why it would not compute a head of
    these formats, or "".
    """

    title: str
    formats: dict[str, str]
    placeholders: bool
    columns: bool
    own_embedding: bool = True
    refuses: Callable[[NetworkConfig], str] = lambda config: ""

    def check_method(self, method: str) -> None:
        """Raises UserError unless the engine serves heads of `method`."""
        if method not in self.formats:
            raise UserError(f"{self.title} serves no heads of method '{method}'; choose {' or '.join(self.formats)}")

    def seen(self, variant: Variant) -> Variant:
        """Returns the variant of a network that reads at image positions what the engine gives it there."""
        positions: dict[str, Any] = {"columns": self.columns, "first_axis": not self.columns}
        return replace(variant, placeholders=self.placeholders, **({} if variant.sections else positions))

    def remarks(self, c: NetworkConfig) -> list[str]:
        """Returns what a head reads in the engine that it was not trained on, a sentence each."""
        v, given, found = c.variant, self.seen(c.variant), []
        if v.placeholders != given.placeholders and c.method == "eagle3":  # block drafters read the target's states
            found.append(
                f"at image positions {self.title} gives it {embedding(given)}; it was trained on {embedding(v)}"
            )
        if v.embedding and not self.own_embedding:
            found.append(f"{self.title} gives it the target's embedding, not its own")
        if (v.columns, v.first_axis) != (given.columns, given.first_axis):
            found.append(f"under M-RoPE {self.title} gives it {positions(given)}; it was trained on {positions(v)}")
        return found


def embedding(v: Variant) -> str:
    """Names what a head reads at image positions."""
    return "the placeholder token's embedding" if v.placeholders else "the projector's output"


def positions(v: Variant) -> str:
    """Names the positions of image tokens."""
    return (
        "columns as positions" if v.columns else f"the {'first' if v.first_axis else 'largest'} of the three positions"
    )


def _sglang_refuses(c: NetworkConfig) -> str:
    if not c.variant.final_norm:
        return "SGLang always normalises states before the output layer, this head does not"
    if c.method == "dflash" and c.taps[-1] < 0:
        return "its config.json has no 'num_target_layers', which SGLang needs"
    return ""


ENGINES = {
    "vllm": Engine("vLLM", {"eagle3": "speculators", "dflash": "speculators-dflash"}, placeholders=True, columns=False),
    "sglang": Engine("SGLang", {"eagle3": "specforge", "dflash": "dflash"}, False, True, False, _sglang_refuses),
}


def engine_named(name: str) -> Engine:
    """Returns the engine `name`; UserError lists all."""
    if name not in ENGINES:
        raise UserError(f"unknown engine '{name}'; known: {', '.join(ENGINES)}")
    return ENGINES[name]


def serving(format: str, config: NetworkConfig) -> list[str]:
    """Names the engines that serve a head of this format as it is."""
    return [e.title for e in ENGINES.values() if format in e.formats.values() and not e.refuses(config)]
