"""The model card of a draft head, made from its config and its training record."""

from __future__ import annotations

from typing import Any

from huggingface_hub import ModelCardData

from msd.drafters.toolkit.training import CHAIN
from msd.formats.folder import HUB_ID

CARD = "README.md"
USE = """\
```python
from msd import SpeculativeVLM

vlm = SpeculativeVLM.from_pretrained("{target}", "{repo}")
print(vlm.generate("photo.jpg", "Describe the image.").text)
```

`msd check {repo}` names its format and every fault, `msd verify --target {target} --drafter {repo}` certifies that the
output is that of `generate()`."""


def card(format: str, config: Any, record: dict[str, Any], repo: str, target: str | None) -> str:
    """Returns the text of a head's README.md.

    format, config: as `check` finds them. record: of its training; empty if it is not known. repo: its hub id, or the
    name of its folder. target: hub id or name of the model that it drafts for.
    """
    method = getattr(config, "method", "msd")
    data = ModelCardData(
        base_model=target if target and HUB_ID.fullmatch(target) else None, library_name="msd",
        pipeline_tag="image-text-to-text", tags=["speculative-decoding", "draft-model", method],
    )  # fmt: skip
    target = target or "TARGET"
    sizes = f"hidden size {config.hidden}, {config.vocabulary} tokens, of which it drafts {config.draft_vocabulary}"
    parts = [
        f"---\n{data.to_yaml()}\n---\n\n# {repo.rpartition('/')[2]}",
        f"A draft head of method `{method}` (format `{format}`) for {target}: {sizes}. The target verifies every draft,"
        " so the head changes the speed of an answer and not its text.",
        *_acceptance(record.get("held_out") or {}),
        *_training(record),
        "## Use\n\n" + USE.format(repo=repo if "/" in repo else f"./{repo}", target=target),
    ]
    return "\n\n".join(parts) + "\n"


def _acceptance(held_out: dict[str, float]) -> list[str]:
    """Returns the table of the measured acceptance, if any."""
    if not held_out:
        return ["Its acceptance was not measured."]
    rows = [f"| {'all' if name == 'acceptance' else name} | {value:.3f} |" for name, value in held_out.items()]
    table = "\n".join(["| modality of the token | accepted |", "|---|---|", *rows])
    return [
        f"## Acceptance\n\nThe share of drafted tokens that the target accepted, in chains of up to {CHAIN} tokens "
        "below every token of held-out greedy answers; tokens below a rejection do not count.\n\n" + table
    ]


def _training(record: dict[str, Any]) -> list[str]:
    """Returns what is recorded of the training, if anything."""
    if "steps" not in record:
        return []
    settings, cuts = record.get("settings", {}), record.get("cuts") or {}
    lines = [f"- {record['steps']} steps of {settings.get('batch')} answers each, out of {record.get('answers')}"]
    if cuts.get("target"):
        lines.append(f"- the target's fingerprint: `{cuts['target']}`")
    if settings.get("engine"):
        lines.append(f"- for the conventions of {settings['engine']} (`msd train --for {settings['engine']}`)")
    return ["## Training\n\n" + "\n".join(lines)]
