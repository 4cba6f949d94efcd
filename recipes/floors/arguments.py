"""The command line of measurements of one method on validation photos."""

from __future__ import annotations

import argparse
from pathlib import Path


def about_photos(description: str | None) -> argparse.ArgumentParser:
    """A parser of the folder for the results, the method, the prompts and the folder of their images."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--method", default="msd")
    parser.add_argument("--data", type=Path, default=Path("runs/val/val.jsonl"))
    parser.add_argument("--images", type=Path, default=Path("../shared/data"))
    return parser
