"""Prompts unlike the training data: pictures rendered by code, noise, and turns of text alone.

The shipped drafters were trained on photographs. Few drafts are accepted on drawings, charts, screens, receipts and
noise, so the suite measures what drafting costs then. `msd bench --suite unseen` runs all of it, `--suite unseen-chart`
one kind. The pictures and prompts are a function of the kind and a number.
"""

from __future__ import annotations

import io
import math
import random
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import platformdirs
from PIL import Image, ImageDraw, ImageFont

from msd.bench.data import Sample
from msd.system.files import make_folder, write_whole

SUITE = "unseen"  # the name of all of it in `msd bench --suite`
SIZE = (448, 336)  # of a picture, in pixels
EACH = 8  # prompts of each kind
COLOURS = {
    "red": "#c8342b", "blue": "#2b5fc8", "green": "#2f8f4a", "yellow": "#e3b51f", "purple": "#7b3fa0",
    "orange": "#e07b22", "black": "#202020", "grey": "#8a8a8a",
}  # fmt: skip
FRUITS = ("apples", "pears", "plums", "figs", "grapes", "limes", "dates")
GOODS = ("bread", "milk", "coffee", "soap", "paper", "batteries", "rice", "tea", "cheese", "oranges")
MENUS = ("File", "Edit", "View", "Search", "Tools", "Help")


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _drawing(rng: random.Random) -> Image.Image:
    """Filled shapes of plain colours on paper."""
    image = Image.new("RGB", SIZE, "#fbfaf5")
    draw = ImageDraw.Draw(image)
    for _ in range(rng.randint(3, 6)):
        x, y, r = rng.randint(50, 400), rng.randint(50, 290), rng.randint(20, 50)
        colour, shape = rng.choice(list(COLOURS.values())), rng.choice(("circle", "square", "triangle", "line"))
        if shape == "circle":
            draw.ellipse((x - r, y - r, x + r, y + r), colour)
        elif shape == "square":
            draw.rectangle((x - r, y - r, x + r, y + r), colour)
        elif shape == "triangle":
            draw.polygon([(x, y - r), (x - r, y + r), (x + r, y + r)], colour)
        else:
            draw.line((x - r, y - r, x + r, y + r), colour, 6)
    return image


def _chart(rng: random.Random) -> Image.Image:
    """A bar, line or pie chart with a title and labels."""
    image = Image.new("RGB", SIZE, "white")
    draw = ImageDraw.Draw(image)
    names = rng.sample(FRUITS, 5)
    values = [rng.randint(5, 100) for _ in names]
    draw.text((20, 10), f"Fruit sold in {rng.randint(1990, 2025)}", "black", _font(20))
    kind = rng.choice(("bar", "line", "pie"))
    colours = list(COLOURS.values())
    if kind == "pie":
        angle = 0.0
        for name, value, colour in zip(names, values, colours, strict=False):
            end = angle + 360 * value / sum(values)
            draw.pieslice((60, 60, 300, 300), angle, end, colour)
            middle = math.radians((angle + end) / 2)
            draw.text((180 + 150 * math.cos(middle), 175 + 140 * math.sin(middle)), name, "black", _font(14))
            angle = end
        return image
    draw.line((60, 50, 60, 290, 430, 290), "black", 2)
    points = [(95 + 72 * i, 290 - 2.2 * value) for i, value in enumerate(values)]
    for (x, y), name, value, colour in zip(points, names, values, colours, strict=False):
        if kind == "bar":
            draw.rectangle((x - 22, y, x + 22, 289), colour)
        draw.text((x - 22, 298), name, "black", _font(14))
        draw.text((x - 10, y - 20), str(value), "black", _font(14))
    if kind == "line":
        draw.line(points, COLOURS["blue"], 3)
    return image


def _screen(rng: random.Random) -> Image.Image:
    """A window of a program: a menu, buttons, fields."""
    image = Image.new("RGB", SIZE, "#d9dde3")
    draw = ImageDraw.Draw(image)
    draw.rectangle((20, 20, 428, 316), "white", "#555")
    draw.rectangle((20, 20, 428, 46), rng.choice(("#31456a", "#3d3d3d", "#22615c")))
    draw.text((30, 24), rng.choice(("Settings", "New message", "Log in", "Downloads", "Calendar")), "white", _font(16))
    for i, name in enumerate(rng.sample(MENUS, 4)):
        draw.text((32 + 70 * i, 54), name, "black", _font(14))
    for i, name in enumerate(rng.sample(("Name", "Address", "Password", "Date", "Subject", "Volume"), 3)):
        draw.text((40, 96 + 50 * i), name, "black", _font(15))
        draw.rectangle((150, 92 + 50 * i, 400, 120 + 50 * i), "#f4f4f4", "#888")
    for i, name in enumerate(rng.sample(("OK", "Cancel", "Apply", "Delete", "Send"), 2)):
        draw.rectangle((180 + 115 * i, 268, 280 + 115 * i, 300), "#4a7bd0")
        draw.text((205 + 115 * i, 274), name, "white", _font(16))
    return image


