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


class Unfinished:
    """The measured parts of a run, by name and number. Without a folder nothing is saved.

    saved: the identity of the interrupted run in the folder; empty if there is none. Parts can be read and saved once
    `resume` has compared it with the identity of the new run.
    """

    def __init__(self, folder: Path | None) -> None:
        """Reads the interrupted run in a folder. Raises UserError if the file is damaged."""
        self.path = None if folder is None else folder / NAME
        self.saved: dict[str, Any] = {}
        self._parts: dict[tuple[str, int], dict[str, Any]] = {}
        self._damaged = 0
        if self.path is None or not self.path.is_file():
            return
        rows, self._damaged = read_rows(self.path, self._restart)
        first = rows[0] if rows else {}
        if first.get("format") != FORMAT or not isinstance(first.get("made_of") or None, dict):
            raise UserError(f"'{self.path}' is damaged, or of another version of msd; {self._restart}")
        self.saved = first["made_of"]
        for row in rows[1:]:
            if isinstance(row.get("part"), str) and isinstance(row.get("number"), int):
                self._parts[row["part"], row["number"]] = row

    @property
    def _restart(self) -> str:
        return f"delete '{self.path}' to begin anew"

    def resume(self, identity: dict[str, Any]) -> None:
        """Starts or resumes a run. identity: JSON-ready. Raises UserError if the interrupted run has another one."""
        assert self.path is not None
        identity = json.loads(json.dumps(identity))
        for name in dict.fromkeys([*identity, *self.saved]) if self.saved else ():
            if self.saved.get(name) != identity.get(name):
                old, new = (shortened(repr(each.get(name))) for each in (self.saved, identity))
                raise UserError(
                    f"'{self.path.parent}' holds an interrupted run with {name} {old}, not {new}; repeat the command "
                    f"with the old settings to resume it, choose another --out, or {self._restart}"
                )
        if self._parts:
            lost = f"; {self._damaged} damaged lines are measured again" if self._damaged else ""
            print(f"msd: resuming the run that was interrupted in '{self.path.parent}'{lost}", file=sys.stderr)
        head = {"format": FORMAT, "made_of": identity}
        write_whole(self.path, "".join(json.dumps(row) + "\n" for row in (head, *self._parts.values())))

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
