"""Turns of a conversation reuse the common prefix, and their answers equal those of fresh requests."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from families import BY_NAME, NAMES
from family import Family, Part
from family_layouts import AUDIO, IMAGE, VIDEO, WORDS, Picture
from family_processor import FamilyProcessor, photos
from msd.config import SpeculativeConfig
from msd.drafters import Drafter
from msd.drafters.algorithms.msd import MSD, MSDConfig, MSDNetwork
from msd.errors import UserError
from msd.model import SpeculativeVLM
from msd.result import Result
from msd.targets import Past, State
from msd.targets.bidirectional import Molmo2
from msd.targets.recurrent import Recurrent

PLACEHOLDERS = {IMAGE, VIDEO, AUDIO}
WORDS_ONLY: dict[str, Any] = {
    "do_sample": False, "max_new_tokens": 8, "eos_token_id": None, "suppress_tokens": list(range(WORDS)),
}  # fmt: skip


@cache
def model(name: str) -> Any:
    return BY_NAME[name].make()


def engine(name: str, method: str = "prompt-lookup") -> SpeculativeVLM:
    drafter: str | Drafter = method
    if method == "msd":
        sizes: dict[str, Any] = {"hidden": 8, "heads": 1, "kv_heads": 1, "head_dim": 8, "intermediate": 8}
        drafter = MSD(MSDNetwork(MSDConfig(**sizes, vocabulary=8, draft_vocabulary=8, taps=(0, 1, 2)))).twin(
            model(name)
        )
    config = SpeculativeConfig(backend="plain", adaptive=False)
    return SpeculativeVLM(model(name), FamilyProcessor(BY_NAME[name]), config, drafter)


def shared(before: list[int], now: list[int]) -> int:
    """Reusable columns: the common prefix without the last column, with whole runs of placeholders only."""
    n = 0
    while n < min(len(before), len(now) - 1) and before[n] == now[n]:
        n += 1
    while n > 0 and now[n] in PLACEHOLDERS and now[n - 1] in PLACEHOLDERS:
        n -= 1
    return n


def fresh(name: str, row: dict[str, Any], **settings: Any) -> list[int]:
    out = model(name).generate(**row, **(WORDS_ONLY | settings))
    return out[0, row["input_ids"].shape[1] :].tolist()


def generate(vlm: SpeculativeVLM, row: dict[str, Any], past: Past | None, **settings: Any) -> Result:
    result = vlm.generate(**row, **(WORDS_ONLY | settings), past=past)
    assert isinstance(result, Result)
    return result


def conversation(family: Family) -> list[list[Part]]:
    """The parts that each of four turns adds: an image, text, another image, text."""
    kind = family.kinds[0]
    if family.opens:  # images precede the text
        return [family.parts(1, [kind]), [20, 21, 22], [30, 31, 32, 33], [40, 41]]
    return [family.parts(1, [kind]), [20, 21, 22], [family.picture(8, kind), 30, 31], [40, 41]]


@pytest.mark.parametrize("method", ["prompt-lookup", "msd"])
@pytest.mark.parametrize("name", NAMES)
def test_four_turns(name: str, method: str) -> None:
    family, vlm, past = BY_NAME[name], engine(name, method), Past()
    parts: list[Part] = []
    before: list[int] = []
    vision = vlm.target.vision
    for turn, more in enumerate(conversation(family)):
        parts = [*parts, *more]
        row = family.row(parts)
        ids = row["input_ids"][0].tolist()
        seen = vision.misses
        result = generate(vlm, row, past)
        assert result.tokens == fresh(name, row), f"turn {turn}"
        expected = 0 if family.opens else shared(before, ids)
        if name == "llava_onevision" and turn == 2:  # with a second image the first is no longer cut into tiles
            expected = ids.index(IMAGE)
        if name == "molmo2" and turn == 2:  # the first image attends to the second
            expected = 0
        assert result.statistics.num_prefill_rows == len(ids) - expected
        if turn in (1, 3):
            assert vision.misses == seen, "nothing is encoded again"
            assert family.opens or result.statistics.num_prefill_rows == 1 + len(more), "the new tokens, and one more"
        before = [*ids, *result.tokens[:-1]]
        parts = [*parts, *result.tokens]


@pytest.mark.parametrize("method", ["prompt-lookup", "msd"])
@pytest.mark.parametrize("name", NAMES)
def test_drafts_of_a_later_turn_are_those_of_a_fresh_request(name: str, method: str) -> None:
    """The drafter has the whole conversation, too: equally many drafts are accepted."""
    family, past = BY_NAME[name], Past()
    parts = family.parts(1, [family.kinds[0]])
    vlm = engine(name, method)
    answer = generate(vlm, family.row(parts), past)
    row = family.row([*parts, *answer.tokens, 20, 21, 22])
    later, new = generate(vlm, row, past), generate(vlm, row, None)
    assert later.tokens == new.tokens
    assert later.statistics.steps == new.statistics.steps
    assert later.statistics.num_draft_tokens == new.statistics.num_draft_tokens
    assert later.statistics.num_draft_tokens > 0 or method == "prompt-lookup"


@torch.inference_mode()
@pytest.mark.parametrize("name", NAMES)
def test_a_changed_image_is_detected(name: str) -> None:
    """The ids are equal; all columns from the changed image on are computed again, or all where no state is at it."""
    family, target = BY_NAME[name], engine(name).target
    kind = family.kinds[0]
    parts = family.parts(1, [kind, kind])
    last = max(i for i, p in enumerate(parts) if isinstance(p, Picture))
    other = parts[last]
    assert isinstance(other, Picture)
    changed = [*parts[:last], Picture(kind, other.data.flip(-1) * 2 + 1), *parts[last + 1 :]]

    def prefill(shown: list[Part], past: State | None) -> tuple[State, Tensor]:
        inputs = target.encode_images(family.row(shown))
        state, scores = target.prefill(inputs.pop("input_ids"), inputs, 128, past, keep=True)
        return state, scores.logits[0, -1]

    first, before = prefill(parts, None)
    later, logits = prefill(changed, first)
    anew, wanted = prefill(changed, None)
    assert (logits - wanted).abs().max() <= 1e-4
    assert (logits - before).abs().max() > 1e-3
    ids = family.row(changed)["input_ids"][0].tolist()
    runs = [i for i, t in enumerate(ids) if t in PLACEHOLDERS and (i == 0 or ids[i - 1] not in PLACEHOLDERS)]
    kept = 0 if family.opens or isinstance(target, (Recurrent, Molmo2)) else runs[_first_run(family, other, len(runs))]
    assert later.prefilled == len(ids) - kept
    assert anew.prefilled == first.prefilled == len(ids)


def _first_run(family: Family, picture: Picture, runs: int) -> int:
    """Index of the first run of placeholders that belongs to the last image."""
    own = family.place(picture, False)
    return runs - sum(t in PLACEHOLDERS and (i == 0 or own[i - 1] not in PLACEHOLDERS) for i, t in enumerate(own))


@torch.inference_mode()
def test_a_run_of_placeholders_is_reused_whole_or_not_at_all() -> None:
    """A new image directly after an old one: in some models the two attend to each other."""
    family, target = BY_NAME["llava"], engine("llava").target
    one, two = family.picture(1), family.picture(2)

    def prefill(shown: list[Part], past: State | None) -> tuple[State, Tensor]:
        inputs = target.encode_images(family.row(shown))
        state, scores = target.prefill(inputs.pop("input_ids"), inputs, 64, past, keep=True)
        return state, scores.logits

    first, _ = prefill([20, 21, one, 22, 23], None)
    later, logits = prefill([20, 21, one, two, 24], first)
    assert later.prefilled == 4 + 4 + 1
    assert (logits - prefill([20, 21, one, two, 24], None)[1]).abs().max() <= 1e-4


def test_a_shorter_prompt_and_the_same_prompt() -> None:
    name = "qwen2_vl"
    family, past, vlm = BY_NAME[name], Past(), engine(name, "msd")
    row = family.row(family.parts(1, ["image"]))
    first = generate(vlm, row, past)
    again = generate(vlm, row, past)
    assert again.tokens == first.tokens
    assert again.statistics.num_prefill_rows == 1
    other = family.row(family.parts(1, ["image"])[:-4])
    assert generate(vlm, other, past).tokens == fresh(name, other)


def test_the_state_of_another_drafter_or_model_is_not_reused() -> None:
    family, past = BY_NAME["llava"], Past()
    row = family.row(family.parts(1, ["image"]))
    length = row["input_ids"].shape[1]
    generate(engine("llava"), row, past)
    assert generate(engine("llava", "msd"), row, past).statistics.num_prefill_rows == length
    assert generate(engine("llava", "msd"), row, past).statistics.num_prefill_rows == 1
    assert generate(engine("video_llava", "msd"), row, past).statistics.num_prefill_rows == length


def test_a_conversation_is_one_prompt_at_a_time() -> None:
    family = BY_NAME["llava"]
    rows = family.batch([family.parts(1, ["image"]), family.parts(2, [])])
    with pytest.raises(UserError, match="one prompt at a time, got 2"):
        engine("llava").generate(**rows, past=Past(), max_new_tokens=2)


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "gemma3", "idefics3", "paligemma"])
def test_chat(name: str, tmp_path: Path) -> None:
    """Three turns through `vlm.chat()`: an answer, a question about it, another image."""
    family, vlm = BY_NAME[name], engine(name, "msd")
    one, two = photos(family, tmp_path, 2)
    chat = vlm.chat()
    rows, encoded, texts = [], [], []
    for prompt, images in (("what", one), ("why", None), ("and", [two])):
        result = chat.say(prompt, images, **WORDS_ONLY)
        rows.append(result.statistics.num_prefill_rows)
        encoded.append(vlm.target.vision.misses)
        texts.append(result.text)
        again = engine(name).generate(chat.images, messages=chat.messages[:-1], **WORDS_ONLY)
        assert isinstance(again, Result)
        assert result.tokens == again.tokens
    assert encoded[0] == encoded[1] < encoded[2]
    assert family.opens or rows[1] < rows[0] / 2
    assert [m["role"] for m in chat.messages] == ["user", "assistant"] * 3
    assert [m["content"][0]["text"] for m in chat.messages[1::2]] == texts


def test_a_failed_turn_does_not_change_the_chat(tmp_path: Path) -> None:
    family = BY_NAME["llava"]
    chat = engine("llava").chat()
    first = chat.say("what", photos(family, tmp_path, 1), **WORDS_ONLY)
    for prompt, settings in (
        ("<image>", {}),
        (" ", {}),
        ("why", {"num_beams": 2}),
        ("why", {"num_return_sequences": 2}),
    ):
        with pytest.raises(UserError):
            chat.say(prompt, **(WORDS_ONLY | settings))
    assert len(chat.messages) == 2 and len(chat.images) == 1
    second = chat.say("why", **WORDS_ONLY)
    assert second.statistics.num_prefill_rows < first.statistics.num_prefill_rows
    chat.reset()
    assert chat.say("what", photos(family, tmp_path, 1), **WORDS_ONLY).tokens == first.tokens


def test_a_streamed_turn(tmp_path: Path) -> None:
    family = BY_NAME["llava"]
    chat, other = engine("llava").chat(), engine("llava").chat()
    for prompt, images in (("what", photos(family, tmp_path, 1)), ("why", None)):
        stream = chat.stream(prompt, images, **WORDS_ONLY)
        text = "".join(stream)
        assert text == stream.result.text == other.say(prompt, images, **WORDS_ONLY).text
    assert chat.messages == other.messages
