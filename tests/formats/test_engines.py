"""Heads for vLLM and SGLang: what is written is read back the same, and every fault is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from recipes.scale.conventions import measure
from safetensors.torch import load_file, save_file
from torch import Tensor

import families
import rivals
import tiny
import tiny_checkpoint
from msd import formats
from msd.drafters import registry
from msd.drafters.toolkit import checkpoint
from msd.drafters.toolkit.variant import Variant
from msd.errors import UserError
from msd.loading import load_target
from msd.targets import adapt
from msd.targets.teacher import run_teacher
from msd.train.drafting import DraftTraining
from published_layouts import LAYOUTS
from training_command import run, train

LAYOUT = {layout.name: layout for layout in LAYOUTS}
FILES = ("config.json", "model.safetensors")
FOR = [(to, method) for to in ("vllm", "sglang") for method in ("eagle3", "dflash")]


def trained(folder: Path, method: str, **variant: Any) -> Path:
    """A head that was trained here, with random weights."""
    network = rivals.network(tiny.llava(), method)
    network.config = replace(network.config, variant=replace(network.config.variant, **variant))
    checkpoint.save(network, folder)
    return folder


def exported(folder: Path, to: str, method: str, **variant: Any) -> Path:
    formats.export(trained(folder / "own", method, **variant), to, folder / to)
    return folder / to


@pytest.mark.parametrize(("to", "method"), FOR)
def test_a_head_is_written_read_and_written_again(to: str, method: str, tmp_path: Path) -> None:
    """To the byte; and the network that is read has the tensors of the one that was written."""
    first = exported(tmp_path, to, method)
    formats.export(first, to, tmp_path / "again")
    for file in FILES:
        assert (first / file).read_bytes() == (tmp_path / "again" / file).read_bytes()
    one, two = registry.load(tmp_path / "own").state_dict(), formats.load(first).state_dict()
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    found = formats.check(first, to)
    assert found.faults == [] and formats.ENGINES[to].title in found.engines


def test_commands(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """By default the shipped EAGLE-3 head; the command says what it was not trained on."""
    code, out, err = run(capsys, "export", "--to", "vllm", tmp_path / "head")
    assert code == 0, err
    assert out.splitlines()[0].endswith("format speculators")
    seen = (
        "at image positions vLLM gives it the placeholder token's embedding; it was trained on the projector's output"
    )
    assert seen in out and seen not in run(capsys, "export", "--to", "sglang", tmp_path / "other")[1]
    measured = registry.load(registry.folders()["eagle3"]).provenance["held_out"]["vision"]
    assert f"| vision | {measured:.3f} |" in (tmp_path / "head" / "README.md").read_text()
    code, out, _ = run(capsys, "check", tmp_path / "head", "--format", "vllm")
    shipped = registry.load(registry.folders()["eagle3"]).config
    assert code == 0 and seen in out
    assert f"for vLLM, for a target with hidden size {shipped.hidden} and {shipped.vocabulary} tokens: no faults" in out
    code, out, _ = run(capsys, "check", tmp_path / "head", "--format", "sglang", "--json")
    assert code == 2 and json.loads(out)["engines"] == []
    assert "SGLang reads EAGLE-3 by SpecForge, for SGLang; this is EAGLE-3 by speculators, for vLLM" in out
    code, out, _ = run(capsys, "check", registry.folders()["eagle3"], "--format", "sglang")
    assert code == 2 and "'msd export --to sglang' writes one for SGLang" in out
    code, _, err = run(capsys, "export", "--to", "vllm", tmp_path / "no", "--drafter", registry.folders()["eagle2"])
    assert code == 2 and "a head of method 'eagle2' has no place in layout 'vllm', which is for dflash, eagle3" in err


def renamed(tensors: dict[str, Tensor]) -> None:
    for name in [n for n in tensors if n.startswith("layers.0.")]:
        tensors["midlayer." + name.removeprefix("layers.0.")] = tensors.pop(name)


FAULTS: dict[str, tuple[Callable[[dict[str, Tensor]], object], str]] = {
    "no fc": (lambda t: t.pop("fc.weight"), "tensor 'fc.weight' is missing"),
    "no d2t": (lambda t: t.pop("d2t"), "tensor 'd2t' is missing"),
    "names of another engine": (renamed, "its tensors 'midlayer.*' are named 'layers.0.*' in this format"),
    "unknown key": (lambda t: t.update(extra=torch.zeros(1)), "tensor 'extra' is unknown"),
    "wrong shape": (lambda t: t.update({"fc.weight": torch.zeros(32, 3)}), "tensor 'fc.weight' has shape [32, 3]"),
    "id out of range": (lambda t: t["d2t"].__setitem__(1, 1000), "maps draft token 1 to id 1001, outside 0…"),
    "not finite": (lambda t: t["norm.weight"].__setitem__(0, torch.nan), "'norm.weight' holds numbers that are not"),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_each_fault_is_named(name: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    change, message = FAULTS[name]
    head = exported(tmp_path, "vllm", "eagle3")
    tensors = load_file(head / FILES[1])
    change(tensors)
    save_file(tensors, head / FILES[1])
    for expected in (("--format", "vllm"), ()):
        code, out, _ = run(capsys, "check", head, *expected)
        assert code == 2 and message in out
    code, _, err = run(capsys, "export", "--to", "vllm", tmp_path / "out", "--drafter", head)
    assert code == 2 and message in err


@pytest.mark.parametrize("method", ["eagle3", "dflash"])
def test_layer_ids_are_those_of_the_engine(method: str, tmp_path: Path) -> None:
    """vLLM's i is `hidden_states[i]`, SGLang's i is `hidden_states[i + 1]`."""
    ids: dict[str, list[int]] = {}
    for to in ("vllm", "sglang"):
        config = json.loads((exported(tmp_path / to, to, method) / FILES[0]).read_text())
        place = config if to == "vllm" else config["eagle_config" if method == "eagle3" else "dflash_config"]
        ids[to] = next(value for key, value in place.items() if key.endswith("layer_ids"))
    read = registry.load(tmp_path / "vllm" / "own").config.taps
    assert ids["vllm"] == [i + 1 for i in ids["sglang"]] and set(ids["vllm"]) <= set(read)


def test_what_an_engine_computes_otherwise_is_refused(tmp_path: Path) -> None:
    head = LAYOUT["specforge"].write(tmp_path / "head")
    with pytest.raises(UserError, match="for SGLang: SGLang always normalises states before the output layer"):
        formats.export(head, "sglang", tmp_path / "out")
    assert formats.check(head).engines == [] and "always normalises" in formats.check(head, "sglang").faults[0]
    block = LAYOUT["dflash"].write(tmp_path / "block", num_target_layers=None)
    assert "has no 'num_target_layers', which SGLang needs" in formats.check(block, "sglang").faults[0]
    short = LAYOUT["dflash"].write(tmp_path / "short", num_target_layers=4)
    assert "names layer 5 of a target with 4 layers" in formats.check(short).faults[0]
    with pytest.raises(UserError, match="unknown engine 'tgi'; known: vllm, sglang"):
        formats.engine_named("tgi")


def test_the_setting_that_means_two_things_is_left_out(tmp_path: Path) -> None:
    """`norm_output` is a norm before the output layer to SpecForge, and one of what is fed on to SGLang."""
    config = json.loads((exported(tmp_path, "sglang", "eagle3") / FILES[0]).read_text())
    assert "norm_output" not in config
    written = LAYOUT["specforge"].write(tmp_path / "head")
    formats.export(written, "specforge", tmp_path / "out")
    assert json.loads((tmp_path / "out" / FILES[0]).read_text())["norm_output"] is False


def test_remarks_name_what_a_head_was_not_trained_on() -> None:
    config = rivals.network(tiny.llava(), "eagle3").config
    vllm, sglang = (formats.ENGINES[name] for name in ("vllm", "sglang"))

    def remarks(engine: Any, **variant: Any) -> str:
        return "; ".join(engine.remarks(replace(config, variant=replace(config.variant, **variant))))

    assert "under M-RoPE vLLM gives it the first of the three positions; it was trained on the largest" in remarks(vllm)
    assert "SGLang gives it columns as positions" in remarks(sglang)
    assert "trained on the placeholder token's embedding" in remarks(sglang, placeholders=True)
    assert "SGLang gives it the target's embedding, not its own" in remarks(sglang, embedding=True)
    for engine in (vllm, sglang):
        config = replace(config, variant=engine.seen(Variant()))
        assert remarks(engine) == "" and "M-RoPE" not in remarks(engine, sections=(2, 1, 1))


def test_the_first_axis_is_that_of_a_head_whose_frequencies_all_belong_to_it() -> None:
    """vLLM's positions, computed in two ways, for a target with M-RoPE and an image."""
    family = next(f for f in families.FAMILIES if f.name == "qwen2_vl")
    model, inputs = family.make(), family.row(family.parts(1, ["image"]))
    states = []
    variants: list[dict[str, Any]] = [{"first_axis": True}, {"sections": (4, 0, 0)}, {"columns": True}, {}]
    for variant in variants:
        network = rivals.network(model, "eagle3", variant=Variant(**variant))
        batch = run_teacher(adapt(model, network.config.taps), inputs, [[5, 6, 7, 8, 9]])
        with torch.no_grad():
            states.append(network.states(batch, torch.tensor([[0, 2]]), 2))
    assert torch.equal(states[0], states[1])
    assert not torch.allclose(states[0], states[2]) and not torch.allclose(states[0], states[3])


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A target with captured answers, some about images."""
    return tiny_checkpoint.captured(tmp_path_factory.mktemp("train"))


@pytest.mark.parametrize(
    ("to", "method"),
    [pytest.param(*pair, marks=[] if pair in (FOR[0], FOR[-1]) else [pytest.mark.slow]) for pair in FOR],
)
def test_a_head_is_trained_for_an_engine(
    to: str, method: str, place: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """It reads at image positions what the engine gives there, and so does the head that is written and read back."""
    drafter = train(capsys, place, tmp_path / "run", "--for", to, "--method", method)["drafter"]
    code, out, err = run(capsys, "export", "--to", to, tmp_path / "out", "--drafter", drafter)
    assert code == 0 and out.count("\n") == 1, err
    assert formats.check(tmp_path / "out", to).faults == [] == formats.check(tmp_path / "out", to).remarks
    engine = formats.ENGINES[to]
    own = json.loads((tmp_path / "out" / FILES[0]).read_text())["msd"]
    sees = {"placeholders": engine.placeholders, "columns": engine.columns, "first_axis": not engine.columns}
    assert {name: own[name] for name in sees} == sees
    model = load_target(str(place))[0]
    inputs = tiny.llava_inputs(1, images=1, words=6)
    batch = run_teacher(adapt(model, registry.load(drafter).config.taps), inputs, [[5, 6, 7, 8, 9, 10]])
    with torch.no_grad():
        one, two = (
            network.attach(model).states(batch, torch.tensor([[0, 2]]), 2)
            for network in (registry.load(drafter), formats.load(tmp_path / "out"))
        )
    assert torch.equal(one, two)
    counts = measure(str(place), Path(drafter), place / "captured.jsonl", place / "images", 4)["counts"]
    assert counts["own"] == counts[to] and sum(drafted for _, drafted in counts["own"].values()) > 20


def test_embeddings_at_image_positions_are_those_of_the_engine() -> None:
    """The placeholder's embedding for vLLM, the projector's output for SGLang; without an image they are the same."""
    model, states = tiny.llava(), {}
    for to in ("vllm", "sglang"):
        network = formats.prepare(rivals.network(model, "eagle3"), to)
        for images in (0, 1):
            inputs = tiny.llava_inputs(1, images=images, words=6)
            batch = run_teacher(adapt(model, network.config.taps), inputs, [[5, 6, 7, 8, 9]])
            states[to, images] = network.read(batch.layout, batch.taps[:, :-1], batch.prompt).selection.embedding
    assert torch.equal(states["vllm", 0], states["sglang", 0])
    at = (inputs["input_ids"][0, 1:] == tiny.IMAGE).nonzero()[:, 0]
    placeholder = model.get_input_embeddings()(torch.tensor(tiny.IMAGE))
    assert torch.equal(states["vllm", 1][0, at], placeholder.expand(len(at), -1))
    merged = adapt(model, (0,))
    first = run_teacher(merged, inputs, [[5, 6, 7, 8, 9]]).taps[0, at + 1]
    assert torch.equal(states["sglang", 1][0, at], first)


def test_what_cannot_be_trained_for_an_engine_is_refused(tmp_path: Path) -> None:
    for settings, message in (
        ({"engine": "vllm"}, "vLLM serves no heads of method 'msd'; choose eagle3 or dflash"),
        ({"engine": "sglang", "method": "dspark"}, "SGLang serves no heads of method 'dspark'"),
        ({"engine": "tgi", "method": "eagle3"}, "unknown engine 'tgi'; known: vllm, sglang"),
    ):
        with pytest.raises(UserError, match=message):
            DraftTraining(**settings)
    learned_mask = rivals.network(tiny.llava(), "dflash", variant=Variant())
    with pytest.raises(UserError, match="cannot be trained for vLLM: its layers normalise query and key heads"):
        formats.prepare(learned_mask, "vllm")
