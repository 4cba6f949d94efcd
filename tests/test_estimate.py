"""The roofline computed by hand, its limits, and the command's output."""

from __future__ import annotations

import json
from dataclasses import replace
from math import hypot
from pathlib import Path
from typing import Any

import pytest

from families_classic import CLASSIC
from msd.cli import main
from msd.errors import UserError
from msd.estimate import Acceptance, Card, Sizes, Workload, card, pass_seconds, plans, sizes
from msd.estimate.roofline import CARDS, prefill_seconds
from msd.estimate.sizes import of_config

# a layer: 1000 x 100 x (10 + 10 + 10 + 10) of attention, 3 x 1000 x 2000 of the MLP: 10 million weights
TOY = Sizes("toy", 10, 1000, 2000, 10, 10, 100, 5000)
CARD = Card("toy", 1e9, 1e12, 1e9, step=0.0, dtype_bytes=2.0, measured=True, touch=0.0)


def test_a_pass_by_hand() -> None:
    assert (TOY.layer, TOY.head, TOY.decoder, TOY.kv) == (10_000_000, 5_000_000, 105_000_000, 20_000)
    # one row after 99 tokens: 105M weights of 2 bytes at 1 GB/s against 2 x 105M FLOP at 1 TFLOP/s; a cache of 100
    # tokens of 20,000 numbers against 4 x 10 layers x 1000 x 100 keys
    products, attention = hypot(0.210, 210e6 / 1e12), hypot(0.004, 4e6 / 1e12)
    assert pass_seconds(TOY, CARD, 1, 99) == pytest.approx(products + attention)
    # two sequences of 4 rows: the weights are read once, the caches of 100 tokens twice, 8 rows are multiplied
    products = hypot(0.210, 2 * 105e6 * 8 / 1e12)
    attention = hypot(2 * 0.004, 4 * 10 * 1000 * 8 * (96 + 2.5) / 1e12)
    assert pass_seconds(TOY, CARD, 4, 96, 2) == pytest.approx(products + attention)
    # weights of 4 bits; attention at a hundredth of the speed; 12 operators a layer, of 10 microseconds; and
    # 8 x 1000 + 6 x 2000 numbers a layer, of a nanosecond
    slow = replace(CARD, step=1e-5, touch=1e-9, attention=1e10)
    products, attention = hypot(0.5 * 105e6 / 1e9, 210e6 / 1e12), hypot(0.004, 4e6 / 1e10)
    rest = 10 * 12 * 1e-5 + 10 * 20_000 * 1e-9
    assert pass_seconds(TOY, slow, 1, 99, weight_bytes=0.5) == pytest.approx(products + attention + rest)
    assert pass_seconds(TOY, replace(CARD, touch=None), 1, 99) == pytest.approx(
        pass_seconds(TOY, CARD, 1, 99) + 10 * 20_000 * 2 / 1e9
    )


def test_prefill_uses_the_output_layer_once_and_the_vision_tower_per_image() -> None:
    products = hypot(0.210, (2 * 100e6 * 50 + 2 * 5e6) / 1e12)
    attention = hypot(2 * 50 * 20_000 / 1e9, 4 * 10 * 1000 * 50 * 25.5 / 1e12)
    assert prefill_seconds(TOY, CARD, 50, 0) == pytest.approx(products + attention)
    seeing = replace(
        TOY, image_tokens=16, vision_layers=2, vision_hidden=100, vision_intermediate=200, vision_patches=64
    )
    assert seeing.vision == 2 * (4 * 100 * 100 + 2 * 100 * 200)
    encoding = hypot(2 * 160_000 / 1e9, (2 * 160_000 * 128 + 4 * 2 * 100 * 128 * 64) / 1e12)
    assert prefill_seconds(seeing, CARD, 50, 2) == pytest.approx(prefill_seconds(TOY, CARD, 50, 0) + encoding)


def test_a_plan_by_hand() -> None:
    """Speedup of decoding: plain step x tokens a pass / (draft + verification)."""
    (row,) = plans(TOY, CARD, Acceptance(length=3.0), Workload(100, 0, 200, 4), [8], [1])
    fused = 2 * 1000 * 1000
    draft = sum(pass_seconds(TOY, CARD, n, 200, layers=1, head=5_000_000 + fused) for n in (1, 2, 2, 2))
    verify, plain, first = (pass_seconds(TOY, CARD, 9, 200), pass_seconds(TOY, CARD, 1, 200),
                            prefill_seconds(TOY, CARD, 100, 0))  # fmt: skip
    assert row["draft_s"] == pytest.approx(draft)
    assert row["speedup_decode"] == pytest.approx(3 * plain / (draft + verify))
    assert row["speedup"] == pytest.approx((first + 200 * plain) / (first + 200 / 3 * (draft + verify)))
    assert row["fits"]


