"""`msd serve --ray --max-replicas`: load starts a second replica, and without load there is one again."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("ray", reason="needs Ray: pip install 'ray[serve]'")

import tiny_checkpoint
from serve.cluster import QUESTIONS, Load, body, retried, serving, states, wait

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2700)]
OPTIONS = ("--replicas", "1", "--max-replicas", "2", "--rows", "1", "--upscale-delay", "1", "--downscale-delay", "1")
INTERVALS = {  # seconds between two reports of the load to Ray's controller
    f"RAY_SERVE_{who}_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "1" for who in ("REPLICA", "HANDLE")
}


def test_load_starts_a_replica_which_ends_without_load(tmp_path: Path) -> None:
    target = tiny_checkpoint.write(tmp_path / "target")
    with serving(target, [2], tmp_path, *OPTIONS, **INTERVALS) as address:
        assert states() == {"RUNNING": 1}
        load = Load(address, 0)
        wait(lambda: states().get("RUNNING") == 2)
        seen = len(load.answers)
        wait(lambda: len(load.answers) >= seen + QUESTIONS)
        load.end(target)
        wait(lambda: states() == {"RUNNING": 1})
        assert retried(address, body(1), []) == dict(load.answers)[1]
