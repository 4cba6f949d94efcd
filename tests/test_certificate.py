"""The certificate in half precision: what it counts, and what passes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import tiny
import tiny_checkpoint
from msd.certify.certificate import GREEDY, LARGEST_GAP, Row, _Judge, _Request
from training_command import run


def row(different: int, compared: int = 20, largest: float = 2.0, yardstick: Row | None = None) -> Row:
    gaps = [largest] * different
    return Row(
        "m", compared, compared - different, differences=["d"] * different, relative_gaps=gaps, yardstick=yardstick
    )


def test_differences_are_judged_by_the_yardstick_in_half_precision() -> None:
    assert not row(1).passed, "float32 allows ties only"
    assert row(5, yardstick=row(3)).passed, "no more than chance explains"
    assert not row(15, yardstick=row(1)).passed
    assert row(15, yardstick=row(14)).passed
    assert not row(1, largest=LARGEST_GAP + 1, yardstick=row(14)).passed, "no rounding explains such a gap"
    assert not Row("m", yardstick=row(1)).passed, "nothing was compared"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_tie_is_a_gap_below_the_rounding_of_the_logit(dtype: torch.dtype) -> None:
    model = tiny.llava(sharpness=10.0).to(dtype)
    request = _Request("here", tiny.llava_inputs(0), {**GREEDY, "max_new_tokens": 6}, 0)
    reference = request.generate(model)
    assert request.generate(model, copies=2)[:1] == reference[:1]
    ids = torch.cat([request.inputs["input_ids"], torch.tensor([reference[:2]])], 1)
    forward = {**request.inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
    forward["pixel_values"] = forward["pixel_values"].double()
    judge = _Judge(model)
    with torch.no_grad():
        logits = judge.exact(**forward).logits[0, -1]
    best, worst = int(logits.argmax()), int(logits.argmin())
    gap, rounding = judge.gap(request, reference[:2], best, worst)
    assert gap == pytest.approx(float(logits[best] - logits[worst]), abs=1e-6)
    largest = float(logits[[best, worst]].abs().max())
    assert rounding == pytest.approx(1e-4 if dtype == torch.float32 else torch.finfo(dtype).eps * largest)
    found = Row("m")
    judge.compare(found, request, [*reference[:2], worst], [*reference[:2], best])
    assert (found.tokens, found.agreeing, found.identical, len(found.differences)) == (3, 2, 0, 1)
    assert found.relative_gaps == [pytest.approx(gap / rounding)]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_command_in_half_precision(capsys: pytest.CaptureFixture[str], tmp_path: Path, dtype: str) -> None:
    target = tiny_checkpoint.write(tmp_path / "target")
    lines = [{"prompt": f"Say {i}.", "task": "say"} for i in range(3)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    command = [
        "verify", "--target", target, "--data", tmp_path / "data.jsonl", "--max-new-tokens", 8, "--dtype", dtype,
        "--method", "ar,prompt-lookup,prompt-lookup:sampled",
    ]  # fmt: skip
    code, out, err = run(capsys, *command, "--json")
    assert code == 0, err
    report = json.loads(out)
    assert report["dtype"] == dtype and report["yardstick"]["compared"] == 3
    for found in report["rows"]:
        assert found["passed"] and found["compared"] == 3 and not found["p_values"]
        assert found["identical"] + found["ties"] + len(found["differences"]) == 3
        assert 0.0 <= found["agreeing_share"] <= 1.0 and found["identical_share"] == found["identical"] / 3
    code, out, err = run(capsys, *command)
    assert code == 0 and "yardstick" in out and f"in {dtype}, rounding changes some answers" in out
    code, _, err = run(capsys, *command, "--outputs", tmp_path / "data.jsonl")
    assert code == 2 and "--outputs" in err
