"""Published heads in tiny, randomly weighted folders: loaded, checked to the last tensor, written, and lossless."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import families
import rivals
import tiny
import tiny_checkpoint
from msd import SpeculativeConfig, SpeculativeVLM, formats
from msd.drafters import registry
from msd.drafters.toolkit import checkpoint
from msd.errors import UserError
from msd.planning.plan import Plan
from published_layouts import LAYOUTS, VD, H, Layout, V
from training_command import run, train

SETTINGS = SpeculativeConfig(nodes=9, depth=4, adaptive=False, backend="plain")
LAYOUT = {layout.name: layout for layout in LAYOUTS}
every_layout = pytest.mark.parametrize("layout", LAYOUTS, ids=LAYOUT)


@cache
def target(name: str) -> tuple[Any, Any]:
    """A model of 8 layers of a family, and a prompt with an image."""
    family = next(f for f in families.FAMILIES if f.name == name)
    config = copy.deepcopy(family.make().config)
    config.text_config.num_hidden_layers = 8
    if getattr(config.text_config, "layer_types", None):
        config.text_config.layer_types = ["full_attention"] * 8
    torch.manual_seed(0)
    return tiny._finish(type(family.make())(config), 10.0), family.row(family.parts(1, ["image"]))


def reasons(folder: Path, name: str | None = None) -> str:
    """All faults of a head; loading it fails with the first of them."""
    found = formats.check(folder, name).faults
    assert found
    if name is None:
        with pytest.raises(UserError) as refused:
            formats.load(folder)
        assert found[0] in str(refused.value)
    return "; ".join(found)


@every_layout
def test_a_head_loads_and_the_output_stays_exact(layout: Layout, tmp_path: Path) -> None:
    """Greedy and same-seed tokens are those of `generate()`; drafts were made, and every tensor is used."""
    folder = layout.write(tmp_path)
    found = formats.check(folder)
    assert (found.format, found.faults) == (layout.format, [])
    network = formats.load(folder)
    floats = sum(t.numel() for t in layout.tensors().values() if t.is_floating_point())
    assert sum(p.numel() for p in network.parameters()) == floats
    model, inputs = target(layout.family)
    engine = SpeculativeVLM(model, None, SETTINGS, type(network).drafter(network))
    options = {"max_new_tokens": 10, "min_new_tokens": 10}
    result = engine.generate(**inputs, **options, do_sample=False)
    plain = model.generate(**inputs, **options, do_sample=False)
    assert result.tokens == plain[0, inputs["input_ids"].shape[1] :].tolist()
    assert result.statistics.num_draft_tokens > 0
    torch.manual_seed(3)
    sampled = model.generate(**inputs, **options, do_sample=True)
    again = engine.generate(**inputs, **options, do_sample=True, seed=3)
    assert again.tokens == sampled[0, inputs["input_ids"].shape[1] :].tolist()


@every_layout
def test_each_fault_is_named(layout: Layout, tmp_path: Path) -> None:
    name = "fc.weight"

    def changed(number: int, change: Callable[[dict[str, Tensor]], object], **config: Any) -> str:
        return reasons(layout.write(tmp_path / str(number), change, **config))

    assert f"tensor '{name}' is missing" in reasons(layout.write(tmp_path / "a", lambda t: t.pop(name)), layout.format)
    assert "tensor 'more' is unknown" in changed(1, lambda t: t.update(more=torch.zeros(1)))
    assert f"tensor '{name}' has shape [{H}, 3], not" in changed(2, lambda t: t.update({name: torch.zeros(H, 3)}))
    assert f"tensor '{name}' holds numbers that are not finite" in changed(3, lambda t: t[name][0].fill_(torch.inf))
    assert f"tensor '{name}' has torch.int64" in changed(4, lambda t: t.update({name: t[name].long()}))
    nested = "transformer_layer_config"
    other = {nested: layout.config[nested] | {"hidden_size": 40}} if nested in layout.config else {"hidden_size": 40}
    assert f"its config.json is of hidden size 40, its tensor '{name}' of {H}" in changed(5, lambda t: None, **other)


@pytest.mark.parametrize("name", ["eagle3", "specforge", "angelslim", "speculators-llama", "speculators-dspark"])
def test_ids_out_of_range_are_refused(name: str, tmp_path: Path) -> None:
    write = LAYOUT[name].write
    assert f"maps draft token 2 to id {V}, outside 0…{V - 1}" in reasons(
        write(tmp_path / "a", lambda t: t["d2t"].__setitem__(2, V - 2))
    )
    assert "maps two draft tokens to one id" in reasons(
        write(tmp_path / "b", lambda t: t["d2t"].__setitem__(2, t["d2t"][1] - 1))
    )
    assert "'t2d' does not mark the ids of 'd2t'" in reasons(write(tmp_path / "c", lambda t: t["t2d"].fill_(True)))


def test_the_two_names_of_the_layer_are_told_apart(tmp_path: Path) -> None:
    def renamed(old: str, new: str) -> Callable[[dict[str, Tensor]], None]:
        def change(tensors: dict[str, Tensor]) -> None:
            for name in [n for n in tensors if n.startswith(old)]:
                tensors[new + name.removeprefix(old)] = tensors.pop(name)

        return change

    folder = LAYOUT["eagle3"].write(tmp_path / "a", renamed("midlayer.", "layers.0."))
    assert "its tensors 'layers.0.*' are named 'midlayer.*' in this format" in reasons(folder)
    folder = LAYOUT["speculators-llama"].write(tmp_path / "b", renamed("layers.0.", "midlayer."))
    assert "its tensors 'midlayer.*' are named 'layers.0.*' in this format" in reasons(folder)


class Code:
    """A pickle of it would run a command."""

    def __reduce__(self) -> Any:
        return print, ("run",)


@every_layout
def test_pickles_hold_tensors_alone(layout: Layout, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = layout.write(tmp_path / "a", pickled=True)
    assert formats.check(folder).faults == []
    torch.save({"fc.weight": Code()}, folder / "pytorch_model.bin")
    for read in (formats.check, formats.load):
        with pytest.raises(UserError, match="is a pickle that holds more than tensors"):
            read(folder)
    assert "run" not in capsys.readouterr().out
    torch.save([1, 2], folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="holds more than a table of tensors"):
        formats.load(folder)


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("eagle2", {"hidden_act": "gelu"}, "field 'hidden_act' is 'gelu'"),
        ("eagle2", {"num_hidden_layers": 2}, "field 'num_hidden_layers' is 2"),
        ("eagle2", {"hidden_size": "32"}, "field 'hidden_size' is '32', not an integer"),
        ("eagle2", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rotary scaling 'dynamic' is not supported"),
        ("eagle3", {"target_hidden_size": 48}, "the target's hidden size 48 is not the head's 32"),
        ("angelslim", {"rope_scaling": {"type": "mrope", "mrope_section": [4, 4, 4]}}, "do not fill half"),
        ("specforge", {"eagle_config": {"eagle_aux_hidden_state_layer_ids": [1, 2]}}, "names 2 layers"),
        ("speculators-llama", {"fc_norm": True}, "sets both 'norm_before_fc' and 'fc_norm'"),
        ("dflash", {"layer_types": ["sliding_attention"]}, "sliding_attention"),
        ("dflash", {"dflash_config": {"mask_token_id": V, "target_layer_ids": [1]}}, f"mask token {V} is outside"),
        ("dspark-deepspec", {"markov_head_type": "other"}, "field 'markov_head_type' is 'other'"),
    ],
)
def test_configs_that_no_network_here_computes_are_refused(
    name: str, config: dict[str, Any], message: str, tmp_path: Path
) -> None:
    assert message in reasons(LAYOUT[name].write(tmp_path, **config))


def test_other_models_have_no_format(tmp_path: Path) -> None:
    folder = LAYOUT["eagle2"].write(tmp_path, lambda t: t.pop("fc.weight"))
    with pytest.raises(UserError, match="has no known format of draft heads"):
        formats.load(folder)
    with pytest.raises(UserError, match="unknown format 'eagle9'"):
        formats.check(folder, "eagle9")


@every_layout
def test_a_head_is_written_as_it_was_read(layout: Layout, tmp_path: Path) -> None:
    folder = layout.write(
        tmp_path / "in", lambda t: t.update({n: x.bfloat16() for n, x in t.items() if x.is_floating_point()})
    )
    kinds = {
        "speculators": "speculators",
        "specforge": "specforge",
        "eagle3": "eagle",
        "dflash": "dflash",
        "dspark": "dflash",
    }
    if layout.format == "angelslim":
        with pytest.raises(UserError, match="has no place for sections"):
            formats.export(folder, "eagle", tmp_path / "out")
        return
    layout_name = kinds.get(layout.format.partition("-")[0], "eagle2")
    name = formats.export(folder, layout_name, tmp_path / "one")
    formats.export(tmp_path / "one", layout_name, tmp_path / "two")
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    before, after = load_file(folder / "model.safetensors"), load_file(tmp_path / "one" / "model.safetensors")
    assert name in (layout.format, "eagle2") and before.keys() == after.keys()
    assert all(torch.equal(before[n].double(), after[n].double()) for n in before)
    assert formats.load(folder).config.variant == formats.load(tmp_path / "one").config.variant


@pytest.mark.parametrize(
    ("method", "to"),
    [("eagle2", "eagle2"), ("msd-published", "eagle2"), ("vispec", "eagle2"), ("eagle3", "eagle"), ("eagle3", "sglang"),
     ("eagle3", "speculators"), ("dflash", "dflash"), ("dflash", "speculators"), ("dspark", "dflash"),
     ("dspark", "speculators")],
)  # fmt: skip
def test_a_shipped_head_has_the_same_network_after_the_round_trip(method: str, to: str, tmp_path: Path) -> None:
    """Except for the probe of endings, which training adds and engines do not have."""
    shipped = registry.load(registry.ROOTS[-1] / method)
    shipped.add_ending()
    checkpoint.save(shipped, tmp_path / "in")
    formats.export(tmp_path / "in", to, tmp_path / "out")
    one, two = registry.load(tmp_path / "in"), formats.load(tmp_path / "out")
    text = {name: tensor for name, tensor in one.state_dict().items() if not name.startswith(checkpoint.ENDING)}
    assert text.keys() == two.state_dict().keys()
    assert all(torch.equal(text[n], t) for n, t in two.state_dict().items())
    keep = ("hidden", "heads", "kv_heads", "head_dim", "intermediate", "width", "depth", "rope_theta", "eps")
    assert [getattr(one.config, n) for n in keep] == [getattr(two.config, n) for n in keep]
    assert torch.equal(one.ids, two.ids) and two.fit(one.config.taps[-1]).config.taps == one.config.taps


@pytest.mark.parametrize(
    ("method", "to", "message"),
    [
        ("hivis", "eagle2", "a head of method 'hivis' has no place in layout 'eagle2'"),
        ("msd-30min", "eagle", "a head of method 'msd' has no place in layout 'eagle', which is for eagle3"),
        ("eagle2", "eagle9", "--to 'eagle9' is unknown; choose one of eagle, eagle2"),
    ],
)
def test_what_a_layout_cannot_express_is_refused(method: str, to: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        formats.export(registry.ROOTS[-1] / method, to, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def trees(network: Any, inputs: dict[str, Tensor]) -> list[Any]:
    """The drafts of an answer, with the engine's own steps."""
    steps: list[Any] = []
    engine = SpeculativeVLM(rivals_model(), None, SETTINGS, type(network).drafter(network))
    engine.generate(**inputs, max_new_tokens=8, min_new_tokens=8, do_sample=False, on_step=steps.append)
    return [(s.tree.tokens.tolist(), s.tree.parents.tolist()) for s in steps if s.tree is not None]


