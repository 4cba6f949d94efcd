"""The suite `unseen`: pictures rendered by code, equal in every run."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from msd.bench import unseen
from msd.bench.conversation import check_files
from msd.bench.data import in_suites
from msd.errors import UserError


@pytest.mark.parametrize("kind", unseen.RENDERED)
def test_pictures_are_reproducible_and_differ(kind: str) -> None:
    pictures = [unseen.render(kind, number).tobytes() for number in range(unseen.EACH)]
    assert pictures == [unseen.render(kind, number).tobytes() for number in range(unseen.EACH)]
    assert len(set(pictures)) == unseen.EACH


def test_samples_are_prompts_with_readable_pictures(tmp_path: Path) -> None:
    samples = unseen.samples(folder=tmp_path)
    assert len(samples) == len(unseen.KINDS) * unseen.EACH
    assert {s.task for s in samples} == {f"unseen-{kind}" for kind in unseen.KINDS}
    check_files(samples)
    for sample in samples:
        assert sample.prompt and bool(sample.images) == (sample.task != "unseen-text")
        for path in sample.images:
            with Image.open(path) as image:  # type: ignore[arg-type]
                assert image.mode == "RGB" and min(image.size) >= 300
    assert any(s.before for s in samples), "some turns of text follow an earlier one"


def test_the_suite_and_its_kinds_can_be_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platformdirs.user_cache_dir", lambda *_, **__: str(tmp_path))
    samples, tasks = unseen.requested(["unseen"])
    assert tasks == [f"unseen-{kind}" for kind in unseen.KINDS] and in_suites(samples, tasks) == samples
    samples, tasks = unseen.requested(["unseen-chart"])
    assert [s.task for s in samples] == ["unseen-chart"] * unseen.EACH
    assert unseen.requested(["caption"]) == ([], ["caption"])
    samples, tasks = unseen.requested(["unseen-films"])
    with pytest.raises(UserError, match="unseen-films"):
        in_suites(samples, tasks)
