"""Pictures of events for people: PNG frames in a folder, an animated GIF, a piece of HTML."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from PIL import Image

from msd.errors import UserError

DELAY = 200  # ms a frame of the GIF


def write(images: Sequence[Image.Image], out: Path) -> list[Path]:
    """Writes frames to `out`: one animation if it ends in .gif, else a folder of frame-000.png and so on.

    Returns what was written. UserError where it cannot be.
    """
    with _writing(out):
        if out.suffix.lower() == ".gif":
            out.write_bytes(gif(images))
            return [out]
        out.mkdir(parents=True, exist_ok=True)
        paths = [out / f"frame-{number:03d}.png" for number in range(len(images))]
        for path, image in zip(paths, images, strict=True):
            image.save(path)
    return paths


def write_html(images: Sequence[Image.Image], captions: Sequence[str], title: str, out: Path) -> list[Path]:
    """Writes a `snippet` as a page of its own. Returns what was written; UserError where it cannot be."""
    with _writing(out):
        head = f"<!doctype html><meta charset=utf-8><title>{html.escape(title)}</title>\n"
        out.write_text(head + snippet(images, captions, title), encoding="utf-8")
    return [out]


def gif(images: Sequence[Image.Image]) -> bytes:
    """The frames one after another, for ever."""
    buffer = io.BytesIO()
    images[0].save(buffer, "GIF", save_all=True, append_images=list(images[1:]), duration=DELAY, loop=0)
    return buffer.getvalue()


def snippet(images: Sequence[Image.Image], captions: Sequence[str], title: str = "events") -> str:
    """A `<figure>` with the frames side by side, images inside it, to be set in any page."""
    parts = []
    for image, caption in zip(images, captions, strict=True):
        buffer = io.BytesIO()
        image.save(buffer, "PNG", optimize=True)
        data = base64.b64encode(buffer.getvalue()).decode()
        text = html.escape(caption)
        parts.append(
            f'<div style="flex:1;min-width:8em"><img style="width:100%;border:1px solid #ccc" alt="{text}" '
            f'src="data:image/png;base64,{data}"><small>{text}</small></div>'
        )
    return (
        f'<figure class="events"><figcaption>{html.escape(title)}</figcaption>'
        f'<div style="display:flex;gap:.5em;flex-wrap:wrap">{"".join(parts)}</div></figure>\n'
    )


@contextmanager
def _writing(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write '{out}': {error.strerror or error}; choose another place") from error
