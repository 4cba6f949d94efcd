"""The target's own multi-token-prediction layers, trained further: training states are those of decoding."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from family_layouts import WORDS
from msd import formats
from msd.config import SpeculativeConfig
from msd.core.modality import LANGUAGE
from msd.core.tree import Step
from msd.drafters import registry
from msd.drafters.algorithms.mtp import MtpDrafter
from msd.drafters.toolkit import checkpoint
from msd.drafters.toolkit.mtp_network import MtpConfig, MtpNetwork
from msd.errors import UserError
from msd.labels.label_thresholds import ModalityThresholds
from msd.model import SpeculativeVLM
from msd.targets import adapt
from msd.targets import registry as targets
from msd.targets.base import Target
from msd.targets.registry import fingerprint
from msd.targets.teacher import TeacherBatch, run_teacher
from msd.train import drafting, teacher_batches
from msd.train.capture import Captured
from msd.train.teacher_batches import TeacherCache
from mtp_targets import TARGETS, layers_of

LENGTH = 20
TREE = SpeculativeConfig(nodes=12, depth=4, width=3, adaptive=False, backend="plain")
WORDS_ONLY: dict[str, Any] = {
    "do_sample": False, "max_new_tokens": LENGTH, "eos_token_id": None, "suppress_tokens": list(range(WORDS))
}  # fmt: skip


@pytest.fixture(autouse=True)
def families(monkeypatch: pytest.MonkeyPatch) -> None:
    """Adapters for the architectures that have none."""
    for name in TARGETS:
        if name not in targets._FAMILIES:
            monkeypatch.setitem(targets._FAMILIES, name, targets.Family(name, ("image",), Target))


def network_of(model: Any, count: int) -> MtpNetwork:
    text = model.config.get_text_config(decoder=True)
    config = MtpConfig(
        method="mtp", layers=count, hidden=text.hidden_size, vocabulary=text.vocab_size, taps=(text.num_hidden_layers,)
    )
    model.requires_grad_(False)
    return MtpNetwork(config)._take(layers_of(model, count))


def teacher(model: Any, network: MtpNetwork, inputs: dict[str, Any]) -> TeacherBatch:
    """The target's greedy answers, and its outputs for them."""
    answers = model.generate(**inputs, **WORDS_ONLY)[:, inputs["input_ids"].shape[1] :].tolist()
    target = adapt(model, network.config.taps)
    cache = TeacherCache(model.get_output_embeddings(), network.ids, network.config.taps, 0.0, torch.float32)
    labels = torch.full((len(answers), LENGTH), LANGUAGE.id)
    return cache.get(0, lambda: (run_teacher(target, inputs, answers), labels))[0]