def test_a_draft_model_by_hand() -> None:
    """Its passes per level, its own prompt with the images, and its memory."""
    small = replace(TOY, name="small", layers=2, image_tokens=8)
    target = replace(TOY, image_tokens=16)
    work = Workload(100, 2, 200, 4, model=small)
    with_model, alone = (
        plans(target, CARD, Acceptance(length=3.0), w, [8], [2])[0] for w in (work, replace(work, model=None))
    )
    context, own = 100 + 2 * 16 + 100, prefill_seconds(small, CARD, 116, 2, 2)
    draft = sum(pass_seconds(small, CARD, n, context, 2) for n in (1, 2, 2, 2))
    assert with_model["draft_s"] == pytest.approx(draft)
    plain, token = with_model["plain_s"], (draft + with_model["verify_s"]) / 3
    first = with_model["prefill_s"]
    assert with_model["speedup"] == pytest.approx((first + 200 * plain) / (first + own + 200 * token))
    bytes_of_model = 2 * (2 * 10_000_000 + 2 * 5_000_000 + 2 * (116 + 200) * 4_000)
    assert with_model["memory_bytes"] - alone["memory_bytes"] == bytes_of_model


def test_larger_batches_gain_less_and_block_drafts_cost_less() -> None:
    for drafter in ("levels", "block"):
        rows = plans(sizes("llava-1.5-7b"), card("H100"), Acceptance(length=3.5), Workload(drafter=drafter), [32])
        gains = [row["speedup_decode"] for row in rows]
        assert gains == sorted(gains, reverse=True) and gains[0] > 2 > gains[-1]
        assert all(row["speedup"] < row["speedup_decode"] for row in rows if row["speedup_decode"] > 1)
    levels, block = (
        plans(sizes("qwen2.5-vl-7b"), card("L4"), Acceptance(length=3.5), Workload(drafter=d), [16], [1])[0]
        for d in ("levels", "block")
    )
    assert block["draft_s"] < levels["draft_s"] and block["verify_s"] == levels["verify_s"]


def test_what_fits() -> None:
    def fit(target: str, name: str, **work: Any) -> bool:
        return plans(sizes(target), card(name), Acceptance(length=3), Workload(**work), [8], [1])[0]["fits"]

    assert fit("llava-1.5-7b", "RTX 4090") and not fit("llava-1.5-13b", "rtx_4090")
    assert fit("llava-1.5-13b", "4090", weight_bytes=0.5) and not fit("llava-1.5-7b", "T4")


def test_acceptance() -> None:
    assert Acceptance.parse("3.5").of(60, 5) == 3.5
    assert Acceptance.parse("6").of(8, 3) == 4.0, "no more than levels and the bonus token"
    by_size = Acceptance.parse("8=3.1, 60=4.7")
    assert by_size.of(60, 5) == 4.7 and by_size.of(16, 5) is None and by_size.sizes((4, 8)) == (8, 60)
    rates = Acceptance.parse("0.8,0.5")
    assert rates.of(60, 5) == pytest.approx(1 + 0.8 + 0.4)
    assert rates.of(1, 5) == pytest.approx(1.8)
    for text in ("", "x", "8=", "0.8,1.2", "2,3", "8=12", "-1"):
        with pytest.raises(UserError, match="--acceptance"):
            Acceptance.parse(text)


def test_built_in_models_have_their_published_size() -> None:
    """Weights of decoder, embedding and vision tower, in billions."""
    for name, billions in (("llava-1.5-7b", 7.0), ("llava-1.5-13b", 13.3), ("qwen2.5-vl-7b", 8.2)):
        found = sizes(name)
        assert (found.decoder + found.hidden * found.vocabulary + found.vision) / 1e9 == pytest.approx(
            billions, rel=0.02
        )
    assert sizes("llava-hf/llava-1.5-7b-hf") is sizes("LLaVA-1.5-7B")


@pytest.mark.parametrize(
    ("name", "billions"),
    [("qwen3.5-4b", 4.54), ("gemma-4-31b", 31.3), ("gemma-4-31b-assistant", 0.47), ("qwen3-vl-32b", 33.4),
     ("qwen3-vl-2b", 2.13)],
)  # fmt: skip
def test_built_in_configs_have_their_published_size(name: str, billions: float) -> None:
    """Weights of the whole model, as far as its code declares them, in billions."""
    assert sizes(name).model / 1e9 == pytest.approx(billions, rel=0.005)


