"""Saves the parts of a benchmark as they are measured, so that an interrupted run can be resumed.

`unfinished.jsonl` in the folder of the results starts with a line that identifies the run (settings, data, versions).
Each further line is one measured part. The file is removed when the results are complete.
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


def saved_identity(folder: Path | None) -> dict[str, Any]:
    """Returns the identity of the interrupted run in a folder; empty if there is no readable one."""
    path = None if folder is None else folder / NAME
    rows = read_rows(path, "")[0] if path is not None and path.is_file() else []
    identity = rows[0].get("made_of") if rows else None
    return identity if isinstance(identity, dict) else {}


class Unfinished:
    """The measured parts of a run, by name and number. Without a folder nothing is saved."""

    def __init__(self, folder: Path | None, identity: dict[str, Any]) -> None:
        """identity: JSON-ready. Raises UserError if the folder holds an interrupted run with another identity."""
        self.path = None if folder is None else folder / NAME
        self._parts: dict[tuple[str, int], dict[str, Any]] = {}
        if self.path is None:
            return
        head = {"format": FORMAT, "made_of": json.loads(json.dumps(identity))}
        rows, damaged = self._read(head) if self.path.is_file() else ([], 0)
        for row in rows:
            if isinstance(row.get("part"), str) and isinstance(row.get("number"), int):
                self._parts[row["part"], row["number"]] = row
        if self._parts:
            lost = f"; {damaged} damaged lines are measured again" if damaged else ""
            print(f"msd: resuming the run that was interrupted in '{folder}'{lost}", file=sys.stderr)
        write_whole(self.path, "".join(json.dumps(row) + "\n" for row in (head, *self._parts.values())))

    def _read(self, head: dict[str, Any]) -> tuple[list[dict[str, Any]], int]:
        """Returns the rows after the first, which must equal `head`, and the number of damaged lines."""
        assert self.path is not None
        restart = f"delete '{self.path}' to begin anew"
        rows, damaged = read_rows(self.path, restart)
        first = rows[0] if rows else {}
        if first.get("format") != FORMAT or not isinstance(first.get("made_of"), dict):
            raise UserError(f"'{self.path}' is damaged, or of another version of msd; {restart}")
        before, now = first["made_of"], head["made_of"]
        for name in dict.fromkeys([*now, *before]):
            if before.get(name) != now.get(name):
                old, new = (shortened(repr(identity.get(name))) for identity in (before, now))
                raise UserError(
                    f"'{self.path.parent}' holds an interrupted run with {name} {old}, not {new}; repeat the command "
                    f"with the old settings to resume it, choose another --out, or {restart}"
                )
        return rows[1:], damaged

    def get(self, name: str, kind: type[P], number: int) -> P | None:
        """Returns a saved part, an instance of the dataclass `kind`; None if it is missing or damaged."""
        row = self._parts.get((name, number))
        try:
            return None if row is None else TypeAdapter(kind).validate_python(row["values"])
        except (ValidationError, KeyError):
            return None

    def put(self, name: str, number: int, part: P) -> P:
        """Saves a part, a dataclass instance, and returns it. Raises UserError if it cannot be written."""
        if self.path is not None:
            values = TypeAdapter(type(part)).dump_python(part, mode="json")
            append(self.path, json.dumps({"part": name, "number": number, "values": values}) + "\n")
        return part

    def remove(self) -> None:
        """Deletes the file, once the results are complete."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)
