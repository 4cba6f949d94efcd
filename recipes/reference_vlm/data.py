# ruff: noqa: E501  (tables of words and phrases)
"""Selects the pictures and questions of each training step, as a pure function of (seed, step).

Each source contributes a fixed average number of samples per step. Each epoch visits a source in a new order, so all
photos are used equally often. Only train splits are read, except by `Mix(..., split="val")` for the validation loss.
"""

from __future__ import annotations

import random
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from recipes.reference_vlm.cloze import Cloze, answer_words, balanced, clozes, draw
from recipes.reference_vlm.facts import Facts, extract, open_questions, tidy, yes_no
from recipes.reference_vlm.features import FeatureSet, read_jsonl
from recipes.reference_vlm.long_answers import long_answer
from recipes.reference_vlm.pack import CELLS, IMAGE, Batch, Branch, Sample, pack, place
from recipes.reference_vlm.words import THINGS

END = 2
SHORTEST_DETAIL = 45  # minimum tokens of a long answer
CAPTION_PROMPTS = (
    "Describe the image.", "What is in the photo?", "Write a short caption for this picture.", "Give a brief description of the image.",
    "Caption this image.", "What does the image show?", "Describe this picture in one sentence.", "What is happening in this picture?",
)  # fmt: skip
DETAIL_PROMPTS = (
    "Describe the image in detail.", "Explain what you see in the photo in detail.", "Give a detailed description.", "Describe this picture in detail.",
    "What is happening in this picture? Give a detailed description.", "Write a detailed description of the photo.", "Tell me everything you see in the image.",
)  # fmt: skip
ONE_WORD = (" Answer with one word.", " Answer with a word or a number.", "\nAnswer the question using a single word.")
CLIP_PROMPTS = (
    "What happens in this clip?",
    "Describe the video.",
    "What is shown in these frames?",
    "Describe what happens in the video.",
)
MOTION_PROMPTS = ("How does the camera move?", "What is the camera doing?", "Describe the movement of the camera.")
READ_PROMPTS = (
    "What does the text say?",
    "Read the text in the image.",
    "What word is written in the image?",
    "What is written here?",
)
LINE_PROMPTS = (
    "What is written on the receipt?",
    "Read the text in the image.",
    "What does this line of the receipt say?",
)
MOTION = {
    "left": "The camera moves to the left.", "right": "The camera moves to the right.", "up": "The camera moves up.", "down": "The camera moves down.",
    "in": "The camera zooms in.", "out": "The camera zooms out.", "still": "The camera does not move.",
}  # fmt: skip
_SIDED = re.compile(r"\b(left|right|clockwise)", re.IGNORECASE)
WEIGHTS = {
    "caption": 1.0,
    "detail": 0.8,
    "vqa": 3.0,
    "question": 1.5,
    "yesno": 2.0,
    "read": 0.7,
    "text": 0.6,
    "clip": 1.0,
    "avoid": 1.0,
}  # of an answer token
FIRST_RATES = {"flickr": 3.9, "coco": 4.4, "text": 1.2, "clips": 0.25, "words": 0.4, "receipts": 0.3}
LAST_RATES = {"flickr": 4.3, "coco": 4.6, "text": 0.8, "clips": 0.25, "words": 0.2, "receipts": 0.15}
LATE_WEIGHTS = WEIGHTS | {"caption": 2.0, "avoid": 4.0}


@dataclass(frozen=True)
class Phase:
    """Composition of the training data from step `start` on.

    rates: samples per source and step of 1,536 tokens. detail: share of photos with a long answer. captions: short
    captions per photo with a long answer; twice as many without. avoid: whether repeated sentences get an
    unlikelihood loss. whole_first: which samples are dropped when a step has too many (see `place`). all_captions:
    share of photos with one caption prompt whose answers are all five captions. cloze: share of photos with only
    cloze questions, drawn before all_captions. mirrored: share of COCO photos that are mirrored, if none of their
    questions mentions left or right.
    """

    start: int
    rates: dict[str, float]
    detail: float
    captions: int
    avoid: bool
    weights: dict[str, float]
    whole_first: bool = False
    all_captions: float = 0.0
    cloze: float = 0.0
    mirrored: float = 0.0


