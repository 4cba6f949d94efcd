"""What a benchmark has measured so far, on disk: a broken-off run keeps it, and the same command goes on from there.

`unfinished.jsonl` in the folder of the results holds a line for what the run is made of (settings, data, versions), and
a line for every part, written as soon as it is measured. It is removed once the results are whole.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from msd.errors import UserError
from msd.system.files import append, read_rows, shortened, write_whole

NAME, FORMAT = "unfinished.jsonl", 1
P = TypeVar("P")


def made_of(folder: Path | None) -> dict[str, Any]:
    """What the broken-off run in a folder is made of; empty where there is none, or none that can be read."""
    path = None if folder is None else folder / NAME
    rows = read_rows(path, "")[0] if path is not None and path.is_file() else []
    found = rows[0].get("made_of") if rows else None
    return found if isinstance(found, dict) else {}


class Unfinished:
    """Parts of a run, each a dataclass, by their kind and number. Without a folder nothing is kept."""

    def __init__(self, folder: Path | None, made_of: dict[str, Any]) -> None:
        """made_of: JSON-ready. UserError when the folder holds a broken-off run that is made of anything else."""
        self.path = None if folder is None else folder / NAME
        self._parts: dict[tuple[str, int], dict[str, Any]] = {}
        if self.path is None:
            return
        head = {"format": FORMAT, "made_of": json.loads(json.dumps(made_of))}
        rows, damaged = self._read(head) if self.path.is_file() else ([], 0)
        for row in rows:
            if isinstance(row.get("part"), str) and isinstance(row.get("number"), int):
                self._parts[row["part"], row["number"]] = row
        if self._parts:
            lost = f"; {damaged} damaged lines are measured again" if damaged else ""
            print(f"msd: going on with the run that was broken off in '{folder}'{lost}", file=sys.stderr)
        write_whole(self.path, "".join(json.dumps(row) + "\n" for row in (head, *self._parts.values())))

    def _read(self, head: dict[str, Any]) -> tuple[list[dict[str, Any]], int]:
        """The rows after the first, which must be `head`, and how many lines are damaged."""
        assert self.path is not None
        anew = f"delete '{self.path}' to begin anew"
        rows, damaged = read_rows(self.path, anew)
        first = rows[0] if rows else {}
        if first.get("format") != FORMAT or not isinstance(first.get("made_of"), dict):
            raise UserError(f"'{self.path}' is damaged, or of another version of msd; {anew}")
        was, now = first["made_of"], head["made_of"]
        for name in dict.fromkeys([*now, *was]):
            if was.get(name) != now.get(name):
                old, new = (shortened(repr(found.get(name))) for found in (was, now))
                raise UserError(
                    f"'{self.path.parent}' holds a broken-off run with {name} {old}, not {new}; give it those settings "
                    f"to go on, choose another --out, or {anew}"
                )
        return rows[1:], damaged

    def get(self, kind: type[P], number: int) -> P | None:
        """What was kept of a part; None where it is still to be measured, or was not kept well."""
        row = self._parts.get((kind.__name__, number))
        try:
            return None if row is None else TypeAdapter(kind).validate_python(row["values"])
        except (ValidationError, KeyError):
            return None

    def put(self, number: int, part: P) -> P:
        """Keeps a part, and returns it. UserError when it cannot be written."""
        if self.path is not None:
            values = TypeAdapter(type(part)).dump_python(part, mode="json")
            append(self.path, json.dumps({"part": type(part).__name__, "number": number, "values": values}) + "\n")
        return part

    def remove(self) -> None:
        """The results are whole: nothing is left to go on from."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)
