"""The bundled photos are small, free, and come with prompts in the project's data format."""

import json

import pytest

from msd.inputs.images import load_image
from msd.reference import sample_photos


def test_photos_are_small_jpegs_with_a_stated_source() -> None:
    photos = sample_photos()
    stated = (photos[0].parent / "SOURCES.md").read_text()
    assert 6 <= len(photos) <= 8
    for photo in photos:
        assert photo.stat().st_size < 100_000
        assert max(load_image(photo).size) <= 512
        (line,) = (line for line in stated.splitlines() if f"`{photo.name}`" in line)
        assert "CC0" in line or "public domain" in line


@pytest.fixture(scope="module")
def lines() -> list[dict[str, str]]:
    return [json.loads(line) for line in (sample_photos()[0].parent / "prompts.jsonl").read_text().splitlines()]


def test_prompts_cover_every_photo_and_task(lines: list[dict[str, str]]) -> None:
    about = [line for line in lines if line["task"] in ("caption", "detail", "vqa")]
    assert len(about) >= 60
    assert {line["image"] for line in about} == {photo.name for photo in sample_photos()}
    assert all(set(line) == {"image", "prompt", "task"} and line["prompt"].strip() for line in about)
    assert len({(line["image"], line["prompt"]) for line in about}) == len(about)


def test_other_suites_come_after_those_about_photos(lines: list[dict[str, str]]) -> None:
    tasks = [line["task"] for line in lines]
    assert set(tasks[:60]) == {"caption", "detail", "vqa"}
    assert set(tasks) == {"caption", "detail", "vqa", "chat", "text", "ocr"}
    for line in lines:
        drawn = line.get("image", "").startswith("words_")
        assert drawn == (line["task"] == "ocr") and ("image" not in line) == (line["task"] == "text")
        assert ("turns" in line) == (line["task"] == "chat")


def test_the_first_lines_show_every_photo(lines: list[dict[str, str]]) -> None:
    count = len(sample_photos())
    assert len({line["image"] for line in lines[:count]}) == count