PHASES = (
    Phase(0, FIRST_RATES, 0.85, 1, False, WEIGHTS),
    Phase(232, FIRST_RATES, 0.85, 1, True, WEIGHTS),
    Phase(319, FIRST_RATES, 0.85, 1, True, LATE_WEIGHTS),
    Phase(432, FIRST_RATES, 0.4, 2, True, LATE_WEIGHTS),
    Phase(570, LAST_RATES, 0.3, 2, True, LATE_WEIGHTS),
    Phase(1046, LAST_RATES, 0.3, 2, True, LATE_WEIGHTS, whole_first=True),
    Phase(1373, LAST_RATES | {"flickr": 6.2, "coco": 3.7}, 0.8, 1, True, LATE_WEIGHTS, True, 0.8),
    Phase(2110, LAST_RATES | {"flickr": 6.2, "coco": 3.7}, 0.8, 1, True, LATE_WEIGHTS, True, 0.7, 0.3, 0.5),
)


@dataclass(frozen=True)
class MixConfig:
    """Rows per step and tokens per row, and the phases; rates scale with the number of tokens.

    blind: share of samples whose text does not see the image. one_word: share of questions that request one word.
    """

    rows: int = 3
    length: int = 384
    phases: tuple[Phase, ...] = PHASES
    blind: float = 0.1
    one_word: float = 0.3


def load_captions(data: Path) -> dict[str, list[str]]:
    """Returns the five captions of each photo."""
    captions: dict[str, list[str]] = defaultdict(list)
    for row in read_jsonl(data / "flickr8k" / "captions.jsonl"):
        captions[row["image"]].append(row["text"])
    return captions


def load_questions(data: Path) -> dict[str, list[tuple[str, str]]]:
    """Returns the questions and answers of each COCO photo."""
    questions: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for row in read_jsonl(data / "coco_vqa" / "qa.jsonl"):
        questions[row["image"]].append((row["question"], str(row["answer"])))
    return questions


def absence_weights(facts: Sequence[Facts]) -> dict[str, float]:
    """Returns sampling weights of absent things that balance "yes" and "no" questions about each thing.

    A weight is the number of questions with the answer yes, divided by the number of photos without the thing.
    """
    positive: Counter[str] = Counter()
    lacking: Counter[str] = Counter()
    for f in facts:
        for t in f.present:
            positive[t.name] += 1 / len(f.present)
        lacking.update(t.name for t in f.absent)
    return {t.name: positive[t.name] / (lacking[t.name] + 1) for t in THINGS}


