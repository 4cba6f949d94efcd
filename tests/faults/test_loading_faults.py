"""A checkpoint with damaged or mismatched files raises UserError; it never loads with random weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import tiny
import tiny_checkpoint
from families import BY_NAME, NAMES
from msd.errors import UserError
from msd.loading import check_tensors, load_target

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab\nsize 12345\n"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint.write(tmp_path_factory.mktemp("whole"))


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "checkpoint"))


def refusal(folder: Path) -> str:
    with pytest.raises(UserError) as caught:
        load_target(folder)
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)
    return str(caught.value)


def configure(folder: Path, **changes: Any) -> None:
    """Changes the text part of the config."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["text_config"] |= changes
    path.write_text(json.dumps(config))


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = load_file(folder / WEIGHTS)
    change(weights)
    save_file(weights, folder / WEIGHTS, {"format": "pt"})


def test_the_checkpoint_itself_is_loaded(folder: Path) -> None:
    model, _ = load_target(folder)
    wanted = tiny.llava(len(tiny_checkpoint.SPECIAL) + 256, 0, 10.0).state_dict()
    assert all(torch.equal(weight, wanted[name]) for name, weight in model.state_dict().items())


def test_a_config_with_more_layers_than_the_weights(folder: Path) -> None:
    configure(folder, num_hidden_layers=5)
    said = refusal(folder)
    assert "lack 18 tensor(s)" in said and "layers.3.input_layernorm.weight" in said


def test_a_config_with_fewer_layers_than_the_weights(folder: Path) -> None:
    configure(folder, num_hidden_layers=2)
    said = refusal(folder)
    assert "9 tensor(s) that its config leaves out" in said and "layers.2." in said


def test_weights_of_another_shape(folder: Path) -> None:
    configure(folder, intermediate_size=48)
    said = refusal(folder)
    assert "9 tensor(s) of another shape" in said and "[32, 64] for [32, 48]" in said


def test_a_bias_that_the_config_leaves_out(folder: Path) -> None:
    name = next(n for n in load_file(folder / WEIGHTS) if n.endswith("layers.0.self_attn.q_proj.weight"))
    rewrite(folder, lambda weights: weights.update({name.replace("weight", "bias"): torch.ones(32)}))
    assert "1 tensor(s) that its config leaves out" in refusal(folder)


@pytest.mark.parametrize("part", ["embed_tokens", "lm_head", "linear_1.bias", "vision_tower", "norm"])
def test_tensors_that_are_missing(folder: Path, part: str) -> None:
    def drop(weights: dict[str, torch.Tensor]) -> None:
        for name in [n for n in weights if part in n]:
            del weights[name]

    rewrite(folder, drop)
    said = refusal(folder)
    assert "its weights lack" in said and part in said


def test_tensors_that_no_answer_depends_on(folder: Path) -> None:
    """Buffers that older versions wrote, and parts that the architecture does not have."""
    extra = {
        "language_model.model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
        "vision_tower.vision_model.embeddings.position_ids": torch.arange(5),
        "classifier.weight": torch.ones(2, 2),
    }
    rewrite(folder, lambda weights: weights.update(extra))
    load_target(folder)


@pytest.mark.parametrize("name", NAMES)
def test_every_family_loads_what_it_saved(name: str, tmp_path: Path) -> None:
    """With no tensor missing, left over or of another shape, whatever is tied or renamed."""
    if name == "deepseek_ocr2":
        pytest.skip("its tiny model has fewer queries than the library's class, which fixes their number")
    model = BY_NAME[name].make()
    model.save_pretrained(tmp_path)
    loaded, found = type(model).from_pretrained(tmp_path, output_loading_info=True)
    check_tensors(loaded, found)


def test_an_unused_pooling_head_may_be_missing() -> None:
    found = {"missing_keys": {"model.vision_tower.head.probe"}, "unexpected_keys": set(), "mismatched_keys": set()}
    check_tensors(nn.Module(), found)
    with pytest.raises(UserError, match="lack 1 tensor"):
        check_tensors(nn.Module(), found | {"missing_keys": {"lm_head.weight"}})


def test_a_part_of_the_weights_is_missing(folder: Path) -> None:
    shard, other = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    names = [*load_file(folder / WEIGHTS)]
    (folder / WEIGHTS).rename(folder / shard)
    places = {name: other if i % 2 else shard for i, name in enumerate(names)}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    assert other in refusal(folder)


@pytest.mark.parametrize(
    "name", [WEIGHTS, "config.json", "generation_config.json", "processor_config.json", "tokenizer.json"]
)
def test_pointers_and_damaged_files(folder: Path, name: str) -> None:
    data = (folder / name).read_bytes()
    for content, said in (
        (POINTER, "git-lfs pointer"),
        (b"", name if name == WEIGHTS else ""),
        (data[: len(data) // 2], ""),
        (b"\xff\xfe" * 2000, ""),
        (b"[]", ""),
    ):
        (folder / name).write_bytes(content)
        told = refusal(folder)
        assert said in told and (content != POINTER or name in told)


@pytest.mark.parametrize(
    ("name", "said"),
    [(WEIGHTS, "no file named"), ("tokenizer.json", "no tokenizer"), ("processor_config.json", "processor")],
)
def test_files_that_are_missing(folder: Path, name: str, said: str) -> None:
    (folder / name).unlink()
    assert said in refusal(folder)


def test_a_pointer_that_is_not_needed(folder: Path) -> None:
    """For example the same weights in another format."""
    for name in ("pytorch_model.bin", "photo.png", "consolidated.safetensors"):
        (folder / name).write_bytes(POINTER)
    load_target(folder)


@pytest.mark.slow
def test_the_reference_model_is_complete() -> None:
    assert load_target("reference")[0].config.model_type == "llava"
