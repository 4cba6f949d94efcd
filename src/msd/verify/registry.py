"""Verification policies by name: a class in `builtin/`, or anywhere else, registers itself with `@register`.

Glossary. p: the target's law at a node after all logits processors. q: the draft's law a sampled token was drawn from.
α = min(1, p/q). θ: how large α must be for a policy to accept without asking chance.
Accepted token: a drafted token that is emitted. Recovered token: drawn from the residual norm(max(p - q, 0)) after a
rejection. Bonus token: drawn from p at the end of an accepted path. All emitted tokens are followed, in order, by
exactly one that is not drafted, the recovered or bonus one, unless the text stops before it.
"""

from __future__ import annotations

import inspect
import pkgutil
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any, ClassVar, Protocol, TypeVar

from msd.core.sampling import Sampler
from msd.core.tree import Accepted, DraftTree, Scores
from msd.errors import UserError


class Verifier(Protocol):
    """Chooses what to emit from a scored tree, and emits it through the sampler.

    What a policy may be set to are the keyword arguments of its constructor, and no others.
    routed: whether `scores.modality` is to be filled in for it. lossless: whether its output has the target's own
    distribution whatever its options. calibrated: whether it takes `thresholds` that were solved for a drafter.
    A policy whose acceptance of one sampled candidate is a `Rule` has it as the static method `rule`, for
    `MSDVerification`.
    """

    routed: ClassVar[bool]
    lossless: ClassVar[bool]
    calibrated: ClassVar[bool]

    def accept(self, tree: DraftTree, scores: Scores, sampler: Sampler) -> Accepted:
        """Walks each row's tree from the root and returns the accepted path and the emitted tokens."""
        ...


_POLICIES: dict[str, type[Verifier]] = {}
Policy = TypeVar("Policy", bound=type)


def register(name: str) -> Callable[[Policy], Policy]:
    """Class decorator: makes a `Verifier` the policy `name`."""

    def add(policy: Policy) -> Policy:
        _POLICIES[name] = policy
        return policy

    return add


def policies() -> list[str]:
    """Names of the verification policies: lossless ones first, those that want calibration last."""
    known = _known()
    return sorted(known, key=lambda name: (not known[name].lossless, known[name].calibrated, name))


def policy(name: str) -> type[Verifier]:
    """The class of policy `name`; UserError for an unknown one."""
    if name not in _known():
        raise UserError(f"unknown verifier '{name}'; known: {', '.join(policies())}")
    return _known()[name]


def create(name: str, thresholds: Mapping[str, float] | None = None, epsilon: float = 0.0, **more: Any) -> Verifier:
    """The verifier of policy `name`.

    thresholds: modality name -> θ. epsilon: mean total variation per token. more: any further options of the policy.
    An option that is None, 0 or empty counts as not given where the policy has no such option. UserError for an unknown
    policy, for options that it does not have, and for values that it does not take.
    """
    options = {"thresholds": thresholds, "epsilon": epsilon, **more}
    own = inspect.signature(policy(name)).parameters
    for option, value in options.items():
        if value and option not in own:
            having = [other for other in policies() if option in inspect.signature(_known()[other]).parameters]
            use = f"choose {' or '.join(repr(other) for other in having)} to use it" if having else "leave it out"
            raise UserError(f"verifier '{name}' has no {option}; {use}")
    return policy(name)(**{option: value for option, value in options.items() if option in own})


def _known() -> dict[str, type[Verifier]]:
    """All policies, those of the folder included."""
    from msd.verify import builtin

    for module in pkgutil.iter_modules(builtin.__path__):
        import_module(f"{builtin.__name__}.{module.name}")
    return _POLICIES
