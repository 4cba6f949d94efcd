"""SpeculativeConfig: what a user may set about speculation."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class SpeculativeConfig(BaseModel):
    """How to speculate.

    method: a name of `msd.drafters.methods()`; without one, what ships for the target (`msd.drafters.default`).
    verifier: a name of `msd.verify.policies()`.
    thresholds: modality name -> θ of `threshold`, or the θ that `budget` begins with; where it has none, `budget` takes
    those calibrated for the drafter, if there are any, and else the registry's.
    epsilon: mean total variation per emitted token that `budget` may spend (0: lossless).
    backend: how the target's passes are computed: "plain", by the model's own code; "fused"; "measure", the faster of
    them here; or "bf16", fused with products rounded to bfloat16, whose answers are not always the model's own (lossy).
    label: whether results tell each token's modality, as the drafter's router predicts it.
    adaptive: whether a step drafts what pays by the measured costs of the target's passes, and nothing where drafting
    loses; otherwise, and always where drafts are sampled or verifier or backend are lossy, it drafts as much as it may.
    nodes, depth, width: the largest draft tree, in drafted nodes, in levels, and in children of a
    node and nodes of a subtree that go on per level (1: a chain).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    method: str | None = None
    verifier: str = "lossless"
    thresholds: dict[str, float] = Field(default_factory=dict)
    epsilon: float = 0.0
    backend: str = "measure"
    label: bool = False
    adaptive: bool = True
    nodes: int = Field(default=8, ge=1)
    depth: int = Field(default=6, ge=1)
    width: int | None = Field(default=None, ge=1)
