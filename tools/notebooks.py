"""Makes the notebooks of the examples: `python -m tools.notebooks` writes them, `--check` compares them."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

EXAMPLES = Path(__file__).parents[1] / "examples"
OUT = EXAMPLES / "notebooks"
CELL = re.compile(r"^# %%( \[markdown\])?\n", re.M)


def scripts() -> list[Path]:
    """The examples."""
    return sorted(EXAMPLES.glob("*.py"))


def notebook(text: str) -> dict[str, Any]:
    """The notebook of a script in the percent format (`# %%` begins a cell, `# %% [markdown]` one of text)."""
    import jupytext

    made: dict[str, Any] = jupytext.reads(text, fmt="py:percent")
    for number, cell in enumerate(made["cells"]):
        cell["id"], cell["metadata"] = f"cell-{number}", {}
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    made["metadata"] = {"kernelspec": kernel, "language_info": {"name": "python"}}
    return made


def cells(text: str) -> list[tuple[str, str]]:
    """(kind, source) of each cell of a script, without jupytext."""
    _, *parts = CELL.split(text)
    found = []
    for mark, body in zip(parts[::2], parts[1::2], strict=True):
        source = re.sub(r"^# ?", "", body.strip("\n"), flags=re.M) if mark else body.strip("\n")
        found.append(("markdown" if mark else "code", source))
    return found


def stored(path: Path) -> list[tuple[str, str]]:
    """(kind, source) of each cell of a notebook file."""
    read = json.loads(path.read_text(encoding="utf-8"))
    return [(cell["cell_type"], "".join(cell["source"])) for cell in read["cells"]]


def stale() -> list[str]:
    """Names of scripts whose notebook is missing or another, and of notebooks without a script."""
    made = {path.stem for path in OUT.glob("*.ipynb")}
    texts = {path.stem: path.read_text(encoding="utf-8") for path in scripts()}
    wrong = [name for name, text in texts.items() if name in made and stored(OUT / f"{name}.ipynb") != cells(text)]
    return sorted({*wrong, *(made ^ texts.keys())})


def main() -> int:
    """Writes or checks all notebooks; returns the exit code."""
    if "--check" in sys.argv:
        if names := stale():
            print(f"stale: {', '.join(names)}; run: python -m tools.notebooks", file=sys.stderr)
        return int(bool(stale()))
    import nbformat

    OUT.mkdir(exist_ok=True)
    for path in scripts():
        nbformat.write(nbformat.from_dict(notebook(path.read_text(encoding="utf-8"))), OUT / f"{path.stem}.ipynb")
    return 0


if __name__ == "__main__":
    sys.exit(main())
