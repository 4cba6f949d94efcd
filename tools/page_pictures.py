"""Takes the screenshots of docs/serve.md from a running server: `msd serve`, then `python tools/page_pictures.py`.

From a server whose drafter reads events (`msd serve --target reference-video`), it takes the one of a recording. Needs
Playwright and Chromium (tests/serve/test_browser.py).
"""

from __future__ import annotations

import io
import re
import shutil
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from PIL import Image
from playwright.sync_api import sync_playwright

from msd.cli.demo import CLIP_PROMPT, DURATION, PHOTO, PROMPT, RATE, SENSOR, THRESHOLD
from msd.events import SimulatorSettings, events_of_photo

ROOT = Path(__file__).parents[1]
PHOTOS, OUT = ROOT / "src/msd/photos", ROOT / "docs/images"
WIDE, NARROW = {"width": 1180, "height": 860}, {"width": 360, "height": 740}
SECONDS = 300_000  # in ms


def save(page: Any, name: str, whole: bool = True) -> None:
    """Writes a screenshot with 256 colours, which keeps it small."""
    image = Image.open(io.BytesIO(page.screenshot(full_page=whole))).convert("RGB")
    image.quantize(256, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE).save(OUT / f"{name}.png", optimize=True)


def largest_block(page: Any, token: Any) -> float:
    """The largest gain of a block of the image at a token, as the page tells it."""
    token.click()
    found = re.search(r"alone ([\d.]+)\.", page.locator("#map").text_content())
    return float(found.group(1)) if found else 0.0


def ask(page: Any, question: str, most: int) -> None:
    """Asks about the chosen file with and without drafts, and measures the gain."""
    page.fill("#question", question)
    page.fill("#most", str(most))
    page.check("#compare")
    page.click("#go")
    page.wait_for_selector("#go:enabled", timeout=SECONDS)
    page.click("#measure")
    page.wait_for_selector("#measure:enabled", timeout=SECONDS)


def take(page: Any) -> None:
    """Asks about a photo, and takes screenshots on the way."""
    page.set_input_files("#file", PHOTOS / "skier.jpg")
    ask(page, PROMPT, 48)
    tokens = page.locator("#tokens .token").all()
    max(tokens, key=lambda token: largest_block(page, token)).click()
    page.wait_for_timeout(500)  # the shades of the blocks change slowly
    save(page, "page-light")
    page.emulate_media(color_scheme="dark")
    save(page, "page-dark")
    page.set_viewport_size(NARROW)
    save(page, "page-narrow")


def take_recording(page: Any) -> None:
    """Asks about the recording of a camera that moves over a photo, as in `msd demo --events`."""
    settings = SimulatorSettings(threshold_on=THRESHOLD, threshold_off=THRESHOLD)
    stream = events_of_photo(Image.open(PHOTOS / PHOTO), SENSOR, DURATION, RATE, settings=settings)
    with TemporaryDirectory() as folder:
        file = Path(folder) / "recording.npz"
        np.savez_compressed(file, t=stream.t, x=stream.x, y=stream.y, p=stream.p, size=SENSOR)
        page.set_input_files("#file", file)
        page.wait_for_selector("#recording:visible", timeout=SECONDS)
        ask(page, CLIP_PROMPT, 64)
    page.locator("#tokens .token.accepted").nth(4).click()  # a step with drafts
    page.fill("#frame-at", "2")
    page.wait_for_timeout(500)
    save(page, "page-events")


def main(address: str = "http://127.0.0.1:8000") -> None:
    """Takes them from the server at `address`."""
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport=WIDE)
        page.goto(address)
        page.wait_for_selector("#file[accept*='.npz']")  # it has read the server's settings
        reads = page.evaluate("async () => (await (await fetch('v1/msd')).json()).events")
        take_recording(page) if reads else take(page)
        browser.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
