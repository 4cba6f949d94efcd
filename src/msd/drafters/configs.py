"""What all drafter configurations share: sizes taken from the target, and a strict JSON form."""

from __future__ import annotations

import json
from dataclasses import asdict, fields
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from msd.errors import UserError
from msd.records import parse_json

C = TypeVar("C")


def sizes(text_config: Any) -> dict[str, Any]:
    """The fields that a `transformers` text config decides, whatever the method."""
    c = text_config
    rope = getattr(c, "rope_parameters", None) or {}
    rope = rope.get("full_attention", rope)  # where layers differ, that of the far-sighted ones
    return {
        "hidden": c.hidden_size,
        "heads": c.num_attention_heads,
        "kv_heads": c.num_key_value_heads,
        "head_dim": getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads,
        "intermediate": c.intermediate_size,
        "vocabulary": c.vocab_size,
        "rope_theta": float(rope.get("rope_theta", getattr(c, "rope_theta", 10000.0))),
        "eps": float(getattr(c, "rms_norm_eps", 1e-5)),
    }


def as_json(config: Any) -> str:
    """JSON text of a dataclass, which `read` reads back."""
    return json.dumps(asdict(config), indent=1)


def read(text: str, kind: type[C], name: str) -> C:
    """The `kind` of a JSON text. UserError calls it `name` and tells of an unknown, missing or wrong field."""
    try:
        raw = parse_json(text)
    except ValueError as error:
        raise UserError(f"its config.json is not that of {name}: {error}") from error
    for field in sorted({f.name for f in fields(kind)}.symmetric_difference(raw)):  # type: ignore[arg-type]
        how = "unknown; was it trained by a newer msd?" if field in raw else "missing"
        raise UserError(f"its config.json is not that of {name}: field '{field}' is {how}")
    try:
        return TypeAdapter(kind).validate_json(text, strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        raise UserError(f"its config.json is not that of {name}: field '{field}': {first['msg']}") from error