def test_own_layers_by_hand() -> None:
    """Qwen3.5-4B's layer: gated queries and output of 16 heads of 256, keys and values of 4; a cache of its own."""
    model, h = sizes("qwen3.5-4b"), 2560
    layer = h * (2 * 16 * 256 + 2 * 4 * 256) + 16 * 256 * h + 3 * h * 9216 + 2 * h * h
    assert model.mtp is not None and (model.mtp.dense, model.mtp.kept) == (layer, 2 * 4 * 256)
    work = Workload(50, 0, 100, 3, "mtp")
    row, bare = (
        plans(model, CARD, Acceptance(length=3.0), w, [3], [2])[0] for w in (work, replace(work, drafter="block"))
    )
    assert row["draft_s"] == pytest.approx(3 * pass_seconds(model.mtp_layers, CARD, 1, 100, 2, head=model.head))
    assert row["memory_bytes"] - bare["memory_bytes"] == 2 * (layer + 2 * 150 * 2 * 4 * 256)
    with pytest.raises(UserError, match="has no multi-token-prediction layers"):
        plans(TOY, CARD, Acceptance(length=3.0), work)


def test_an_assistant_reads_the_targets_keys() -> None:
    model, assistant = sizes("gemma-4-31b"), sizes("gemma-4-31b-assistant")
    work = Workload(50, 1, 100, 3, model=assistant)
    row, bare = (plans(model, CARD, Acceptance(length=3.0), w, [3], [1])[0] for w in (work, replace(work, model=None)))
    assert row["memory_bytes"] - bare["memory_bytes"] == 2 * assistant.model, "no cache of its own"
    assert row["speedup"] == pytest.approx(
        (row["prefill_s"] + 100 * row["plain_s"]) / (row["prefill_s"] + 100 * (row["draft_s"] + row["verify_s"]) / 3)
    ), "no prompt of its own"
    assert row["draft_s"] == pytest.approx(3 * pass_seconds(assistant, CARD, 1, 50 + 280 + 50, 1))


@pytest.mark.parametrize("family", CLASSIC, ids=lambda family: family.name)
def test_sizes_follow_from_a_config(family: Any) -> None:
    """The size of a layer counts its weight matrices, not norms and biases."""
    model = family.make()
    found, decoder = of_config("tiny", model.config), model.get_decoder()
    own = sum(p.numel() for name, p in decoder.layers[0].named_parameters() if p.dim() == 2)
    assert found.layer == own and found.layers == len(decoder.layers)
    assert found.head == model.get_output_embeddings().weight.numel()


def test_cards() -> None:
    assert len(CARDS) == 10 and all(c.source and not c.measured for c in CARDS.values())
    assert card("h100 sxm") is CARDS["h100"] and card("A100") is CARDS["a100-80"]
    with pytest.raises(UserError, match=r"unknown card 'TPU'; known: cpu, H100"):
        card("TPU")
    here = card("cpu")
    assert here.measured and here.bandwidth > 0 and here.flops > 0 and here.step > 0 and here.reached() is here


def test_command(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    def run(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stop:
            main(["estimate", *arguments])
        captured = capsys.readouterr()
        return int(stop.value.code or 0), captured.out, captured.err

    found = json.loads(run("--target", "llava-1.5-13b", "--gpu", "A100-80", "--acceptance", "60=4.7", "--json")[1])
    assert [row["nodes"] for row in found["rows"]] == [60] * 6
    assert found["card"]["name"] == "A100-80" and found["target"]["layers"] == 40
    CLASSIC[0].make().save_pretrained(tmp_path)
    code, out, _ = run("--target", str(tmp_path))
    assert code == 0 and "H100" in out and "whole answer" in out
    found = json.loads(run("--draft-model", str(tmp_path), "--json")[1])  # for the default target
    assert found["workload"]["model"]["layers"] == CLASSIC[0].make().config.get_text_config().num_hidden_layers
    assert found["rows"][-1]["memory_bytes"] > found["rows"][0]["memory_bytes"] > 14e9  # 7B weights in bfloat16
    for arguments, part in (
        (["--draft-model", str(tmp_path), "--drafter-kind", "block"], "leave out --drafter-kind block"),
        (["--gpu", "abacus"], "unknown card"),
        (["--acceptance", "no"], "--acceptance"),
        (["--weights", "int3"], "--weights"),
        (["--drafter-kind", "x"], "levels, block"),
        (["--target", "no/such/target"], "known without their files: llava-1.5-7b"),
    ):
        code, out, err = run(*arguments)
        assert (code, out) == (2, "") and part in err and err.count("\n") == 1