@cache
def rivals_model() -> Any:
    return target("llava")[0]


@pytest.mark.parametrize(
    ("method", "to"),
    [("eagle2", "eagle2"), ("vispec", "eagle2"), ("eagle3", "speculators"), ("dflash", "dflash"),
     ("dspark", "speculators")],
)  # fmt: skip
def test_trees_of_a_written_head_are_the_same(method: str, to: str, tmp_path: Path) -> None:
    network = rivals.network(rivals_model(), method)
    checkpoint.save(network, tmp_path / "own")
    formats.export(tmp_path / "own", to, tmp_path / "out")
    inputs = tiny.llava_inputs(1, images=1, words=6)
    drafts = trees(registry.load(tmp_path / "own"), inputs)
    assert len(drafts) > 1 and trees(formats.load(tmp_path / "out"), inputs) == drafts


def test_a_loaded_head_is_calibrated_by_what_the_target_accepts(tmp_path: Path) -> None:
    """And only its trees change. A later process begins with what this one learnt."""
    folder, (model, inputs) = LAYOUT["eagle2"].write(tmp_path), target("llava")
    options: dict[str, Any] = {"max_new_tokens": 16, "min_new_tokens": 16, "do_sample": False}

    def engine() -> SpeculativeVLM:
        network = formats.load(folder)
        found = SpeculativeVLM(
            model, None, SETTINGS.model_copy(update={"adaptive": True}), type(network).drafter(network)
        )
        found.plan = Plan(SETTINGS.nodes, SETTINGS.depth)  # whose trees do not depend on the clock
        return found

    vlm: Any = engine()
    raw = vlm.generate(**inputs, **options)
    counts = vlm.drafter.observed.counts
    assert counts[0].sum() > 0 and vlm.drafter.network.calibration is None
    counts[0] += 100
    counts[1] += torch.linspace(5, 95, counts.shape[1]).long()  # the larger q, the more were right
    again = vlm.generate(**inputs, **options)
    learnt = vlm.drafter.network.calibration
    later: Any = engine()
    assert learnt["log_odds"] > 0 and later.drafter.network.calibration == learnt
    assert raw.tokens == again.tokens == later.generate(**inputs, **options).tokens