@pytest.mark.parametrize(
    ("name", "layers"), [("kimi_k25", 1), ("glm4_moe", 2), ("step3p7", 1), ("step3p7", 3), ("qwen3_5", 1)]
)
def test_it_learns_and_drafts_in_training_as_in_decoding(name: str, layers: int) -> None:
    """Draft probabilities along the answer, at every root and level, in a left-padded batch of three."""
    model, inputs = TARGETS[name].make(layers), TARGETS[name].inputs(3)
    network = network_of(model, layers)
    batch = teacher(model, network, inputs)
    roots = torch.arange(LENGTH - 1).expand(3, -1)
    optimizer = torch.optim.AdamW([p for p in network.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(40):
        loss, _ = network.loss(batch, roots)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]
    assert all(not p.requires_grad or p.grad is None for p in model.parameters()), "the target stays as it is"

    with torch.no_grad():
        depth = min(4, network.config.depth)
        states = network.eval().states(batch, roots, depth)
        q = network.logits(states, roots).softmax(-1)
    compared = [0] * depth
    place = [-1, -1, -1]  # index of each row's newest answer token

    def compare(step: Step) -> None:
        tree, accepted = step.tree, step.accepted
        for row, root in enumerate(place):
            node = 0
            for d in range(depth) if root < LENGTH - 1 and tree.size > 1 else ():
                if root + d + 1 >= LENGTH:
                    break
                wanted = batch.answers[row, root + d + 1]
                children = (tree.parents[row] == node) & tree.valid[row] & (tree.tokens[row] == wanted)
                children[0] = False
                if not children.any():
                    break
                node = int(children.nonzero()[0])
                assert float(tree.q[row, node]) == pytest.approx(float(q[row, root, d, wanted]), rel=1e-4, abs=1e-6)
                compared[d] += 1
            place[row] += len(accepted.tokens[row])

    engine = SpeculativeVLM(model, None, TREE, MtpDrafter(network.whole))
    results = engine.generate(**inputs, **WORDS_ONLY, on_step=compare)
    assert [r.tokens for r in results] == batch.answers.tolist()
    assert min(compared[:2]) > 3 and (depth == 2 or compared[2]), compared


def checkpoint_with_layers(folder: Path, count: int) -> Any:
    """A GLM-4 checkpoint with multi-token-prediction layers, loaded."""
    model = TARGETS["glm4_moe"].make(count)
    layers = layers_of(model, count)
    model.save_pretrained(folder)
    stored = load_file(folder / "model.safetensors")
    for name, weight in layers.state_dict().items():
        if name.startswith("layers."):
            number, rest = name.split(".", 2)[1:]
            stored[f"model.layers.{3 + int(number)}.{rest.replace('mtp_block.', '')}"] = weight.clone()
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    type(model)._keys_to_ignore_on_load_unexpected = [r"layers\.[34]\."]
    return type(model).from_pretrained(folder, dtype=torch.float32)


@pytest.mark.parametrize("layers", [1, 2])
def test_a_native_head_becomes_a_drafter_of_ours(layers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`--start mtp`: stopped and resumed, saved in a folder, certified, refused for another target, trained again."""
    monkeypatch.setattr(type(TARGETS["glm4_moe"].make(1)), "_keys_to_ignore_on_load_unexpected", None)
    model = checkpoint_with_layers(tmp_path / "target", layers)
    inputs = TARGETS["glm4_moe"].inputs(3)
    prompts = {f"prompt {row}": {k: v[row : row + 1] for k, v in inputs.items()} for row in range(3)}

    def prepare(processor: Any, media: Any, texts: list[str], **_: Any) -> dict[str, Any]:
        return {k: torch.cat([prompts[text][k] for text in texts]) for k in inputs}

    monkeypatch.setattr(teacher_batches.prompts, "prepare", prepare)
    answers = model.generate(**inputs, **WORDS_ONLY)[:, inputs["input_ids"].shape[1] :].tolist()
    captured = [
        Captured((), f"prompt {row}", tuple(ids), (0.0,) * len(ids), "text", "train") for row, ids in enumerate(answers)
    ]
    thresholds = ModalityThresholds(language_max=0.1, vision_min=0.2, tokens=60, target=fingerprint(model))
    settings = drafting.DraftTraining(
        method="mtp", start="mtp", steps=12, batch=3, lr=1e-2, precision="float32", evaluate_every=100
    )

    def run(out: Path, settings: drafting.DraftTraining) -> dict[str, Any]:
        assert drafting.train(model, None, captured, captured, thresholds, out, settings)
        return checkpoint.training(out / "drafter")

    record = run(tmp_path / "half", replace(settings, steps=6))
    whole = run(tmp_path / "whole", settings)
    assert record["losses"]["first"] > whole["losses"]["first"], "it learns"
    assert whole["held_out"]["acceptance"] > 0 and whole["calibration"]
    resumed = run(tmp_path / "half", settings)
    assert resumed["steps"] == 12

    folder = tmp_path / "whole" / "drafter"
    assert formats.check(folder, target=model.config).faults == []
    monkeypatch.setattr(registry, "_METHODS", {})
    assert formats.register_folder(folder) == "mtp"
    trained = SpeculativeVLM(model, None, TREE, "mtp")
    results = trained.generate(**inputs, **WORDS_ONLY)
    assert [r.tokens for r in results] == answers
    native = SpeculativeVLM(model, None, TREE, MtpDrafter()).generate(**inputs, **WORDS_ONLY)
    accepted = lambda rs: sum(r.statistics.num_accepted_draft_tokens for r in rs)  # noqa: E731
    assert accepted(results) > accepted(native)

    again = run(tmp_path / "again", replace(settings, start=str(folder), steps=2))
    assert again["before"]["steps"] == 12
    other = TARGETS["step3p7"].make(layers)
    with pytest.raises(UserError, match=r"was trained for a target with|tensor '.*' (is|has shape)"):
        SpeculativeVLM(other, None, TREE, MtpDrafter(MtpNetwork.in_folder(folder)))


def test_a_damaged_folder_is_refused(tmp_path: Path) -> None:
    model = TARGETS["glm4_moe"].make(1)
    checkpoint.save(network_of(model, 1), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "layers.0.eh_proj.weight"
    faults = [
        ("missing", {}),
        ("has shape", {name: tensors[name][1:].clone()}),
        ("unknown", {"extra": tensors[name].clone()}),
    ]
    for problem, change in faults:
        kept = tensors | change
        if not change:
            del kept[name]
        save_file(kept, tmp_path / "model.safetensors")
        with pytest.raises(UserError, match=problem):
            MtpNetwork.in_folder(tmp_path).attach(model)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"hidden": 64}))
    with pytest.raises(UserError, match="hidden size 64"):
        MtpNetwork.in_folder(tmp_path).attach(model)


def test_without_a_start_it_is_refused() -> None:
    with pytest.raises(UserError, match="method 'mtp' is trained from the layers that a target brings: --start mtp"):
        drafting.DraftTraining(method="mtp")
