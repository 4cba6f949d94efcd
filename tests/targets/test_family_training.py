"""Every family: a drafter is trained, saved, loaded and used; answers remain those of the target."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from families import BY_NAME, NAMES
from family_layouts import VOCABULARY, WORDS
from family_processor import FamilyProcessor, photos
from msd.config import SpeculativeConfig
from msd.drafters import registry
from msd.drafters.algorithms.msd import MSD, SWITCHES
from msd.inputs.prompts import prepare
from msd.labels.gain import image_gain
from msd.labels.label_thresholds import ModalityThresholds
from msd.model import SpeculativeVLM
from msd.result import Result
from msd.targets import adapt
from msd.targets.taps import final_norm, output_layer, text_decoder
from msd.train.capture import Captured
from msd.train.drafting import DraftTraining, initial_network, train
from msd.train.teacher_batches import Stages

SETTINGS = DraftTraining(
    steps=4, batch=2, anchors=4, draft_vocabulary=48, precision="float32", stages=Stages(1, 1, 0.2), evaluate_every=4
)


def answers(name: str, folder: Path) -> list[Captured]:
    """Answers about one image, two and none; only about none where the family does not support images."""
    family = BY_NAME[name]
    paths = photos(family, folder, 4) if "image" in family.kinds else []
    shown = [tuple(paths[:1]), tuple(paths[1:3]), (), tuple(paths[3:]), (), tuple(paths[2:4])]
    rng = random.Random(1)
    found = []
    for i, images in enumerate(shown):
        ids = tuple(rng.randrange(WORDS, VOCABULARY) for _ in range(6 + i))
        gain = tuple(rng.random() if images else 0.0 for _ in ids)
        found.append(Captured(images, f"what is {i}", ids, gain, "vqa", "train"))
    return found


@pytest.mark.parametrize("parts", [None, SWITCHES], ids=["default", "all"])
@pytest.mark.parametrize("name", NAMES)
def test_a_trained_drafter_is_saved_loaded_and_used(name: str, parts: tuple[str, ...] | None, tmp_path: Path) -> None:
    settings = replace(SETTINGS, parts=parts)
    family = BY_NAME[name]
    model, processor, captured = family.make(), FamilyProcessor(family), answers(name, tmp_path)
    thresholds = ModalityThresholds(language_max=0.3, vision_min=0.7, tokens=10, target="tiny-0")
    assert train(model, processor, captured, captured[:3], thresholds, tmp_path / "run", settings)
    network = registry.load(tmp_path / "run" / "drafter")
    fresh = initial_network(adapt(model, backend="plain"), captured, settings)
    moved = [n for n, p in network.named_parameters() if not torch.equal(p, fresh.state_dict()[n])]
    assert "fuse.weight" in moved
    assert ("image_fc.weight" in moved) == (parts is not None and "image" in family.kinds)
    vlm = SpeculativeVLM(model, processor, SpeculativeConfig(backend="plain", adaptive=False), MSD(network))
    images = list(captured[1].images)
    inputs = prepare(processor, [images], ["what is it"])
    wanted = model.generate(**inputs, do_sample=False, max_new_tokens=12, eos_token_id=None)
    result = vlm.generate(images, "what is it", do_sample=False, max_new_tokens=12, eos_token_id=None)
    assert isinstance(result, Result)
    assert result.tokens == wanted[0, inputs["input_ids"].shape[1] :].tolist()
    assert result.statistics.num_draft_tokens > 0


@pytest.mark.parametrize("name", NAMES)
def test_an_untrained_head_gives_the_targets_logits(name: str) -> None:
    """The draft head's norm and weights are those of the target, for each family's kind of norm."""
    model = BY_NAME[name].make()
    norm, state = final_norm(text_decoder(model)), torch.randn(3, 32)
    if torch.allclose(norm(state + 1), norm(state), atol=1e-4):
        pytest.skip("this family's norm subtracts the mean; that of the draft head does not")
    some = [Captured((), "", tuple(range(WORDS, 40)), (0.0,) * 31, "text", "train")]
    network = initial_network(adapt(model, backend="plain"), some, SETTINGS)
    state = torch.randn(3, 32)
    with torch.no_grad():
        own = output_layer(model)(final_norm(text_decoder(model))(state))[:, network.heads.ids]
        ours = network.heads.head(network.heads.norm(state))
    assert (own - ours).abs().max() <= 1e-3 * own.abs().max()


@pytest.mark.parametrize("name", NAMES)
def test_image_gain(name: str) -> None:
    """The label of `msd capture`: zero without an image, positive with one."""
    family = BY_NAME[name]
    kind = family.kinds[0]
    target = adapt(family.make(), backend="plain")
    rows = [family.parts(1, [kind]), family.parts(2, []), family.parts(3, [kind, kind])]
    with_one, without, with_two = image_gain(target, family.batch(rows), [[20, 21], [22], [23, 24, 25]])
    assert bool((with_one > 0).all()) and bool((with_two > 0).all())
    assert without.tolist() == [0.0]
