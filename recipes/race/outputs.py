"""Stores the target's outputs for all training answers on disk, so that every run of the race reads the same ones.

python -m recipes.race.outputs      # computes those that are missing; run it again after an interruption
"""

from __future__ import annotations

import argparse
import hashlib
import time
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

import torch

from msd.backends.packed import multiplies_in_bf16
from msd.core.layout import Layout
from msd.labels.label_thresholds import ModalityThresholds
from msd.loading import load_target
from msd.system.files import remove_leftovers, write_whole
from msd.targets import adapt
from msd.targets.teacher import TeacherBatch
from msd.train.capture import Captured, label_thresholds_path, read_captured
from msd.train.drafting import DraftTraining
from msd.train.teacher_batches import LabelledBatch, TeacherBatches, TeacherCache

LAYERS = (0, 2, 15, 27, 30)  # every layer that a method of the race reads of the reference model
# of the target's products here, None: of its weights; the same for all runs on a machine, which read the same outputs
DTYPE = torch.bfloat16 if multiplies_in_bf16() else None
SECONDS = 120  # between two files


class StoredCache(TeacherCache):
    """A cache whose entries are also files of `folder`, read by memory mapping."""

    def __init__(self, *arguments: Any, folder: Path, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.folder, self._stored, self._saved = folder, set[Hashable](), time.monotonic()
        folder.mkdir(parents=True, exist_ok=True)
        remove_leftovers(folder)
        for file in sorted(folder.glob("*.pt")):
            self._read(file)
        self.head_is_linear = True if self._entries else None

    def _read(self, file: Path) -> None:
        """Maps the entries of a file, in place of those in memory."""
        with torch.serialization.safe_globals([TeacherBatch, Layout]):
            found = torch.load(file, mmap=True, weights_only=True)
        self._entries |= found
        self._stored |= found.keys()

    def get(self, key: Hashable, compute: Any) -> LabelledBatch:
        """See `TeacherCache.get`; saves new entries now and then."""
        found = super().get(key, compute)
        if time.monotonic() - self._saved > SECONDS:
            self.save()
        return found

    def save(self) -> None:
        """Writes all entries that are in no file yet to a new file."""
        new = {key: entry for key, entry in self._entries.items() if key not in self._stored}
        if new:
            file = self.folder / f"{len(self._stored):06d}.pt"
            write_whole(file, lambda path: torch.save(new, path))
            self._read(file)
        self._saved = time.monotonic()


def begun(
    model: Any, answers: Sequence[Captured], thresholds: ModalityThresholds, root: Path, gigabytes: float = 24.0
) -> StoredCache:
    """Returns the cache of the target's outputs for `answers`, with what `root` has; training computes the rest."""
    source = (answers, thresholds.model_dump(), LAYERS, DraftTraining().batch, DTYPE)
    folder = root / hashlib.sha256(repr(source).encode()).hexdigest()[:16]
    return StoredCache(model.get_output_embeddings(), torch.arange(1), LAYERS, gigabytes, folder=folder)


def stored(
    model: Any, processor: Any, answers: Sequence[Captured], thresholds: ModalityThresholds, root: Path
) -> StoredCache:
    """Returns the cache of the target's outputs for all `answers`, complete; computes what is missing in `root`."""
    cache, batch = begun(model, answers, thresholds, root), DraftTraining().batch
    batches = TeacherBatches(adapt(model, LAYERS), processor, answers, thresholds, cache, batch, dtype=DTYPE)
    batches.fill_cache(lambda done, total: print(f"batch {done} of {total}", end="\r", flush=True))
    cache.save()
    return cache


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--captured", type=Path, default=Path("runs/msd/captured.jsonl"))
    parser.add_argument("--images", type=Path, default=Path("../shared/data"))
    parser.add_argument("--root", type=Path, default=Path("runs/race/outputs"))
    parser.add_argument("--target", default="reference")
    args = parser.parse_args()
    answers = [a for a in read_captured(args.captured, args.images) if a.split == "train"]
    model, processor = load_target(args.target)
    model.requires_grad_(False)
    cache = stored(model, processor, answers, ModalityThresholds.load(label_thresholds_path(args.captured)), args.root)
    print(f"{len(cache._entries)} batches in {cache.folder}")


if __name__ == "__main__":
    main()
