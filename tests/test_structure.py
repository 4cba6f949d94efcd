"""Dependencies point one way: nothing imports anything above its own layer, and no two modules import each other."""

from __future__ import annotations

import ast
import gc
from functools import cache
from pathlib import Path

import pytest

import msd

ROOT = Path(msd.__file__).parent
# from the ground up; a package stands for all its modules that have no place of their own, and "msd" for the lazy names
# of msd/__init__.py
LAYERS: list[set[str]] = [
    {"errors", "system"},
    {"core", "backends", "inputs"},
    {"targets", "verify"},
    {"labels"},
    {"planning"},
    {"drafters.base"},
    {"drafters.toolkit"},
    {"train.losses"},
    {"drafters"},
    {"formats"},
    {"decode", "events"},
    {"config", "result", "reference", "loading", "streaming", "chat", "model"},
    {"certify", "bench", "train", "estimate", "inspect", "doctor", "serve", "msd"},
    {"cli", "__main__"},
]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}


@cache
def parsed(text: str) -> ast.Module:
    """The syntax tree of a file. Python 3.11 can raise SystemError if objects are collected while it makes one."""
    gc.disable()
    try:
        return ast.parse(text)
    finally:
        gc.enable()


def modules() -> dict[str, str]:
    """Dotted name -> source text of every module of the package."""
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = ("msd", *path.relative_to(ROOT).with_suffix("").parts)
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path.read_text()
    return found


def imports(source: str, known: set[str]) -> set[str]:
    """Modules of `known` that a source text imports, anywhere in it: also in functions and for type checkers only."""
    found: set[str] = set()
    for node in ast.walk(parsed(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute here"
            deeper = {f"{node.module}.{alias.name}" for alias in node.names}
            plain = any(name not in known for name in deeper)
            found |= (deeper & known) | ({node.module or ""} if plain else set())
    return found & known


def place(module: str) -> str:
    """The entry of `LAYERS` that a module belongs to."""
    parts = module.split(".")
    return next((n for n in (".".join(parts[1:3]), parts[1]) if n in RANK), parts[1]) if len(parts) > 1 else module


def upward(texts: dict[str, str]) -> list[str]:
    """'importer -> imported' for every import of something in a higher layer."""
    return [
        f"{name} -> {other}"
        for name, text in texts.items()
        for other in sorted(imports(text, set(texts)))
        if RANK[place(other)] > RANK[place(name)]
    ]


def cycle(texts: dict[str, str]) -> list[str]:
    """Modules that import each other in a ring, or nothing."""
    graph = {name: imports(text, set(texts)) - {name} for name, text in texts.items()}
    while leaves := {name for name, others in graph.items() if not others & set(graph)}:
        graph = {name: others for name, others in graph.items() if name not in leaves}
    return sorted(graph)


def drawn() -> str:
    """`LAYERS` as docs/architecture.md shows them, the highest first; run this file to write them there."""
    lines = [" ".join(sorted(names)) for names in reversed(LAYERS)]
    return "\n".join(["```text", *lines, "```"])


def pages() -> tuple[Path, str, str]:
    """(the page, its text, its text with the layers as they are)."""
    page = ROOT.parents[1] / "docs" / "architecture.md"
    text = page.read_text(encoding="utf-8")
    head, _, rest = text.partition("<!-- layers -->\n")
    return page, text, f"{head}<!-- layers -->\n{drawn()}\n<!-- /layers -->{rest.partition('<!-- /layers -->')[2]}"


def test_the_architecture_page_shows_these_layers() -> None:
    _, text, right = pages()
    assert text == right, "run: python tests/test_structure.py"


@pytest.mark.parametrize("name", sorted(modules()))
def test_files_and_functions_can_be_read_at_a_glance(name: str) -> None:
    text = modules()[name]
    assert len(text.splitlines()) <= 500
    found = (n for n in ast.walk(parsed(text)) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef))
    assert [n.name for n in found if (n.end_lineno or 0) - n.lineno >= 60] == []


def test_the_root_holds_few_modules() -> None:
    assert len(list(ROOT.glob("*.py"))) <= 12


def test_every_module_has_a_layer() -> None:
    assert {place(name) for name in modules()} <= set(RANK), "give a new module its place in LAYERS"


def test_no_module_imports_upward() -> None:
    assert upward(modules()) == []


def test_methods_know_the_toolkit_and_not_each_other() -> None:
    texts, home = modules(), "msd.drafters.algorithms."
    own = {name: name.removeprefix(home).split(".")[0] for name in texts if name.startswith(home)}
    assert len(set(own.values())) > 10
    for name, method in own.items():
        others = imports(texts[name], set(texts)) & own.keys()
        assert {own[other] for other in others} <= {method}, name


def test_no_modules_import_each_other() -> None:
    # msd/__init__.py loads what it offers when it is asked for, so that importing it imports nothing above
    texts = {name: text for name, text in modules().items() if name != "msd"}
    assert cycle(texts) == []


def test_the_imports_are_seen() -> None:
    """Or the tests above would pass for want of anything to look at."""
    texts = modules()
    known = set(texts)
    assert sum(len(imports(text, known)) for text in texts.values()) > 60
    assert {"msd.drafters", "msd.decode", "msd.planning.plan", "msd.verify"} <= imports(texts["msd.model"], known)
    assert {"msd.model", "msd.core.modality"} <= imports(texts["msd"], known), "imports for type checkers count"
    assert "msd.certify.certificate" in imports(texts["msd.cli.verify"], known), "imports in functions count"


# a second sensor of the scene is an auxiliary source, which these modules know only by that name
WITHOUT_EVENTS = (
    "core", "targets", "planning", "verify", "backends", "inputs", "decode", "drafters.toolkit", "drafters.base",
    "drafters.auxiliary", "drafters.overlap", "drafters.registry", "streaming", "chat", "result",
)  # fmt: skip


def test_one_package_knows_events_and_plugs_into_drafters() -> None:
    texts = modules()
    below = {n: t for n, t in texts.items() if f"{n}.".startswith(tuple(f"msd.{part}." for part in WITHOUT_EVENTS))}
    assert {part.split(".")[0] for part in WITHOUT_EVENTS} == {name.split(".")[1] for name in below}
    assert [name for name, text in below.items() if "event" in text.lower()] == []
    others = {n for n, text in texts.items() if any(m.startswith("msd.events") for m in imports(text, set(texts)))}
    assert {name.split(".")[1] for name in others} <= {"events", "bench", "cli", "serve", "train"}


@pytest.mark.parametrize(
    "line",
    [
        "from msd.decode import decode",
        "from msd import decode",
        "import msd.decode",
        "def f():\n    from msd.decode import decode",
        "if TYPE_CHECKING:\n    from msd.model import Result",
        "from msd import SpeculativeVLM",
    ],
)
def test_a_planted_upward_import_is_caught(line: str) -> None:
    texts = modules()
    texts["msd.core.tree"] += f"\n{line}\n"
    assert len(upward(texts)) == 1


def test_a_planted_cycle_is_caught() -> None:
    texts = modules()
    texts["msd.core.layout"] += "\nimport msd.core.tree\n"
    texts["msd.core.tree"] += "\nimport msd.core.layout\n"
    assert {"msd.core.layout", "msd.core.tree"} <= set(cycle({n: t for n, t in texts.items() if n != "msd"}))


if __name__ == "__main__":
    page, _, right = pages()
    page.write_text(right, encoding="utf-8")
