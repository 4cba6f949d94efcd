"""`top_probabilities` against probabilities from the logits of `generate()`."""

from __future__ import annotations

import pytest
import torch

import tiny
from msd.bench.modality import mean_top_probabilities, top_probabilities
from msd.targets import adapt


@pytest.mark.parametrize("temperature", [0.0, 1.0, 0.5])
def test_top_probabilities_are_those_of_generate(temperature: float) -> None:
    model, inputs = tiny.llava(), tiny.llava_inputs()
    out = model.generate(
        **inputs, max_new_tokens=9, do_sample=False, output_logits=True, return_dict_in_generate=True,
        suppress_tokens=[tiny.IMAGE],
    )  # fmt: skip
    answer = out.sequences[0, inputs["input_ids"].shape[1] :].tolist()
    distributions = (torch.cat(out.logits) / (temperature or 1.0)).softmax(-1).sort(descending=True).values
    expected = torch.stack([distributions[:, :n].sum(-1) for n in (1, 4, 8)], -1)
    computed = top_probabilities(adapt(model), inputs, answer, temperature)
    torch.testing.assert_close(computed, expected, atol=1e-5, rtol=1e-4)
    mean = mean_top_probabilities([computed[:4], computed[4:]])
    assert mean is not None and list(mean.values()) == pytest.approx(expected.mean(0).tolist(), abs=1e-5)


def test_an_answer_ends_at_an_image_placeholder() -> None:
    model, inputs = tiny.llava(), tiny.llava_inputs()
    whole = top_probabilities(adapt(model), inputs, [5, 6, 7], 1.0)
    torch.testing.assert_close(top_probabilities(adapt(model), inputs, [5, 6, tiny.IMAGE, 7], 1.0), whole[:2])
    assert mean_top_probabilities([top_probabilities(adapt(model), inputs, [tiny.IMAGE], 1.0)]) is None
