"""Invented captions and a tokenizer, so that tests of the data mix need no data sets."""

from zlib import crc32

PHOTOS = [
    [
        "A brown dog runs on the beach .",
        "A puppy is chasing a red ball near the ocean .",
        "The dog plays .",
        "A dog running .",
        "A wet dog on sand .",
    ],
    [
        "Two men in blue shirts play guitar on a street .",
        "Two guys are playing music outside a store .",
        "Men with guitars .",
        "Two men .",
        "A band plays .",
    ],
    [
        "A person is climbing a snowy mountain .",
        "Someone wearing a yellow jacket hikes up a steep slope .",
        "A hiker .",
        "A climber in snow .",
        "A cold day .",
    ],
]


class Words:
    """A tokenizer: two ids per word, so that long answers have enough tokens."""

    def __call__(self, text: str, add_special_tokens: bool) -> "Words":
        self.input_ids = [3 + crc32(part.encode()) % 1000 for w in text.split() for part in (w[:3], w[3:])]
        return self
