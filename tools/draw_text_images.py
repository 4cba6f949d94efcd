"""Draws the bundled images of text for the `ocr` suite: `python tools/draw_text_images.py`."""

from __future__ import annotations

from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

PHOTOS = Path(__file__).parents[1] / "src" / "msd" / "photos"
LINES = {
    "words_total.png": "TOTAL 24.50",
    "words_open.png": "OPEN 24 HOURS",
    "words_exit.png": "EXIT",
    "words_invoice.png": "INVOICE NO 1087",
    "words_thanks.png": "THANK YOU",
    "words_cash.png": "CASH 30.00",
}


def draw(text: str) -> Image.Image:
    """Returns black text on a white strip, like a scanned line of a receipt."""
    font = ImageFont.load_default(size=44)
    left, top, right, bottom = font.getbbox(text)
    picture = Image.new("L", (int(right - left) + 40, int(bottom - top) + 40), 255)
    ImageDraw.Draw(picture).text((20 - left, 20 - top), text, fill=0, font=font)
    return picture


def main() -> None:
    """Draws all images."""
    for name, text in LINES.items():
        draw(text).save(PHOTOS / name, optimize=True)


if __name__ == "__main__":
    main()
