"""Every installation lists the same methods; only weights can be missing."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import rivals
import tiny
from msd import drafters
from msd.drafters import registry
from msd.drafters.algorithms.prompt_lookup import Repeats
from msd.drafters.toolkit import checkpoint
from msd.errors import UserError
from random_drafter import RandomDrafter


def test_the_wheel_lists_what_the_checkout_lists(monkeypatch: pytest.MonkeyPatch) -> None:
    checkout = [m.name for m in drafters.catalogue()]
    monkeypatch.setattr(registry, "ROOTS", registry.ROOTS[:1])  # the weights in the wheel
    assert [m.name for m in drafters.catalogue()] == checkout
    here = drafters.methods()
    assert here == [m.name for m in drafters.catalogue() if not m.hint and m.native is None]
    forms = ["msd", "msd:sampled", "msd:subtrees", "msd+prompt-lookup"]
    assert here == ["ar", "prompt-lookup", "prompt-lookup:sampled", *forms]


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("eagle2", "msd train --method eagle2"),
        ("specvlm-video", "msd train --method eagle2"),
        ("msd+eagle3", "msd train --method eagle3"),
        ("standard", "msd train --parts none"),
        ("msd:ar", "msd train --form ar --parts all"),
        ("msd:video", "see recipes/events"),
        ("msd:video+prompt-lookup", "see recipes/events"),
        ("eagle2+prompt-lookup", "msd train --method eagle2"),
        ("eventgpt+prompt-lookup", "see docs/events.md"),
    ],
)
def test_missing_weights_name_the_command_that_trains_them(
    name: str, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The message also says how to use the trained folder, which can belong to another method than the named one."""
    monkeypatch.setattr(registry, "ROOTS", registry.ROOTS[:1])
    with pytest.raises(UserError, match=f"method '{re.escape(name)}': weights not here: (make them with `)?{command}"):
        drafters.create(name)
    with pytest.raises(UserError, match="with --drafter" if name == "eagle2" else "copy DIR/drafter to"):
        drafters.ready(name)
    with pytest.raises(
        UserError, match=r"unknown method 'eagle9'; did you mean 'eagle3'\? known: ar, .*eagle2 \(weights not here\)"
    ):
        drafters.create("eagle9")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("[1]", "it holds no JSON object but list"),
        ('{"method": ["eagle2"]}', "names the method ['eagle2']"),
        ('{"method": "eagle9"}', "is of method 'eagle9', which is not known here"),
        ('{"method": "eagle2"}', "is not that of a drafter here: field 'depth' is missing"),
        ("{", "is damaged"),
    ],
)
def test_an_invalid_folder_is_refused(config: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(config)
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=re.escape(message)):
        drafters.register_folder(tmp_path)


def test_registered_methods_come_first() -> None:
    before = drafters.methods()
    drafters.register("ar", lambda: drafters.create("prompt-lookup"))
    drafters.register("mine", lambda: drafters.create("ar"))
    assert drafters.methods() == [*before, "mine"]
    assert drafters.create("mine").name == "prompt-lookup"
    assert "mine" in drafters.methods("another/target")


def test_every_trained_drafter_can_look_up_repeats(tmp_path: Path) -> None:
    for method in drafters.catalogue():
        name = f"{method.name}+prompt-lookup"
        if not method.weights or method.name.endswith((":sampled", "+prompt-lookup")):
            with pytest.raises(UserError, match=f"method '{re.escape(name)}': .* trained drafters that rank"):
                registry.get(name)
            continue
        assert registry.get(name).weights == method.weights and registry.get(name).target == method.target
    with pytest.raises(
        UserError,
        match=r"unknown method 'eagle9'; did you mean 'eagle3'\? known: .*; for drafters also NAME\+prompt-lookup",
    ):
        registry.get("eagle9+prompt-lookup")
    drafters.register("mine", lambda: RandomDrafter(1, 9))
    assert drafters.create("mine+prompt-lookup").name == "random+prompt-lookup"
    with pytest.raises(UserError, match="samples its candidates"):
        Repeats(drafters.create("prompt-lookup:sampled"))


def test_a_named_folder_is_also_used_with_lookup(tmp_path: Path) -> None:
    checkpoint.save(rivals.network(tiny.llava(), "eagle2"), tmp_path)
    assert drafters.register_folder(tmp_path) == "eagle2"
    made = drafters.create("eagle2+prompt-lookup")
    assert isinstance(made, Repeats) and made.drafter.network.config.vocabulary == 64  # type: ignore[attr-defined]