def _receipt(rng: random.Random) -> Image.Image:
    """A shop's receipt: goods, prices, a total."""
    image = Image.new("RGB", (300, 420), "#f7f7f2")
    draw = ImageDraw.Draw(image)
    draw.text((70, 16), rng.choice(("CORNER SHOP", "GREEN MARKET", "MINI STORE")), "black", _font(20))
    draw.text(
        (30, 48), f"{rng.randint(1, 28):02}.{rng.randint(1, 12):02}.{rng.randint(2015, 2026)}", "black", _font(14)
    )
    total = 0
    for i, name in enumerate(rng.sample(GOODS, rng.randint(4, 7))):
        cents = rng.randint(50, 1999)
        total += cents
        draw.text((30, 84 + 34 * i), name, "#222", _font(17))
        draw.text((215, 84 + 34 * i), f"{cents / 100:6.2f}", "#222", _font(17))
    draw.line((25, 335, 275, 335), "black", 2)
    draw.text((30, 346), "TOTAL", "black", _font(20))
    draw.text((205, 346), f"{total / 100:6.2f}", "black", _font(20))
    return image


def _noise(rng: random.Random) -> Image.Image:
    """Pixels of random colours, fine or in coarse blocks."""
    block = rng.choice((1, 4, 16, 48))
    shape = (math.ceil(SIZE[1] / block), math.ceil(SIZE[0] / block), 3)
    pixels = np.random.default_rng(rng.getrandbits(32)).integers(0, 256, shape, dtype=np.uint8)
    return Image.fromarray(pixels).resize(SIZE, Image.Resampling.NEAREST)


TURNS = (
    ("What is the capital of France?", "And what is it known for?"),
    ("Write a short story about a lighthouse.",),
    ("Explain how a bicycle stays upright.",),
    ("Give me three tips for sleeping better.", "Explain the second one in more detail."),
    ("Write a Python function that reverses a list.",),
    ("Name five animals that live in the sea.", "Which of them is the largest?"),
    ("Translate 'good morning' into French and Spanish.",),
    ("Write a polite letter that asks for a refund.",),
)
RENDERED: dict[str, Callable[[random.Random], Image.Image]] = {
    "drawing": _drawing, "chart": _chart, "screen": _screen, "receipt": _receipt, "noise": _noise,
}  # fmt: skip
PROMPTS = {
    "drawing": ("Describe this drawing in detail.", "Which shapes are in this drawing?", "How many shapes are there?"),
    "chart": ("Describe this chart in detail.", "Which value is the largest?", "What does the chart show?"),
    "screen": ("Describe this screenshot in detail.", "What is shown on this screen?", "Which buttons can be pressed?"),
    "receipt": ("List what was bought.", "What is this?", "What is the total on this receipt?"),
    "noise": ("Describe the image in detail.", "What is in this picture?", "What do you see?"),
}
KINDS = (*RENDERED, "text")


def render(kind: str, number: int) -> Image.Image:
    """Draws picture `number` of a kind of `RENDERED`; equal on every machine with the same version of Pillow."""
    return RENDERED[kind](random.Random(f"{kind} {number}"))


def samples(kinds: Sequence[str] = KINDS, folder: Path | None = None) -> list[Sample]:
    """Returns `EACH` prompts of every kind, with the task "unseen-KIND"; writes their pictures to `folder`.

    folder: by default in the user's cache. Raises UserError if a picture cannot be written.
    """
    folder = folder or Path(platformdirs.user_cache_dir("msd", appauthor=False)) / SUITE
    make_folder(folder)
    found = []
    for kind in kinds:
        for number in range(EACH):
            where = f"{kind} {number} of the suite '{SUITE}'"
            if kind == "text":
                *before, prompt = TURNS[number]
                found.append(Sample((), prompt, None, f"{SUITE}-{kind}", before=tuple(before), where=where))
                continue
            data = io.BytesIO()
            render(kind, number).save(data, "PNG")
            path = folder / f"{kind}-{number}.png"
            write_whole(path, data.getvalue())
            prompt = PROMPTS[kind][number % len(PROMPTS[kind])]
            found.append(Sample((path,), prompt, None, f"{SUITE}-{kind}", where=where))
    return found


def requested(names: Sequence[str]) -> tuple[list[Sample], list[str]]:
    """Returns the samples that `--suite` names, and the names as tasks: `unseen` stands for all of its kinds."""
    tasks = [task for name in names for task in ([f"{SUITE}-{kind}" for kind in KINDS] if name == SUITE else [name])]
    kinds = [kind for kind in KINDS if f"{SUITE}-{kind}" in tasks]
    return samples(kinds) if kinds else [], tasks
