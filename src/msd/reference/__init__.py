"""The reference model: SmolLM2-135M-Instruct that sees, assembled from small parts, without network or GPU.

Importing this package teaches `transformers` the vision tower, so that the assembled folder loads like any other
checkpoint:

    from msd import reference
    folder = reference.path()
    model = AutoModelForImageTextToText.from_pretrained(folder)
    processor = AutoProcessor.from_pretrained(folder)

The video target, `video_path()`, is the same model taught to describe clips of four frames, for recordings of event
cameras (docs/events.md).
"""

import hashlib
import json
import logging
from pathlib import Path

import platformdirs
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

from msd.reference import assemble, folder
from msd.reference.encoder import EfficientNetLite, EfficientNetLiteConfig, load_encoder

__all__ = [
    "EfficientNetLite",
    "EfficientNetLiteConfig",
    "install",
    "language_model",
    "load_encoder",
    "location",
    "path",
    "resolve",
    "sample_photos",
    "video_path",
]

NAME, VIDEO_NAME = "reference", "reference-video"  # as targets

NEEDED_BYTES = 600_000_000  # the checkpoint, in float32, and some air
PHOTOS = Path(__file__).parents[1] / "photos"

logger = logging.getLogger(__name__)


def location(cache_dir: Path | str | None = None, video: bool = False) -> Path:
    """The folder that the model has or would have: its name changes with the weights and with the builder.

    Raises:
        UserError: the record of the weights' checksums is unreadable.
    """
    root = Path(cache_dir) if cache_dir else Path(platformdirs.user_cache_dir("msd", appauthor=False)) / "reference"
    sums = folder.recorded_video() if video else folder.recorded()
    parts = json.dumps([assemble.BUILDER_VERSION, assemble.CHAT_TEMPLATE, sums], sort_keys=True)
    return root / hashlib.sha256(parts.encode()).hexdigest()[:16]


def path(cache_dir: Path | str | None = None) -> Path:
    """The model's folder, assembled first if it is missing or has files of the wrong size.

    Args:
        cache_dir: where the folder is kept; the user's cache by default.

    Raises:
        UserError: an input is missing or broken, or the disk is full; the message says what to run.
    """
    return _ensure(cache_dir, full=False, force=False)


def video_path(cache_dir: Path | str | None = None) -> Path:
    """As `path`, of the video target, whose trained parts only a source checkout has.

    Raises:
        UserError: as in `path`, and where this is no source checkout.
    """
    return _ensure(cache_dir, full=False, force=False, video=True)


def install(cache_dir: Path | str | None = None, force: bool = False, video: bool = False) -> Path:
    """Like `path`, but every byte of an existing folder is compared with its checksum.

    Args:
        cache_dir: where the folder is kept; the user's cache by default.
        force: assemble anew in any case.
        video: the video target instead.

    Raises:
        UserError: as in `path`.
    """
    return _ensure(cache_dir, full=True, force=force, video=video)


def resolve(target: Path | str) -> Path | str:
    """The folder of a target called by `NAME` or `VIDEO_NAME`, assembled if need be; any other is returned as it is.

    Raises:
        UserError: as in `path` and `video_path`.
    """
    if str(target) == NAME:
        return path()
    return video_path() if str(target) == VIDEO_NAME else target


def language_model() -> tuple[LlamaForCausalLM, PreTrainedTokenizerBase]:
    """SmolLM2-135M-Instruct as published, float32, with its own tokenizer: the ids are those of the reference model.

    Raises:
        UserError: its file is missing or broken.
    """
    gguf = folder.locate().gguf
    folder.verify(gguf)
    return assemble.load_language_model(gguf)


def sample_photos() -> list[Path]:
    """The bundled photos (CC0 or public domain, see `photos/SOURCES.md`), by name; `prompts.jsonl` lies beside them."""
    return sorted(PHOTOS.glob("*.jpg"))


def _ensure(cache_dir: Path | str | None, full: bool, force: bool, video: bool = False) -> Path:
    place = location(cache_dir, video)

    def build(destination: Path) -> None:
        logger.info("assembling the %s in %s: once, about half a minute", "video target" if video else NAME, place)
        assemble.assemble(folder.verified_video() if video else folder.verified(), destination)

    folder.ensure(place, build, needed_bytes=NEEDED_BYTES, full=full, force=force)
    return place
