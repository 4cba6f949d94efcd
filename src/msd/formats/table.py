"""The list of formats, and which of them a head has."""

from __future__ import annotations

from msd.errors import UserError
from msd.formats.dflash import BLOCK_FORMATS
from msd.formats.eagle import EAGLE_FORMATS
from msd.formats.eagle3 import EAGLE3_FORMATS
from msd.formats.engines import ENGINES
from msd.formats.folder import Head
from msd.formats.format import Format, architecture_of
from msd.formats.speculators import SPECULATORS_FORMATS

# the first that recognises a head is its format
FORMATS: tuple[Format, ...] = (*SPECULATORS_FORMATS, *BLOCK_FORMATS, *EAGLE3_FORMATS, *EAGLE_FORMATS)


def format_named(name: str) -> Format:
    """Returns the format `name`; UserError lists all."""
    found = next((f for f in FORMATS if f.name == name), None)
    if found is None:
        raise UserError(f"unknown format '{name}'; known: {', '.join([*(f.name for f in FORMATS), *ENGINES])}")
    return found


def format_of(head: Head) -> Format:
    """Returns the format of a head; UserError says what its config and tensors look like."""
    found = next((f for f in FORMATS if f.recognises(head.config, frozenset(head.tensors))), None)
    if found is None:
        kind = (
            head.config.get("speculators_model_type") or architecture_of(head.config) or head.config.get("model_type")
        )
        names = ", ".join(sorted(head.tensors)[:3])
        whole = str(kind).endswith(("ForConditionalGeneration", "ForCausalLM"))
        raise UserError(
            f"'{head.place}' has no known format of draft heads (its config names {kind!r}, its tensors begin with "
            f"{names}); known: {', '.join(f.name for f in FORMATS)}"
            + ("; a whole model drafts as --draft-model" if whole else "")
        )
    return found
