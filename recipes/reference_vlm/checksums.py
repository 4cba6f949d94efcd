"""Updates `weights/checksums.json` of the reference model to the weights next to it.

`python -m recipes.reference_vlm.checksums`
"""

import json

from msd.reference import folder
from msd.system.files import write_whole


def main() -> None:
    """Replaces the records of the encoder and the trained parts; that of the language model stays."""
    sums = folder.recorded()
    for name in ("encoder.safetensors", folder.TRAINED_PARTS):
        sums[name] = folder.fingerprint(folder.WEIGHTS / name)
    write_whole(folder.CHECKSUMS, json.dumps(sums, indent=2) + "\n")


if __name__ == "__main__":
    main()