class Mix:
    """Draws packed batches. texts: records of `msd.train.capture`, for text-only turns."""

    def __init__(
        self,
        data: Path,
        features: Path,
        texts: list[dict[str, Any]],
        tokenizer: Any,
        config: MixConfig,
        seed: int = 0,
        split: str = "train",
    ):
        self.tokenizer, self.config, self.seed = tokenizer, config, seed
        self.phases = config.phases if split == "train" else config.phases[:1]  # validation stays comparable
        self.captions, self.questions = load_captions(data), load_questions(data)
        self.texts = [t for t in texts if t["task"] == split]
        names = ("flickr", "coco", "mirrored", "clips", "words", "receipts")
        self.sets = {name: FeatureSet(features, name) for name in names}
        self.mirrored = {r["image"]: i for i, r in enumerate(self.sets["mirrored"].rows)}
        self.pools = {n: [i for i, r in enumerate(s.rows) if r["split"] == split] for n, s in self.sets.items()}
        self.pools["text"] = list(range(len(self.texts)))
        self.facts: dict[str, Facts] = {}
        self.frequency = absence_weights(
            [self._facts(self.sets["flickr"].rows[n]["image"]) for n in self.pools["flickr"]]
        )
        self.clozes = self._all_clozes()
        self.rarity = balanced(self.clozes)
        self._makers: dict[str, Callable[[str, int, random.Random, Phase], Sample]] = {
            "flickr": self._photo, "coco": self._coco, "clips": self._clip, "words": self._word, "receipts": self._line, "text": self._text,
        }  # fmt: skip
        self._orders: dict[tuple[str, int], list[int]] = {}

    def batch(self, step: int) -> Batch:
        """Returns the packed batch of a step, with image features."""
        return self.collate(self.samples(step), self._phase(step).whole_first)

    def samples(self, step: int) -> list[Sample]:
        """Returns the samples of a step before packing."""
        rng, phase = random.Random(f"{self.seed}-{step}"), self._phase(step)
        out = []
        for source in phase.rates:
            for visit in range(self._visits(source, step), self._visits(source, step + 1)):
                sample = self._makers[source](source, self._row(source, visit), rng, phase)
                out.append(replace(sample, blind=bool(sample.pictures) and rng.random() < self.config.blind))
        return out

    def _phase(self, step: int) -> Phase:
        """Returns the phase of a step."""
        return next(p for p in reversed(self.phases) if p.start <= step)

    def _visits(self, source: str, step: int) -> int:
        """Returns how many rows of a source the steps before `step` have drawn."""
        drawn = 0.0
        for phase, end in zip(self.phases, (*(p.start for p in self.phases[1:]), step), strict=True):
            drawn += max(0, min(step, end) - phase.start) * phase.rates[source]
        return int(drawn * (self.config.rows * self.config.length / 1536))

    def collate(self, samples: list[Sample], whole_first: bool = False) -> Batch:
        placed = place(samples, self.config.rows, self.config.length, whole_first)
        batch = pack(placed, self.config.length, END)
        pictures = [self.sets[name].features(row) for name, row in batch.pictures]
        features = torch.cat(pictures).reshape(-1, CELLS, pictures[0].shape[-1]) if pictures else batch.features
        return replace(batch, features=features)

    def _row(self, source: str, visit: int) -> int:
        """Returns the row of a source's `visit`; each epoch has a new order."""
        pool = self.pools[source]
        lap, at = divmod(visit, len(pool))
        if (source, lap) not in self._orders:
            self._orders = {k: v for k, v in self._orders.items() if k[0] != source}
            self._orders[source, lap] = random.Random(f"{self.seed}-{source}-{lap}").sample(pool, len(pool))
        return self._orders[source, lap][at]

    def _facts(self, image: str) -> Facts:
        if image not in self.facts:
            self.facts[image] = extract(self.captions[image])
        return self.facts[image]

    def ids(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer(text, add_special_tokens=False).input_ids)

    def prefix(self, pictures: int) -> tuple[int, ...]:
        """Returns the start of a user turn with placeholders for its image tokens, a line break after each picture."""
        return self.ids("<|im_start|>user\n") + (*([IMAGE] * CELLS), *self.ids("\n")) * pictures

    def branch(self, question: str, answer: str, task: str, phase: Phase, longest: int = 110) -> Branch:
        """Returns a question and its answer; an answer truncated to `longest` tokens has no end token."""
        question_ids = self.ids(f"{question}<|im_end|>\n<|im_start|>assistant\n")
        return Branch(question_ids, (*self.ids(answer), END)[:longest], task, phase.weights[task])

    def _sample(self, source: str, row: int, branches: list[Branch]) -> Sample:
        return Sample(self.prefix(self.sets[source].frames), tuple(branches), ((source, row),))

    def _photo(self, source: str, row: int, rng: random.Random, phase: Phase) -> Sample:
        """Returns a photo's questions. Captions come first: the last branches are dropped when space is short."""
        image = self.sets[source].rows[row]["image"]
        captions, facts = self.captions[image], self._facts(image)
        if phase.cloze and self.clozes.get(image) and rng.random() < phase.cloze:
            questions = draw(self.clozes[image], self.rarity, 5, rng)
            return self._sample(source, row, [self._one_word(q, a, rng, phase) for q, a in questions])
        if phase.all_captions and rng.random() < phase.all_captions:
            question = self.branch(rng.choice(CAPTION_PROMPTS), "", "caption", phase).question
            answers = [self.branch("", tidy(c), "caption", phase) for c in rng.sample(captions, len(captions))]
            prefix = self.prefix(self.sets[source].frames) + question
            return Sample(prefix, tuple(replace(b, question=()) for b in answers), ((source, row),))
        detail = None
        if rng.random() < phase.detail:
            detail_prompt, answer = rng.choice(DETAIL_PROMPTS), long_answer(captions, facts, rng)
            detail = self.branch(detail_prompt, answer, "detail", phase)
            detail = detail if len(detail.answer) >= SHORTEST_DETAIL else None
        short = rng.sample(captions, min(len(captions), phase.captions * (1 if detail else 2)))
        branches = [self.branch(rng.choice(CAPTION_PROMPTS), tidy(c), "caption", phase) for c in short]
        branches += [detail] if detail else []
        presence = yes_no(facts, self.frequency, rng, there=rng.random() < 0.5)
        if presence:
            branches.append(self.branch(*presence, "yesno", phase))
        branches += [
            self.branch(q, a, "question", phase) for q, a in open_questions(facts, rng)[: rng.choice((1, 1, 2))]
        ]
        if detail and phase.avoid and row % 2:
            branches.append(self._repetition(detail_prompt, answer, row, phase))
        return self._sample(source, row, branches)

    def _repetition(self, question: str, answer: str, row: int, phase: Phase) -> Branch:
        """Returns a long answer that repeats a sentence, whose fourth and later words are trained against.

        Usually the first sentence occurs twice in a row; for every third photo, an earlier sentence is repeated later.
        """
        sentences = [f"{s}." for s in answer.rstrip(".").split(". ")]
        last = 0 if row % 3 else row // 3 % len(sentences)
        before, repeated = sentences[: last + 1], sentences[row // 7 % (last + 1)]
        copied = repeated.split(" ")
        opening = f"{question}<|im_end|>\n<|im_start|>assistant\n" + " ".join([*before, *copied[:3]])
        return Branch(
            self.ids(opening), self.ids(" " + " ".join(copied[3:])), "avoid", phase.weights["avoid"], avoid=True
        )

    def _coco(self, source: str, row: int, rng: random.Random, phase: Phase) -> Sample:
        image = self.sets[source].rows[row]["image"]
        questions = list(self.questions[image])
        rng.shuffle(questions)
        branches = [self._one_word(q, a, rng, phase) for q, a in questions[:5]]
        if (
            phase.mirrored
            and rng.random() < phase.mirrored
            and not any(_SIDED.search(f"{q} {a}") for q, a in questions)
        ):
            source, row = "mirrored", self.mirrored[image]
        return self._sample(source, row, branches)

    def _one_word(self, question: str, answer: str, rng: random.Random, phase: Phase) -> Branch:
        suffix = rng.choice(ONE_WORD) if rng.random() < self.config.one_word else ""
        return self.branch(question + suffix, answer, "vqa", phase)

    def _all_clozes(self) -> dict[str, list[Cloze]]:
        """Returns the cloze questions of each train photo; the answers are nouns of COCO's train answers."""
        shown = [self.sets["coco"].rows[i]["image"] for i in self._train("coco")]
        nouns = answer_words(answer for image in shown for _, answer in self.questions[image])
        photos = [self.sets["flickr"].rows[i]["image"] for i in self._train("flickr")]
        return {n: [c for caption in self.captions[n] for c in clozes(caption, nouns)] for n in photos}

    def _train(self, name: str) -> list[int]:
        return [i for i, r in enumerate(self.sets[name].rows) if r["split"] == "train"]

    def _clip(self, source: str, row: int, rng: random.Random, phase: Phase) -> Sample:
        shown = self.sets[source].rows[row]
        captions, motion = self.captions[shown["image"]], MOTION[shown["motion"]]
        branches = [
            self.branch(rng.choice(CLIP_PROMPTS), f"{tidy(rng.choice(captions))} {motion}", "clip", phase),
            self.branch(rng.choice(MOTION_PROMPTS), motion, "clip", phase),
        ]
        if rng.random() < 0.25:
            answer = f"{long_answer(captions, self._facts(shown['image']), rng, sentences=6)} {motion}"
            branches.append(self.branch("Describe the video in detail.", answer, "detail", phase))
        return self._sample(source, row, branches)

    def _word(self, source: str, row: int, rng: random.Random, phase: Phase) -> Sample:
        shown = self.sets[source].rows[row]
        branches = [self.branch(rng.choice(READ_PROMPTS), shown["text"], "read", phase)]
        colour = rng.choice(
            (("What color is the text?", shown["ink"]), ("What color is the background?", shown["ground"]))
        )
        branches.append(self.branch(colour[0], f"{colour[1].capitalize()}.", "question", phase))
        return self._sample(source, row, branches)

    def _line(self, source: str, row: int, rng: random.Random, phase: Phase) -> Sample:
        return self._sample(
            source, row, [self.branch(rng.choice(LINE_PROMPTS), self.sets[source].rows[row]["text"], "read", phase)]
        )

    def _text(self, source: str, row: int, rng: random.Random, phase: Phase) -> Sample:
        turn = self.texts[row]
        question = self.ids(f"{turn['prompt']}<|im_end|>\n<|im_start|>assistant\n")
        answer = (*turn["ids"], END) if turn["finished"] else tuple(turn["ids"])
        return Sample(self.prefix(0), (Branch(question, answer, "text", phase.weights["text"]),))
