"""Answers with vLLM, which has an environment of its own (`make vllm-env`), as another process."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
ENVIRONMENT = ROOT / ".venv-vllm"
PYTHON = ENVIRONMENT / "bin" / "python"
INSTALLED = ENVIRONMENT / "ready"
MISSING = "vLLM is not installed in .venv-vllm; run: make vllm-env"
# read by the engine alone, for tests and tables: float32 as in the other engines, and no compilation at its start
SETTINGS: dict[str, Any] = {"dtype": "float32", "enforce_eager": True, "max_model_len": 1024, "max_num_seqs": 8}


def variables(path: str = "") -> dict[str, str]:
    """Returns the environment of a vLLM process. path: folders of modules that it may import."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "OMP_", "VLLM_"))}
    openmp = ENVIRONMENT / "lib" / "libiomp5.so"  # vLLM warns that it is slow without it
    return kept | {
        "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": path,
        "LD_PRELOAD": str(openmp) if openmp.exists() else "",
    }  # fmt: skip


def answers(
    job: dict[str, Any], path: str = "", patience: float = 3000, more: dict[str, str] | None = None
) -> dict[str, Any]:
    """Runs a job of `vllm_run`, with `more` variables. RuntimeError with the end of its log if it fails.

    patience: seconds after which it is ended, with `subprocess.TimeoutExpired`.
    """
    done = subprocess.run(
        [PYTHON, Path(__file__).with_name("vllm_run.py")],
        input=json.dumps(job), capture_output=True, text=True, env=variables(path) | (more or {}), timeout=patience,
        check=False,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"vLLM ended with {done.returncode}:\n{done.stderr[-6000:]}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found
