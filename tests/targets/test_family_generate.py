"""Every family: the tokens of the model's own `generate()`, greedy and sampled with the same seed.

In float32, without a tolerance for ties: any difference fails, however close the two best tokens are.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

from families import BY_NAME, NAMES
from family import Family, Part
from family_layouts import Picture
from msd.backends import choose
from msd.config import SpeculativeConfig
from msd.drafters import Drafter
from msd.drafters.algorithms.msd import MSD, MSDConfig, MSDNetwork
from msd.errors import UserError
from msd.model import SpeculativeVLM
from msd.result import Result
from random_drafter import RandomDrafter

NEW = 14
SETTINGS: list[dict[str, Any]] = [{"do_sample": False}, {"do_sample": True, "temperature": 0.9, "top_k": 0}]
METHODS = ("prompt-lookup", "msd", "random")


@cache
def model(name: str) -> Any:
    return BY_NAME[name].make()


def contents(family: Family) -> list[list[str]]:
    """The media of each prompt: none, one image, two, and for video families a video alone and one after an image."""
    kind = family.kinds[0]
    videos = [["video"], *([family.mixed[::-1]] if family.mixed else [])] if "video" in family.kinds else []
    sounds = [["audio"], ["image", "audio"]] if family.kinds[-1] == "audio" != kind else []
    return [[], [kind], [kind, kind], *videos, *sounds]


@cache
def alone(name: str, kinds: tuple[str, ...], setting: int, seed: int, words: int = 12) -> list[int]:
    """The answer of `transformers` to one prompt."""
    target, row = model(name), prompt(name, kinds, words)
    torch.manual_seed(seed)
    out = target.generate(**row, **SETTINGS[setting], max_new_tokens=NEW, eos_token_id=None)
    return out[0, row["input_ids"].shape[1] :].tolist()


def parts(name: str, kinds: tuple[str, ...], words: int = 12) -> list[Part]:
    return BY_NAME[name].parts(3, kinds, words)


def prompt(name: str, kinds: tuple[str, ...], words: int = 12) -> dict[str, Any]:
    return BY_NAME[name].row(parts(name, kinds, words))


def drafter(method: str, target: Any, answers: list[list[int]]) -> str | Drafter:
    """prompt-lookup, an `msd` network with random weights, or random trees with a high acceptance rate."""
    if method == "random":
        return RandomDrafter(1, 64, answers)
    if method == "msd":
        sizes = {"hidden": 8, "heads": 1, "kv_heads": 1, "head_dim": 8, "intermediate": 8}
        shape = MSDNetwork(MSDConfig(**sizes, vocabulary=8, draft_vocabulary=8, taps=(0, 1, 2)))  # type: ignore[arg-type]
        return MSD(shape).twin(target)
    return method


def engine(name: str, method: str, answers: list[list[int]], backend: str = "plain") -> SpeculativeVLM:
    return SpeculativeVLM(
        model(name), None, SpeculativeConfig(backend=backend, adaptive=False), drafter(method, model(name), answers)
    )


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", NAMES)
def test_one_prompt(name: str, method: str) -> None:
    accepted = 0
    for kinds in map(tuple, contents(BY_NAME[name])):
        for setting, settings in enumerate(SETTINGS):
            wanted = alone(name, kinds, setting, 5)
            vlm = engine(name, method, [wanted])
            result = vlm.generate(**prompt(name, kinds), **settings, seed=5, max_new_tokens=NEW, eos_token_id=None)
            assert isinstance(result, Result)
            assert result.tokens == wanted, (kinds, settings)
            accepted += result.statistics.num_accepted_draft_tokens
    assert accepted > 0 or method != "random", "no draft was accepted, so the test shows nothing"


def _batch(family: Family) -> list[list[str]]:
    """The media of three rows of one batch."""
    return contents(family)[:3] if family.one_mark else contents(family)[-3:]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", NAMES)
def test_a_left_padded_batch_of_unequal_prompts(name: str, method: str) -> None:
    """Rows with different media."""
    family = BY_NAME[name]
    rows = [(tuple(kinds), words) for kinds, words in zip(_batch(family), (12, 8, 10), strict=True)]
    for setting, settings in enumerate(SETTINGS):
        wanted = [alone(name, kinds, setting, 40 + i, words) for i, (kinds, words) in enumerate(rows)]
        inputs = family.batch([parts(name, kinds, words) for kinds, words in rows])
        vlm = engine(name, method, wanted)
        results = vlm.generate(**inputs, **settings, seed=40, max_new_tokens=NEW, eos_token_id=None)
        assert isinstance(results, list)
        assert [r.tokens for r in results] == wanted


@pytest.mark.parametrize("name", NAMES)
def test_different_media_give_different_answers(name: str) -> None:
    """With the same seed: images and sounds reach the model, and none is confused with another."""
    family = BY_NAME[name]
    vlm = engine(name, "prompt-lookup", [])
    for kinds in contents(family)[1:]:
        shown = family.parts(3, kinds)
        other = [p if isinstance(p, int) else _noise(p, i) for i, p in enumerate(shown)]
        for seed in (5, 6, 7):  # the few tokens of one seed may agree by chance
            one, two = (
                vlm.generate(**family.row(x), **SETTINGS[1], seed=seed, max_new_tokens=NEW, eos_token_id=None)
                for x in (shown, other)
            )
            assert isinstance(one, Result) and isinstance(two, Result)
            assert one.tokens == alone(name, tuple(kinds), 1, seed)
            if one.tokens != two.tokens:
                break
        else:
            pytest.fail(f"{kinds} do not matter")


def _noise(picture: Picture, seed: int) -> Picture:
    """Other content of the same kind and size."""
    noise = torch.randn(picture.data.shape, generator=torch.Generator().manual_seed(seed))
    return Picture(picture.kind, 2 * noise + 1)


@pytest.mark.parametrize("name", NAMES)
def test_an_image_is_encoded_once(name: str) -> None:
    """Also when it occurs later with other images. Not for audio: prefill encodes it."""
    family = BY_NAME[name]
    vlm = engine(name, "prompt-lookup", [])
    if not vlm.target.pictures:
        pytest.skip("this family's models have no argument for cached features")
    for kind in (pictures.modality for pictures in vlm.target.pictures):
        first, second = family.picture(1, kind), family.picture(2, kind)
        vision = vlm.target.vision
        words: list[Part] = [20, 21, 22, 23]

        def encoded(*shown: Part, words: list[Part] = words) -> int:
            """The number of items that a prompt encodes."""
            before = vlm.target.vision.misses
            vlm.generate(**family.row([*shown, *words]), max_new_tokens=2, do_sample=False)
            return vlm.target.vision.misses - before

        vision.clear()
        alone = encoded(second)
        vision.clear()
        assert encoded(first) > 0 and encoded(first) == 0
        if name == "llava_onevision" and kind == "image":  # tiles only without other images: different features
            assert encoded(first, second) == 2
        else:
            assert encoded(first, second) == alone
        assert encoded(second, first) == 0
        assert vision.hits > 0


@pytest.mark.parametrize("name", NAMES)
def test_the_fused_backend_gives_the_same_tokens(name: str) -> None:
    try:
        choose(model(name), "fused")
    except UserError as reason:
        pytest.skip(str(reason))
    kinds = (BY_NAME[name].kinds[0],)
    wanted = alone(name, kinds, 0, 5)
    result = engine(name, "random", [wanted], "fused").generate(
        **prompt(name, kinds), do_sample=False, max_new_tokens=NEW, eos_token_id=None
    )
    assert isinstance(result, Result)
    assert result.tokens == wanted
