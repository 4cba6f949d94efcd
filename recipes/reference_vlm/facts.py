# ruff: noqa: E501  (tables of words and phrases)
"""Extracts facts from the five captions of a photo: counts, colours, actions, clothes, place, present and absent things."""

from __future__ import annotations

import random
import re
from collections import Counter, defaultdict
from dataclasses import dataclass

from recipes.reference_vlm.words import COLOURS, NUMBERS, Thing, absent, present, setting, words

_COLOURED = [
    "dog",
    "dogs",
    "shirt",
    "jacket",
    "ball",
    "hat",
    "dress",
    "shorts",
    "grass",
    "coat",
    "toy",
    "pants",
    "collar",
    "helmet",
    "uniform",
    "hair",
    "water",
    "frisbee",
    "sweater",
    "car",
    "outfit",
    "top",
    "cap",
    "jersey",
    "slide",
    "bird",
    "building",
    "jeans",
    "flowers",
    "horse",
    "sky",
    "bike",
    "vest",
    "suit",
    "sweatshirt",
    "kayak",
    "surfboard",
    "motorcycle",
    "scarf",
    "skirt",
    "boat",
    "fence",
    "backpack",
    "shoes",
    "bag",
    "wetsuit",
    "wall",
    "rope",
    "leash",
    "bench",
    "bicycle",
    "umbrella",
    "headband",
    "swimsuit",
    "couch",
    "hoodie",
    "sled",
    "chair",
    "truck",
    "bucket",
    "boots",
    "cat",
    "puppy",
    "wig",
    "kite",
    "balloon",
]
_COUNTED = [
    "men",
    "women",
    "boys",
    "girls",
    "dogs",
    "children",
    "kids",
    "people",
    "players",
    "puppies",
    "ladies",
    "birds",
    "horses",
    "adults",
    "cyclists",
    "skiers",
    "teams",
    "climbers",
    "boats",
    "cars",
]
_SUBJECT = "man woman boy girl dog child person baby lady guy kid toddler cat horse bird puppy surfer skier snowboarder skateboarder biker cyclist"
_COLOUR = re.compile(
    rf"\b({'|'.join(COLOURS)})(?: and ({'|'.join(COLOURS)}))?(?:-\w+)? (?:\w+ )??({'|'.join(_COLOURED)})\b"
)
_COUNT = re.compile(rf"\b({'|'.join(NUMBERS)}) (?:[a-z]+ )?({'|'.join(_COUNTED)})\b")
_ACTION = re.compile(
    rf"^(?:a|the|an) (?:[a-z\-]+ ){{0,3}}?({_SUBJECT.replace(' ', '|')})(?: in [a-z ]+?| wearing [a-z ]+?)? (?:is |are )?([a-z]+ing\b.*)$"
)
_CLOTHES = re.compile(
    r"\b(?:wearing|wears|dressed in) ((?:a|an) [a-z\- ]+?)(?= (?:is|are|and|while|with|in|on|at|as|holding|stands|sits|runs|walks|looks|jumps|plays)\b|[.,]|$)"
)
_NOT_ACTIONS = ("wearing", "being", "having", "covering", "including")


@dataclass(frozen=True)
class Facts:
    """Facts that the captions state about a photo."""

    counts: tuple[tuple[str, str], ...]  # ("two", "dogs")
    colours: tuple[tuple[str, str], ...]  # ("dog", "black and white")
    actions: tuple[tuple[str, str], ...]  # ("man", "riding a bike")
    clothes: tuple[str, ...]  # "a red shirt"
    place: tuple[str, bool | None] | None  # ("on a beach", outdoors)
    present: tuple[Thing, ...]
    absent: tuple[Thing, ...]


def tidy(caption: str) -> str:
    """Formats a caption as a sentence."""
    c = re.sub(r"\s+", " ", caption.strip().rstrip(" .").replace(" ,", ",").replace(" 's", "'s").replace(" n't", "n't"))
    c = re.sub(r'\s*"\s*', " ", c).strip()
    return c[:1].upper() + c[1:] + "."


def extract(captions: list[str]) -> Facts:
    """Extracts the facts of a photo from its captions."""
    tokens = words(captions)
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    colours: dict[str, Counter[str]] = defaultdict(Counter)
    actions: dict[tuple[str, str], None] = {}
    clothes: dict[str, None] = {}
    for c in (x.lower().rstrip(" .").replace(" ,", ",") for x in captions):
        for m in _COLOUR.finditer(c):
            colours[m[3]][f"{m[1]} and {m[2]}" if m[2] else m[1]] += 1
        for m in _COUNT.finditer(c):
            counts[m[2]][m[1]] += 1
        if (m := _ACTION.match(c)) and 1 < len(m[2].split()) < 10 and not m[2].startswith(_NOT_ACTIONS):
            actions[m[1], m[2]] = None
        for m in _CLOTHES.finditer(c):
            if len(m[1].split()) < 7:
                clothes[m[1]] = None
    return Facts(
        tuple((n.most_common(1)[0][0], k) for k, n in counts.items() if len(n) == 1),
        tuple((k, n.most_common(1)[0][0]) for k, n in colours.items()),
        tuple(actions),
        tuple(clothes),
        setting(tokens),
        tuple(present(tokens)),
        tuple(absent(tokens)),
    )


def presence_question(thing: Thing, there: bool, rng: random.Random) -> tuple[str, str]:
    """Returns a yes/no question and its answer."""
    ask = rng.choice(
        (
            "Is there {} in the image?",
            "Is there {} in the photo?",
            "Can you see {} in the picture?",
            "Does the image show {}?",
        )
    )
    if there:
        return ask.format(thing.noun), f"Yes, there is {thing.noun}."
    return ask.format(thing.noun), f"No, there is no {thing.name}."


def yes_no(facts: Facts, frequency: dict[str, float], rng: random.Random, there: bool) -> tuple[str, str] | None:
    """Returns a presence question whose answer is yes (`there`) or no; None if the captions leave it open.

    Absent things are drawn with the weights `frequency`, which balance the two answers (see `absence_weights`).
    """
    pool = facts.present if there else facts.absent
    if not pool:
        return None
    weights = [1.0 if there else frequency.get(t.name, 0.0) + 1e-6 for t in pool]
    return presence_question(rng.choices(pool, weights)[0], there, rng)


def open_questions(facts: Facts, rng: random.Random) -> list[tuple[str, str]]:
    """Returns questions about counts, colours, actions, clothes and place, with answers, in random order."""
    out = [
        (rng.choice((f"How many {noun} are there?", f"How many {noun} can you see?")), f"{n.capitalize()}.")
        for n, noun in facts.counts
    ]
    plural = lambda n: n.endswith("s") and n not in ("dress", "grass")  # noqa: E731
    out += [(f"What color {'are' if plural(n) else 'is'} the {n}?", f"{c.capitalize()}.") for n, c in facts.colours]
    out += [(f"What is the {who} doing?", f"{what[:1].upper()}{what[1:]}.") for who, what in facts.actions[:2]]
    if facts.clothes:
        out.append(("What is the person wearing?", f"{facts.clothes[0][:1].upper()}{facts.clothes[0][1:]}."))
    if facts.place:
        where, outdoors = facts.place
        out.append(
            (
                rng.choice(("Where is this?", "Where was the photo taken?", "What is the setting?")),
                f"{where.capitalize()}.",
            )
        )
        if outdoors is not None:
            out.append(("Is this indoors or outdoors?", "Outdoors." if outdoors else "Indoors."))
    rng.shuffle(out)
    return out
