"""How a published head differs from the network of its method; the defaults are the method as it is trained here.

Formats of published heads set these switches when they read a head (`msd.formats`), and training keeps them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal


@dataclass(frozen=True, kw_only=True)
class Variant:
    """The switches of a network.

    published: read from another project's file; its vocabulary may be padded differently from the target's.

    Layers. qkv_bias, o_bias: biases of the attention's projections, and of a ViSpec adaptor's keys and values.
    head_norm: RMSNorm of each query and key head. input_norm: a norm before the attention of EAGLE-2's layer.
    residual_norm: EAGLE-3's residual is the normalised feature (`norm_before_residual`).

    Input and output. fc_bias: of EAGLE-2's `fc`. fc_norm: RMSNorm of EAGLE-3's tap states before `fc`, one for "all"
    or one for "each". fused: the taps that EAGLE-3 fuses; empty: layers 2, L//2 and L-3. final_norm: EAGLE-3
    normalises states before its output layer. fed_norm: EAGLE-3 feeds normalised states to the next level.
    embedding, head: an embedding and, for block drafters, an output layer of its own. placeholders: image positions
    have the placeholder's embedding instead of the projector's output.

    Positions. Under M-RoPE they are the largest of the three. columns: they count columns. first_axis: they are those
    of the first axis. sections: frequencies per M-RoPE axis; interleaved: how they alternate (Qwen3-VL). rope:
    parameters of a scaled rotary embedding, as in `transformers`.

    Blocks. mask_token: the id whose embedding is the mask; None: a learned vector. from_root: the root's position
    drafts a token too; None: as the method. markov: of DSpark's logits. confidence: what DSpark's confidence reads.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}
    published: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    head_norm: bool = False
    input_norm: bool = False
    residual_norm: bool = False
    fc_bias: bool = True
    fc_norm: Literal["", "all", "each"] = ""
    fused: tuple[int, ...] = ()
    final_norm: bool = True
    fed_norm: bool = False
    embedding: bool = False
    head: bool = False
    placeholders: bool = False
    columns: bool = False
    first_axis: bool = False
    rope: dict[str, str | float | int] | None = None
    sections: tuple[int, ...] = ()
    interleaved: bool = False
    mask_token: int | None = None
    from_root: bool | None = None
    markov: Literal["vanilla", "gated", "rnn", "none"] = "vanilla"
    confidence: Literal["markov", "state", "none"] = "markov"


PLAIN = Variant()
