"""The reference model: SmolLM2-135M-Instruct with a vision tower, assembled without network or GPU.

Importing this package registers the vision tower with `transformers`, so the assembled folder loads like any other
checkpoint:

    from msd import reference
    folder = reference.path()
    model = AutoModelForImageTextToText.from_pretrained(folder)
    processor = AutoProcessor.from_pretrained(folder)

The video target, `path(video=True)`, is the same model, trained to describe clips of four frames (docs/events.md). Only
a source checkout has its weights.
"""

import hashlib
import json
import logging
from pathlib import Path

import platformdirs

from msd.reference import assemble, folder

NAME, VIDEO_NAME = "reference", "reference-video"  # as targets
NEEDED_BYTES = 600_000_000  # the float32 checkpoint and a reserve
PHOTOS = Path(__file__).parents[1] / "photos"

logger = logging.getLogger(__name__)


def location(cache_dir: Path | str | None = None, video: bool = False) -> Path:
    """Returns the model's folder, whether it exists or not. Its name depends on the weights and on the builder.

    UserError if the record of the weights' checksums is unreadable.
    """
    root = Path(cache_dir) if cache_dir else Path(platformdirs.user_cache_dir("msd", appauthor=False)) / "reference"
    parts = json.dumps([assemble.BUILDER_VERSION, assemble.CHAT_TEMPLATE, folder.recorded(video)], sort_keys=True)
    return root / hashlib.sha256(parts.encode()).hexdigest()[:16]


def path(cache_dir: Path | str | None = None, video: bool = False, *, full: bool = False, force: bool = False) -> Path:
    """Returns the model's folder; assembles it first if it is missing or has files of the wrong size.

    Args:
        cache_dir: parent of the folder; the user's cache by default.
        video: the video target instead.
        full: compare the checksums of an existing folder, not only sizes.
        force: assemble even if the folder is complete.

    Raises:
        UserError: an input is missing or broken, or the disk is full; the message names the command to run.
    """
    place = location(cache_dir, video)

    def build(destination: Path) -> None:
        logger.info("assembling the %s in %s: once, about half a minute", "video target" if video else NAME, place)
        assemble.assemble(folder.verified(video), destination)

    folder.ensure(place, build, needed_bytes=NEEDED_BYTES, full=full, force=force)
    return place


def install(cache_dir: Path | str | None = None, force: bool = False, video: bool = False) -> Path:
    """Does the same as `path`, but also compares an existing folder with its checksums, or rebuilds it with `force`."""
    return path(cache_dir, video, full=True, force=force)


def resolve(target: Path | str) -> Path | str:
    """Returns the folder of a target called `NAME` or `VIDEO_NAME`, assembled if necessary; others unchanged."""
    return path(video=str(target) == VIDEO_NAME) if str(target) in (NAME, VIDEO_NAME) else target


def sample_photos() -> list[Path]:
    """Returns the bundled photos by name (CC0 or public domain, see `photos/SOURCES.md`); prompts are in the folder."""
    return sorted(PHOTOS.glob("*.jpg"))
