"""Shared by all tests: the reference model, loaded once."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MKL_CBWR", "AUTO")  # the same product rounds alike each time: tests compare runs
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # workers do not compete for cores

from collections.abc import Iterator
from typing import Any

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="test every model family, not only a sample")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Without `--full`, tests of families outside the sample are left out."""
    if not config.getoption("--full"):
        left_out = [item for item in items if item.get_closest_marker("full")]
        items[:] = [item for item in items if not item.get_closest_marker("full")]
        config.hook.pytest_deselected(items=left_out)


@pytest.fixture(scope="session", autouse=True)
def known_costs() -> Iterator[None]:
    """The costs of target passes are the same in every test, whatever the machine is doing; `test_plan` measures."""
    from msd import model
    from msd.planning.costs import Costs

    known = Costs((1, 9, 65), (64, 512), ((0.030, 0.034, 0.124), (0.030, 0.038, 0.147)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "costs", lambda target: known)
        yield


@pytest.fixture(scope="session", autouse=True)
def known_kernels() -> Iterator[None]:
    """Packed products and the fused pass are the fastest in every test: rounding must not depend on the clock.

    No measurement is stored. `test_kernels` and `test_backends` measure.
    """
    from msd.backends import comparison, fused, kernels

    times = {kernel: [1.0 + (kernel != "packed")] * len(kernels.ROWS) for kernel in kernels.KERNELS}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused, "measure", lambda products: dict.fromkeys(products, times))
        patch.setattr(fused, "cached", lambda place, key, kind, valid, measure: measure())
        patch.setattr(comparison, "faster", lambda own, other: kernels.ROWS)
        yield


@pytest.fixture(autouse=True)
def observed_chances(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test sees what the user's drafters, or those of another test, had accepted."""
    from msd.drafters.toolkit.observed import measurements

    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr(measurements, "folder", lambda name: folder / name)


@pytest.fixture(autouse=True)
def methods_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers is gone after it."""
    from msd.drafters import registry

    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))


@pytest.fixture(scope="session")
def reference_model() -> tuple[Any, Any]:
    """(model, processor) of the assembled reference model, float32."""
    from msd.loading import load_target

    return load_target("reference")