def test_an_embedding_of_its_own_is_used_unless_it_is_the_targets(tmp_path: Path) -> None:
    model, _ = target("llava")
    rows = model.get_input_embeddings().weight.detach()
    same = formats.load(
        LAYOUT["eagle2"].write(tmp_path / "a", lambda t: t.update({"embed_tokens.weight": rows.clone()}))
    )
    other = formats.load(LAYOUT["eagle2"].write(tmp_path / "b")).attach(model)
    assert same.embed_tokens is not None and same.attach(model).embed_tokens is None
    assert torch.equal(same.embed(torch.tensor([3])), rows[[3]])
    own = LAYOUT["eagle2"].tensors()["embed_tokens.weight"]
    assert torch.equal(other.embed(torch.tensor([3])), own[[3]])


def test_a_vocabulary_may_be_padded_and_no_more(tmp_path: Path) -> None:
    """LLaVA-1.5's heads have 32,000 rows, its checkpoint 32,064."""
    model = tiny.llava(V + 8)
    network = formats.load(LAYOUT["eagle2"].write(tmp_path)).attach(model)
    assert len(network.ids) == V + 8 and network.embed(torch.tensor([V + 7])).shape == (1, H)
    with pytest.raises(UserError, match=f"trained for a target with {V} tokens"):
        formats.load(tmp_path).attach(tiny.llava(V + 300))


