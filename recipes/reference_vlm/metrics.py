"""Scores generated text: CIDEr and BLEU, VQA exact match, yes/no balance, repetition. Strings in, numbers out."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

_ARTICLES = {"a", "an", "the"}
_NUMBERS = {
    "none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5",
    "six": "6", "seven": "7", "eight": "8", "nine": "9", "ten": "10",
}  # fmt: skip


def plain_words(text: str) -> str:
    """Returns lower-case words of letters and digits only: the tokens that CIDEr and BLEU compare."""
    return " ".join(re.findall(r"[a-z0-9]+", text.lower()))


def caption_scores(references: Mapping[str, Sequence[str]], answers: Mapping[str, str]) -> dict[str, float]:
    """Returns CIDEr (Vedantam et al. 2015) and BLEU-1..4 of one answer per picture against its references.

    Uses pycocoevalcap on `plain_words`, without its Java tokenizer. CIDEr's document frequencies come from the given
    references. Raises ValueError if a picture has an answer but no reference.
    """
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider

    if missing := answers.keys() - references.keys():
        raise ValueError(f"no references for {sorted(missing)[:3]}")
    refs = {k: [plain_words(r) for r in references[k]] for k in answers}
    hyps = {k: [plain_words(a)] for k, a in answers.items()}
    cider, _ = Cider().compute_score(refs, hyps)
    bleu, _ = Bleu(4).compute_score(refs, hyps, verbose=0)
    return {"cider": float(cider), **{f"bleu{n}": float(b) for n, b in enumerate(bleu, 1)}}


def vqa_normalised(answer: str) -> str:
    """Normalises an answer as VQA does: lower case, no punctuation or articles, number words as digits."""
    text = re.sub(r"(?<=\d),(?=\d)", "", answer.lower().strip())
    text = re.sub(r"[^a-z0-9.' ]+", " ", text)
    text = re.sub(r"(?<!\d)\.|\.(?!\d)", " ", text).replace("'", "")
    return " ".join(_NUMBERS.get(w, w) for w in text.split() if w not in _ARTICLES)


def exact_match(answers: Sequence[str], truths: Sequence[str]) -> float:
    """Returns the share of answers equal to the truth after `vqa_normalised`."""
    pairs = list(zip(answers, truths, strict=True))
    return sum(vqa_normalised(a) == vqa_normalised(t) for a, t in pairs) / max(1, len(pairs))


def yes_no(answer: str) -> str | None:
    """Returns the answer's first word if it is "yes" or "no", else None."""
    first = plain_words(answer).split()[:1]
    return first[0] if first and first[0] in ("yes", "no") else None


def yes_no_scores(answers: Sequence[str], truths: Sequence[str]) -> dict[str, float]:
    """Returns the accuracy, also for each truth, the share of "yes", and the share of other answers."""
    predicted = [yes_no(a) for a in answers]
    pairs = list(zip(predicted, truths, strict=True))

    def accuracy(pairs: list[tuple[str | None, str]]) -> float:
        return sum(s == t for s, t in pairs) / max(1, len(pairs))

    return {
        "accuracy": accuracy(pairs),
        "accuracy_yes": accuracy([p for p in pairs if p[1] == "yes"]),
        "accuracy_no": accuracy([p for p in pairs if p[1] == "no"]),
        "said_yes": sum(s == "yes" for s in predicted) / max(1, len(predicted)),
        "neither": sum(s is None for s in predicted) / max(1, len(predicted)),
    }


def ngram_repetition(text: str, n: int = 8) -> float:
    """Returns the share of a text's word n-grams that occurred before in the text."""
    w = plain_words(text).split()
    grams = [tuple(w[i : i + n]) for i in range(len(w) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def repeats_sentence(text: str) -> bool:
    """Returns whether a sentence occurs twice."""
    sentences = [plain_words(s) for s in re.split(r"[.!?]+(?:\s|$)", text)]
    sentences = [s for s in sentences if s]
    return len(set(sentences)) < len(sentences)


def repetition_scores(texts: Sequence[str], lengths: Sequence[int]) -> dict[str, float]:
    """Returns, for long answers, the pooled share of repeated 8-grams, the share of answers with a repeated sentence,
    the mean number of tokens, and the share of distinct answers.
    """
    repeated, total = 0, 0
    for text in texts:
        count = max(0, len(plain_words(text).split()) - 7)
        repeated += round(ngram_repetition(text) * count)
        total += count
    return {
        "repeated_8grams": repeated / max(1, total),
        "repeated_sentence": sum(map(repeats_sentence, texts)) / max(1, len(texts)),
        "mean_tokens": sum(lengths) / max(1, len(lengths)),
        "distinct": len(set(texts)) / max(1, len(texts)),
    }
