"""The registry of verification policies: a class in `builtin/`, or anywhere else, registers itself with `@register`.

docs/glossary.md defines p, q, α, θ and the kinds of tokens. A step emits its accepted tokens and then exactly one
recovered or bonus token, unless the text stops before it.
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
    """Decides which tokens of a scored tree are emitted, and emits them through the sampler.

    The options of a policy are the keyword arguments of its constructor.
    routed: whether the policy needs `scores.modality`. lossless: whether its output always has the target's
    distribution. calibrated: whether it can use `thresholds` that were calibrated for a drafter.
    rule: a static method, the acceptance `Rule` for one sampled candidate; `MSDVerification` needs it.
    """

    routed: ClassVar[bool]
    lossless: ClassVar[bool]
    calibrated: ClassVar[bool]

    def accept(self, tree: DraftTree, scores: Scores, sampler: Sampler) -> Accepted:
        """Walks each row's tree from the root; returns the accepted path and the emitted tokens."""
        ...


_POLICIES: dict[str, type[Verifier]] = {}
Policy = TypeVar("Policy", bound=type)


def register(name: str) -> Callable[[Policy], Policy]:
    """Class decorator that registers a `Verifier` as the policy `name`."""

    def add(policy: Policy) -> Policy:
        _POLICIES[name] = policy
        return policy

    return add


def policies() -> list[str]:
    """Names of the verification policies: lossless ones first, calibrated ones last."""
    known = _known()
    return sorted(known, key=lambda name: (not known[name].lossless, known[name].calibrated, name))


def policy(name: str) -> type[Verifier]:
    """The class of policy `name`; raises UserError for an unknown one."""
    if name not in _known():
        raise UserError(f"unknown verifier '{name}'; known: {', '.join(policies())}")
    return _known()[name]


def create(name: str, thresholds: Mapping[str, float] | None = None, epsilon: float = 0.0, **more: Any) -> Verifier:
    """Creates the verifier of policy `name`.

    thresholds: modality name -> θ. epsilon: mean total variation per token. more: any other options of the policy.
    An option that the policy lacks is ignored if its value is None, 0 or empty. Raises UserError for an unknown policy,
    for any other option that it lacks, and for invalid values.
    """
    options = {"thresholds": thresholds, "epsilon": epsilon, **more}
    own = inspect.signature(policy(name)).parameters
    for option, value in options.items():
        if value and option not in own:
            others = [other for other in policies() if option in inspect.signature(_known()[other]).parameters]
            use = f"choose {' or '.join(repr(other) for other in others)} to use it" if others else "leave it out"
            raise UserError(f"verifier '{name}' has no {option}; {use}")
    return policy(name)(**{option: value for option, value in options.items() if option in own})


def _known() -> dict[str, type[Verifier]]:
    """All registered policies, after importing those in `builtin/`."""
    from msd.verify import builtin

    for module in pkgutil.iter_modules(builtin.__path__):
        import_module(f"{builtin.__name__}.{module.name}")
    return _POLICIES