def test_commands(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    folder = LAYOUT["eagle3"].write(tmp_path / "head")
    code, out, _ = run(capsys, "check", folder, "--json")
    assert code == 0 and json.loads(out) == {
        "path": str(folder), "format": "eagle3", "method": "eagle3", "faults": [],
        "target": {"hidden_size": H, "vocabulary": V, "layers_read": []}, "engines": [], "remarks": [],
    }  # fmt: skip
    tiny.llava().save_pretrained(tmp_path / "target")
    code, out, _ = run(capsys, "check", folder, "--target", tmp_path / "target")
    assert code == 0 and out.count("\n") == 1 and "hidden size 32 and 64 tokens: no faults" in out
    code, out, _ = run(capsys, "check", folder, "--format", "specforge", "--json")
    assert code == 0 and json.loads(out)["format"] == "specforge", "the same tensors"
    code, out, _ = run(capsys, "check", folder, "--format", "speculators")
    assert code == 2 and out.count("\n") == 1 and "format speculators" in out
    code, out, _ = run(capsys, "export", "--to", "sglang", tmp_path / "out", "--drafter", folder)
    assert code == 0 and "format specforge" in out
    assert load_file(tmp_path / "out" / "model.safetensors")["lm_head.weight"].shape == (VD, H)
    code, _, err = run(capsys, "export", "--to", "eagle", tmp_path / "no")
    assert code == 2 and "a head of method 'msd' has no place in layout 'eagle'" in err
    code, out, _ = run(capsys, "check", registry.folders()["msd"])
    assert code == 0 and "format msd" in out


def test_a_hub_id_is_taken_from_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="'some/head' is no folder, and no head could be fetched from the hub"):
        formats.load("some/head")
    place = tmp_path / "models--some--head"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text("0" * 40)
    LAYOUT["eagle2"].write(place / "snapshots" / ("0" * 40))
    assert formats.load("some/head").method == "eagle2"


@pytest.mark.slow
def test_a_published_head_is_trained_further(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Without learning it is unchanged; the result is a folder of ours that keeps what the format needs."""
    place = tiny_checkpoint.captured(tmp_path / "target")
    capsys.readouterr()
    text = json.loads((place / "config.json").read_text())["text_config"]
    rows = text["vocab_size"]
    layout = LAYOUT["eagle2"]
    shapes = layout.shapes | {"embed_tokens.weight": (rows, H)}
    head = Layout("eagle2", "eagle2", layout.config | {"vocab_size": rows}, shapes).write(tmp_path / "head")
    kept = Path(train(capsys, place, tmp_path / "kept", "--start", head, "--lr", 0)["drafter"])
    learnt = Path(train(capsys, place, tmp_path / "learnt", "--start", head)["drafter"])
    before, same, other = (load_file(f / "model.safetensors") for f in (head, kept, learnt))
    assert torch.equal(before["fc.weight"].half(), same["fc.weight"])
    assert not torch.equal(other["fc.weight"], same["fc.weight"])
    assert formats.method_of(learnt) == "eagle2" and formats.load(learnt).config.variant.published
    assert torch.equal(before["embed_tokens.weight"].half(), other["embed_tokens.weight"]), "it stays frozen"
    assert formats.export(learnt, "eagle2", tmp_path / "out") == "eagle2"
