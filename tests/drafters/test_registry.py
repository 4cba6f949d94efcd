"""Every installation lists the same methods; only weights can be missing."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from msd import drafters
from msd.drafters import registry
from msd.errors import UserError


def test_the_wheel_lists_what_the_checkout_lists(monkeypatch: pytest.MonkeyPatch) -> None:
    checkout = [m.name for m in drafters.catalogue()]
    monkeypatch.setattr(registry, "ROOTS", registry.ROOTS[:1])  # the weights in the wheel
    assert [m.name for m in drafters.catalogue()] == checkout
    here = drafters.methods()
    assert here == [m.name for m in drafters.catalogue() if not m.hint and m.native is None]
    assert here == ["ar", "prompt-lookup", "prompt-lookup:sampled", "msd", "msd:sampled", "msd+prompt-lookup"]


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("eagle2", "msd train --method eagle2"),
        ("specvlm-video", "msd train --method eagle2"),
        ("msd+eagle3", "msd train --method eagle3"),
        ("standard", "msd train --off router,"),
        ("msd:ar", "msd train --form ar"),
        ("msd:video", "see recipes/events"),
        ("msd:video+prompt-lookup", "see recipes/events"),
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
    with pytest.raises(UserError, match=r"unknown method 'eagle9'; known: ar, .*eagle2 \(weights not here\)"):
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
