"""The environment of made benchmark results, as `msd.bench.measure.environment` gives it."""

from __future__ import annotations

from typing import Any

ENVIRONMENT: dict[str, Any] = {
    "threads": 2,
    "cpu_capability": "X",
    "dtype": "float32",
    "torch": "2",
    "transformers": "5",
    "settings": {},
}
