"""Pictures of events for people: PNG frames in a folder, an animated GIF, a piece of HTML."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from msd.system.files import make_folder, write_whole

DELAY = 200  # ms a frame of the GIF


def write(images: Sequence[Image.Image], out: Path) -> list[Path]:
    """Writes frames to `out`: one animation if it ends in .gif, else a folder of frame-000.png and so on.

    Returns what was written. UserError where it cannot be.
    """
    if out.suffix.lower() == ".gif":
        write_whole(out, gif(images))
        return [out]
    make_folder(out)
    paths = [out / f"frame-{number:03d}.png" for number in range(len(images))]
    for path, image in zip(paths, images, strict=True):
        write_whole(path, _png(image))
    return paths


def write_html(images: Sequence[Image.Image], captions: Sequence[str], title: str, out: Path) -> list[Path]:
    """Writes a `snippet` as a page of its own. Returns what was written; UserError where it cannot be."""
    head = f"<!doctype html><meta charset=utf-8><title>{html.escape(title)}</title>\n"
    write_whole(out, head + snippet(images, captions, title))
    return [out]


def gif(images: Sequence[Image.Image]) -> bytes:
    """The frames one after another, for ever."""
    buffer = io.BytesIO()
    images[0].save(buffer, "GIF", save_all=True, append_images=list(images[1:]), duration=DELAY, loop=0)
    return buffer.getvalue()


def _png(image: Image.Image, optimize: bool = False) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=optimize)
    return buffer.getvalue()


def snippet(images: Sequence[Image.Image], captions: Sequence[str], title: str = "events") -> str:
    """A `<figure>` with the frames side by side, images inside it, to be set in any page."""
    parts = []
    for image, caption in zip(images, captions, strict=True):
        data = base64.b64encode(_png(image, optimize=True)).decode()
        text = html.escape(caption)
        parts.append(
            f'<div style="flex:1;min-width:8em"><img style="width:100%;border:1px solid #ccc" alt="{text}" '
            f'src="data:image/png;base64,{data}"><small>{text}</small></div>'
        )
    return (
        f'<figure class="events"><figcaption>{html.escape(title)}</figcaption>'
        f'<div style="display:flex;gap:.5em;flex-wrap:wrap">{"".join(parts)}</div></figure>\n'
    )
