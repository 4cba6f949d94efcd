"""Reads vLLM's `--speculative-config` as the options that mean the same here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from msd.errors import UserError, named
from msd.system.files import parse_json, shortened

KEYS = ("method", "model", "num_speculative_tokens")
HEADS = {  # vLLM's name -> our methods that read such a head
    "eagle": ("eagle2", "msd-published", "vispec"), "eagle3": ("eagle3",), "dflash": ("dflash",),
    "dspark": ("dspark",),
}  # fmt: skip
WITHOUT_MODEL = {"ngram": "prompt-lookup", "mtp": "mtp"}
DEEPEST = 8  # levels that any method here drafts


@dataclass(frozen=True)
class Speculation:
    """The options that a `--speculative-config` sets. depth: the most levels of a tree, None for the method's own."""

    method: str | None = None
    drafter: Path | None = None
    draft_model: str | None = None
    depth: int | None = None


def read(text: str) -> Speculation:
    """Reads `{"method": …, "model": …, "num_speculative_tokens": …}`. UserError for what has no meaning here."""
    with named("--speculative-config"):
        try:
            given = parse_json(text)
        except ValueError as error:
            raise UserError(f"{shortened(text)} is no JSON object ({error})") from error
        unknown = next((key for key in given if key not in KEYS), None)
        if unknown is not None:
            raise UserError(f"'{shortened(unknown)}' has no meaning here; it may hold {', '.join(KEYS)}")
        return _chosen(given.get("method"), given.get("model"), _depth(given.get("num_speculative_tokens")))


def _chosen(method: Any, model: Any, depth: int | None) -> Speculation:
    if not isinstance(model, str | None) or not isinstance(method, str | None):
        raise UserError("'method' and 'model' are text")
    if method in WITHOUT_MODEL:
        if model is not None:
            raise UserError(f"method '{method}' takes no model")
        return Speculation(method=WITHOUT_MODEL[method], depth=depth)
    if method not in (None, "draft_model", *HEADS):
        known = ", ".join((*HEADS, "draft_model", *WITHOUT_MODEL))
        raise UserError(f"method '{shortened(method or '')}' has no meaning here; known: {known}")
    if not model:
        of = "" if method is None else f" of method '{method}'"
        raise UserError(f"'model' is missing: the head or model{of} that drafts")
    if method == "draft_model":
        return Speculation(draft_model=model, depth=depth)
    if method is not None:
        _check_head(model, method)
    return Speculation(drafter=Path(model), depth=depth)


def _check_head(model: str, method: str) -> None:
    from msd import formats

    found = formats.method_of(model)
    if found not in HEADS[method]:
        raise UserError(f"'{model}' is a head of method '{found}', not '{method}'")


def _depth(number: Any) -> int | None:
    if number is not None and (type(number) is not int or not 1 <= number <= DEEPEST):
        raise UserError(f"'num_speculative_tokens' is a number from 1 to {DEEPEST}, got {shortened(repr(number))}")
    return number
