"""Image gain: a padded batch equals single rows, masked images equal text alone, thresholds are percentiles."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tiny
from msd.core.modality import FUSION, LANGUAGE, VISION
from msd.errors import UserError
from msd.labels.gain import assert_images_matter, image_columns, image_gain
from msd.labels.label_thresholds import ModalityThresholds
from msd.targets import Target, adapt
from msd.targets.registry import fingerprint
from msd.targets.teacher import run_teacher

PROMPTS = [
    tiny.llava_inputs(seed=1, images=1, words=6),
    tiny.llava_inputs(seed=2, images=0, words=9),
    tiny.llava_inputs(seed=3, images=2, words=14),
]
ANSWERS = [[5, 9, 11, 2], [7], [8, 8, 40, 17, 33, 2]]


def target(seed: int = 0) -> Target:
    return adapt(tiny.llava(seed=seed, sharpness=5.0))


@torch.no_grad()
def without_picture(model: Any, inputs: dict[str, Tensor], answer: list[int]) -> Tensor:
    """[T, V]: the language model alone on the text columns, at the positions they had beside the image."""
    ids = torch.cat([inputs["input_ids"], torch.tensor([answer])], 1)
    kept = (ids[0] != tiny.IMAGE).nonzero()[:, 0]
    hidden = model.model.language_model(input_ids=ids[:, kept], position_ids=kept[None]).last_hidden_state
    return model.lm_head(hidden)[0, -len(answer) - 1 : -1]


@torch.no_grad()
def gain_by_hand(model: Any, inputs: dict[str, Tensor], answer: list[int]) -> Tensor:
    """KL token by token and word by word of the vocabulary, from two plain runs of one prompt."""
    ids = torch.cat([inputs["input_ids"], torch.tensor([answer])], 1)
    seen = {k: v for k, v in inputs.items() if k == "pixel_values"}
    with_picture = model(input_ids=ids, **seen).logits[0, -len(answer) - 1 : -1]
    gains = []
    for one, two in zip(with_picture, without_picture(model, inputs, answer), strict=True):
        p, q = one.double().softmax(0), two.double().softmax(0)
        gains.append(sum(float(a) * float((a / b).log()) for a, b in zip(p, q, strict=True)))
    return torch.tensor(gains, dtype=torch.float64)


def test_hidden_images_leave_the_text_without_its_picture() -> None:
    teacher = target()
    inputs = tiny.batch(*PROMPTS)
    teacher_batch = run_teacher(teacher, inputs, ANSWERS, image_columns(teacher, inputs["input_ids"]))
    for row, (inputs, answer) in enumerate(zip(PROMPTS, ANSWERS, strict=True)):
        expected = without_picture(teacher.model, inputs, answer)
        torch.testing.assert_close(teacher_batch.logits[row, : len(answer)], expected, atol=1e-4, rtol=1e-4)


def test_gain_of_a_padded_batch_is_that_of_plain_single_runs() -> None:
    teacher = target()
    gains = image_gain(teacher, tiny.batch(*PROMPTS), ANSWERS)
    for inputs, answer, gain in zip(PROMPTS, ANSWERS, gains, strict=True):
        assert gain.shape == (len(answer),) and gain.dtype == torch.float64
        torch.testing.assert_close(gain, gain_by_hand(teacher.model, inputs, answer), atol=1e-5, rtol=1e-4)
    assert gains[0].min() > 1e-3 and gains[1].tolist() == [0.0]


def test_prompts_without_images_have_no_gain() -> None:
    assert image_gain(target(), PROMPTS[1], [[7, 9]])[0].tolist() == [0.0, 0.0]


def test_answers_that_cannot_be_taught_are_refused() -> None:
    with pytest.raises(UserError, match="placeholder"):
        image_gain(target(), PROMPTS[0], [[7, tiny.IMAGE]])
    with pytest.raises(UserError, match="without tokens"):
        image_gain(target(), PROMPTS[0], [[]])


def test_a_target_that_its_images_do_not_reach_is_refused() -> None:
    teacher = target()
    assert_images_matter(teacher, tiny.batch(*PROMPTS), ANSWERS)
    with pytest.raises(UserError, match="no pixels"):
        assert_images_matter(teacher, PROMPTS[1], [[7]])
    with torch.no_grad():
        for parameter in teacher.model.model.multi_modal_projector.parameters():
            parameter.zero_()
    teacher.vision.clear()
    with pytest.raises(UserError, match="does not change with its images"):
        assert_images_matter(teacher, tiny.batch(*PROMPTS), ANSWERS)


def test_thresholds_are_the_percentiles_and_ties_are_decided() -> None:
    thresholds = ModalityThresholds.fit([torch.arange(6.0), [6.0, 7.0, 8.0, 9.0, 10.0]], "t")
    assert (thresholds.language_max, thresholds.vision_min, thresholds.tokens) == (5.0, 8.0, 11)
    labels = thresholds.labels([0.0, 5.0, 5.0001, 7.9999, 8.0, 20.0])
    assert labels.dtype == torch.int64
    assert labels.tolist() == [LANGUAGE.id, LANGUAGE.id, FUSION.id, FUSION.id, VISION.id, VISION.id]
    same = ModalityThresholds.fit([[0.0, 1.0, 1.0, 1.0, 1.0]], "t")
    assert same.labels([0.5, 1.0, 1.5]).tolist() == [LANGUAGE.id, LANGUAGE.id, VISION.id]
    assert ModalityThresholds.fit([[0.0, 0.0]], "t").labels([0.0]).tolist() == [LANGUAGE.id], "no image, no vision"
    with pytest.raises(UserError, match="no answer token"):
        ModalityThresholds.fit([[], []], "t")


def test_thresholds_come_back_from_their_file(tmp_path: Path) -> None:
    thresholds = ModalityThresholds.fit([[0.1, 0.25, 3.0]], "llava-1")
    thresholds.save(tmp_path / "cuts.json")
    assert ModalityThresholds.load(tmp_path / "cuts.json") == thresholds
    thresholds.check_target("llava-1")
    with pytest.raises(UserError, match="llava-2"):
        thresholds.check_target("llava-2")


GOOD = {"language_max": 0.1, "vision_min": 0.5, "tokens": 10, "target": "t"}


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ("{", "JSON"),
        (json.dumps({**GOOD, "extra": 1}), "extra"),
        (json.dumps({k: v for k, v in GOOD.items() if k != "tokens"}), "tokens"),
        (json.dumps({**GOOD, "language_max": "0.1"}), "language_max"),
        (json.dumps({**GOOD, "language_max": 0.7}), "above"),
        (json.dumps({**GOOD, "vision_min": float("nan")}), "vision_min"),
    ],
)
def test_bad_thresholds_are_one_clear_line(tmp_path: Path, content: str, part: str) -> None:
    (tmp_path / "cuts.json").write_text(content)
    with pytest.raises(UserError, match=part):
        ModalityThresholds.load(tmp_path / "cuts.json")
    with pytest.raises(UserError, match="cannot read"):
        ModalityThresholds.load(tmp_path / "none.json")


def test_a_fingerprint_knows_the_weights_not_their_precision() -> None:
    one = fingerprint(tiny.llava())
    assert one == fingerprint(tiny.llava()) == fingerprint(tiny.llava().to(torch.bfloat16))
    assert one != fingerprint(tiny.llava(seed=1)) and one.startswith("llava-")
