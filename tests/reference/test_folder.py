"""Any number of processes build a folder once and completely, or not at all."""

import errno
import json
import multiprocessing
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from msd.errors import UserError
from msd.reference import folder as folders
from msd.reference.folder import ensure, is_complete


def writer(text: str = "content") -> Callable[[Path], None]:
    def build(destination: Path) -> None:
        (destination / "a.bin").write_text(text)
        (destination / "b.json").write_text("{}")

    return build


def must_not_run(destination: Path) -> None:
    raise AssertionError("built again")


def test_it_is_built_once(tmp_path: Path) -> None:
    place = tmp_path / "deep" / "key"
    ensure(place, writer(), needed_bytes=1)
    ensure(place, must_not_run, needed_bytes=1)
    ensure(place, must_not_run, needed_bytes=1, full=True)
    assert is_complete(place, full=True)
    assert sorted(path.name for path in place.parent.iterdir()) == ["key", "key.lock"]


def test_force_builds_again(tmp_path: Path) -> None:
    ensure(tmp_path / "key", writer("old"), needed_bytes=1)
    ensure(tmp_path / "key", writer("new"), needed_bytes=1, force=True)
    assert (tmp_path / "key" / "a.bin").read_text() == "new"


@pytest.mark.parametrize("damage", ["missing", "shorter", "no manifest", "bad manifest"])
def test_a_damaged_folder_is_rebuilt(tmp_path: Path, damage: str) -> None:
    place = tmp_path / "key"
    ensure(place, writer(), needed_bytes=1)
    if damage == "missing":
        (place / "a.bin").unlink()
    elif damage == "shorter":
        (place / "a.bin").write_text("")
    elif damage == "no manifest":
        (place / "manifest.json").unlink()
    else:
        (place / "manifest.json").write_text("{")
    assert not is_complete(place)
    ensure(place, writer(), needed_bytes=1)
    assert is_complete(place, full=True)


def test_a_changed_byte_is_found_by_the_full_check(tmp_path: Path) -> None:
    place = tmp_path / "key"
    ensure(place, writer(), needed_bytes=1)
    (place / "a.bin").write_text("CONTENT")
    assert is_complete(place)
    ensure(place, writer(), needed_bytes=1, full=True)
    assert (place / "a.bin").read_text() == "content"


def fail_with(error: Exception) -> Callable[[Path], None]:
    def build(destination: Path) -> None:
        (destination / "half").write_text("half")
        raise error

    return build


@pytest.mark.parametrize("existing", [False, True])
def test_a_failed_build_changes_nothing(tmp_path: Path, existing: bool) -> None:
    place = tmp_path / "key"
    if existing:
        ensure(place, writer("old"), needed_bytes=1)
    with pytest.raises(RuntimeError, match="broken"):
        ensure(place, fail_with(RuntimeError("broken")), needed_bytes=1, force=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == (["key", "key.lock"] if existing else ["key.lock"])
    assert is_complete(place, full=True) == existing


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("I/O error: no space (os error 28)")]
)
def test_a_disk_that_fills_up_is_one_clear_line(tmp_path: Path, error: Exception) -> None:
    with pytest.raises(UserError, match=f"free 600 MB in {tmp_path}"):
        ensure(tmp_path / "key", fail_with(error), needed_bytes=600_000_000)
    assert [path.name for path in tmp_path.iterdir()] == ["key.lock"]


def test_a_full_disk_is_noticed_before_building(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no space left"):
        ensure(tmp_path / "key", must_not_run, needed_bytes=2**62)


def test_a_place_that_is_a_file_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write to"):
        ensure(tmp_path / "file" / "key", must_not_run, needed_bytes=1)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="the superuser may write anywhere")
def test_a_forbidden_place_is_one_clear_line(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="cannot write to"):
        ensure(tmp_path / "key", must_not_run, needed_bytes=1)


def _build_slowly(destination: Path) -> None:
    with (destination.parent / "log").open("a") as log:
        log.write(f"{os.getpid()}\n")
    for i in range(20):
        (destination / f"{i}.bin").write_text(str(i) * 1000)
        time.sleep(0.02)


def _ensure_slowly(place: Path) -> None:
    ensure(place, _build_slowly, needed_bytes=1)


def test_two_processes_build_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_ensure_slowly, args=(tmp_path / "key",)) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0]
    assert len((tmp_path / "log").read_text().splitlines()) == 1
    assert is_complete(tmp_path / "key", full=True)
    assert len(json.loads((tmp_path / "key" / folders.MANIFEST).read_text())) == 20


def test_leftovers_of_a_killed_process_are_removed(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    worker = context.Process(target=_ensure_slowly, args=(tmp_path / "key",))
    worker.start()
    while not (tmp_path / "key.partial" / "1.bin").exists():
        time.sleep(0.01)
    worker.kill()
    worker.join()
    assert not (tmp_path / "key").exists()
    ensure(tmp_path / "key", writer(), needed_bytes=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["key", "key.lock", "log"]
