"""Takes the screenshots of docs/serve.md from a running server: `msd serve`, then `python tools/page_pictures.py`.

Needs Playwright and Chromium (tests/serve/test_browser.py).
"""

from __future__ import annotations

import io
import re
import shutil
import sys
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import sync_playwright

ROOT = Path(__file__).parents[1]
PHOTO, OUT = ROOT / "src/msd/photos/skier.jpg", ROOT / "docs/images"
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


def take(page: Any) -> None:
    """Asks about the photo, and takes screenshots on the way."""
    page.set_input_files("#file", PHOTO)
    page.fill("#question", "Describe the image in detail.")
    page.fill("#most", "48")
    page.check("#compare")
    page.click("#go")
    page.wait_for_selector("#go:enabled", timeout=SECONDS)
    page.click("#measure")
    page.wait_for_selector("#blocks i", state="attached", timeout=SECONDS)
    page.wait_for_selector("#go:enabled", timeout=SECONDS)
    tokens = page.locator("#tokens .token").all()
    max(tokens, key=lambda token: largest_block(page, token)).click()
    page.wait_for_timeout(500)  # the shades of the blocks change slowly
    save(page, "page-light")
    page.emulate_media(color_scheme="dark")
    save(page, "page-dark")
    page.set_viewport_size(NARROW)
    save(page, "page-narrow")


def main(address: str = "http://127.0.0.1:8000") -> None:
    """Takes them from the server at `address`."""
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport=WIDE)
        page.goto(address)
        take(page)
        browser.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
