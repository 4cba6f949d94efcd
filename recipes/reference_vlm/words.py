# ruff: noqa: E501  (tables of words and phrases)
"""Lists the words that captions use for common things, to derive questions whose answers the captions support.

A caption with "puppy" shows a dog; one with "person" may show a man. So each thing has words that state it and words
that leave it open. A thing counts as absent only if neither occurs.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

COLOURS = [
    "black",
    "white",
    "brown",
    "red",
    "blue",
    "green",
    "yellow",
    "orange",
    "pink",
    "purple",
    "gray",
    "grey",
    "tan",
    "golden",
]
NUMBERS = ("two", "three", "four", "five", "six")


@dataclass(frozen=True)
class Thing:
    """A thing. stated: words that imply it; open: words that leave it undecided. A `*` matches any ending."""

    name: str
    stated: str
    open: str
    phrase: str = ""  # with its article; for uncountable nouns without one

    @property
    def noun(self) -> str:
        return self.phrase or f"a {self.name}"


_SOMEONE = (
    "person people someone somebody adult* crowd group couple team* player* rider* skier* surfer* snowboard* skateboarder* climber* biker* "
    "cyclist* bicyclist* hiker* swimmer* diver* athlete* dancer* performer* driver* racer* runner* hand* arm* leg* feet foot face* family "
    "another others one two three four five they their them friend* teen* youth* wearing dressed rock-climber worker* musician* band* "
    "football* soccer* baseball* basketball* hockey* tennis* officer* fan* gymnast* motorcyclist* individual* tourist* human* catcher batter"
)
_MALE = (
    "man men guy* gentleman gentlemen male* boy* he him his father dad groom cowboy* fisherman son brother* businessman"
)
_FEMALE = "woman women lady ladies female* girl* she her mother mom bride daughter sister* cheerleader* ballerina"
_YOUNG = "child children kid* boy* girl* toddler* baby babies infant* teen* young little youth* youngster* student* son daughter"
_WATER = "water* ocean sea lake river pool beach wave* surf* boat* splash* swim* fountain* stream pond wet kayak* canoe* raft* creek shore* puddle* dive* diving waterfall* sprinkler* hose ski* fish*"

THINGS = (
    Thing("dog", "dog* pup* hound* retriever* terrier* poodle* labrador* greyhound* collie* bulldog* dachshund* rottweiler*", "animal* lab pet* canine* shepherd* muzzle* leash collar"),
    Thing("man", "man men guy guys gentleman gentlemen", f"{_MALE} {_SOMEONE}"),
    Thing("woman", "woman women lady ladies", f"{_FEMALE} {_SOMEONE}"),
    Thing("boy", "boy boys", f"{_MALE} {_YOUNG} {_SOMEONE}"),
    Thing("girl", "girl girls", f"{_FEMALE} {_YOUNG} {_SOMEONE}"),
    Thing("child", "child children kid kids boy boys girl girls toddler* baby", f"{_YOUNG} {_SOMEONE}"),
    Thing("ball", "ball balls football* soccer basketball* volleyball* baseball* tennis", "game* player* sport* team* toy* catch* throw* kick* play* object*"),
    Thing("bicycle", "bike* bicycl* cyclist* biker* biking cycling bmx", "rid* race* racing wheel* motor* helmet*"),
    Thing("horse", "horse* pony ponies", "rid* animal* cowboy* rodeo polo jockey* saddle* race* cart carriage bull"),
    Thing("car", "car cars suv jeep taxi", "vehicle* truck* traffic street* road* race* racing parking van city driv* bus* auto* track highway"),
    Thing("water", "water ocean sea lake river pool pond stream wave waves", _WATER, "water"),
    Thing("snow", "snow snowy", "snow* ski* ice icy winter* sled* mountain* cold white", "snow"),
    Thing("beach", "beach", "sand* shore* ocean sea surf* wave* coast* water* seaside"),
    Thing("bird", "bird birds seagull* duck* goose geese pigeon* swan* parrot*", "animal* fly* flies wing*"),
    Thing("cat", "cat cats kitten*", "animal* pet*"),
    Thing("boat", "boat* canoe* kayak* raft* sailboat* ship*", _WATER),
    Thing("skateboard", "skateboard*", "skat* board* trick* ramp* scooter*"),
    Thing("motorcycle", "motorcycl* motorbike*", "bike* rid* motor* dirt race* racing biker* scooter* atv"),
    Thing("bench", "bench benches", "sit* seat* park table*"),
    Thing("hat", "hat hats cap caps", "helmet* wearing head* cowboy* uniform* outfit* costume* dressed beanie* visor hood*"),
    Thing("frisbee", "frisbee*", "disc disk toy* catch* throw* play* object* mouth"),
    Thing("guitar", "guitar*", "music* band* instrument* play* perform* concert* stage"),
)  # fmt: skip

_SETTINGS = (
    ("on a beach", "beach", True),
    ("in the snow", "snow snowy snowboarder skier", True),
    ("in a swimming pool", "pool", None),
    ("by the ocean", "ocean sea surfer", True),
    ("at a lake", "lake", True),
    ("at a river", "river", True),
    ("in a forest", "woods forest", True),
    ("in the mountains", "mountain mountains cliff", True),
    ("on a playground", "playground", True),
    ("on a field", "field soccer football baseball", True),
    ("on a street", "street sidewalk road", True),
    ("in a park", "park", True),
    ("on the grass", "grass grassy lawn", True),
    ("on a track", "racetrack racetrack", True),
    ("inside a room", "couch bed kitchen carpet room indoors sofa", False),
)


def words(texts: list[str]) -> set[str]:
    """Returns the lower-case words of several texts."""
    return set(re.findall(r"[a-z]+", " ".join(texts).lower()))


def _pattern(listing: str) -> re.Pattern[str]:
    return re.compile("|".join(w.replace("*", "[a-z]*") for w in listing.split()))


_STATED = {t.name: _pattern(t.stated) for t in THINGS}
_OPEN = {t.name: _pattern(f"{t.stated} {t.open}") for t in THINGS}


def present(tokens: set[str]) -> list[Thing]:
    """Returns the things that the words state."""
    return [t for t in THINGS if any(_STATED[t.name].fullmatch(w) for w in tokens)]


def absent(tokens: set[str]) -> list[Thing]:
    """Returns the things that no word states or leaves open."""
    return [t for t in THINGS if not any(_OPEN[t.name].fullmatch(w) for w in tokens)]


def setting(tokens: set[str]) -> tuple[str, bool | None] | None:
    """Returns (place, whether it is outdoors or None if unknown); None if no word states a place."""
    for where, listing, outdoors in _SETTINGS:
        if tokens & set(listing.split()):
            return where, outdoors
    return None


STOP = {
    "a",
    "an",
    "the",
    "is",
    "are",
    "was",
    "were",
    "be",
    "been",
    "being",
    "in",
    "on",
    "at",
    "of",
    "with",
    "and",
    "to",
    "from",
    "for",
    "by",
    "into",
    "onto",
    "over",
    "under",
    "through",
    "near",
    "next",
    "while",
    "as",
    "it",
    "its",
    "his",
    "her",
    "their",
    "he",
    "she",
    "they",
    "them",
    "him",
    "there",
    "this",
    "that",
    "these",
    "those",
    "has",
    "have",
    "having",
    "up",
    "down",
    "off",
    "out",
    "one",
    "some",
    "other",
    "another",
    "each",
    "who",
    "which",
    "or",
    "image",
    "photo",
    "picture",
    "scene",
    "view",
    "seen",
    "also",
    "can",
    "shown",
    "shows",
    "no",
    "not",
    "along",
    "across",
    "around",
    "behind",
    "front",
    "background",
    "very",
}
_SAME = {
    "man": "man", "men": "man", "guy": "man", "guys": "man", "person": "man", "people": "man", "male": "man", "someone": "man",
    "woman": "woman", "women": "woman", "lady": "woman", "ladies": "woman", "female": "woman",
    "child": "child", "children": "child", "kid": "child", "kids": "child", "boy": "child", "boys": "child", "girl": "child", "girls": "child",
    "toddler": "child", "baby": "child", "dog": "dog", "dogs": "dog", "puppy": "dog", "puppies": "dog", "bike": "bike", "bicycle": "bike",
    "grey": "gray", "grassy": "grass", "snowy": "snow", "sea": "ocean", "walks": "walk", "small": "little", "photograph": "photo",
}  # fmt: skip


def content(text: str) -> set[str]:
    """Returns the content words of a text, roughly stemmed, with synonyms merged."""
    out = set()
    for w in re.findall(r"[a-z0-9]+", text.lower()):
        if w in STOP:
            continue
        w = _SAME.get(w, w)
        for end in ("ning", "ing", "es", "ed", "s"):
            if w.endswith(end) and len(w) - len(end) > 2 and w not in ("dress", "grass"):
                w = w[: -len(end)]
                break
        out.add(w)
    return out
