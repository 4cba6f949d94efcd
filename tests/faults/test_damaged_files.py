"""Empty, truncated, corrupted and git-lfs pointer files: one line names the file and the remedy."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny
import tiny_checkpoint
from msd.drafters import registry
from msd.drafters.toolkit import checkpoint
from msd.errors import UserError
from msd.labels.label_thresholds import ModalityThresholds
from msd.loading import load_target
from msd.planning import costs as costs_of
from msd.planning.costs import Costs, costs
from msd.reference import folder
from msd.reference.folder import MANIFEST, ensure, is_complete
from msd.system.files import LFS, read_json, read_rows
from msd.targets import adapt
from msd.train.loop import Loop, LoopConfig, draw, read_log
from training_command import FLOAT32, STEPS, run

POINTER = LFS + b"v1\noid sha256:4d7a\nsize 12345\n"
DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda _: b"",
    "cut short": lambda whole: whole[: len(whole) // 2],
    "garbage": lambda _: bytes(range(256)) * 4,
    "zeros": lambda whole: bytes(len(whole)),
    "pointer": lambda _: POINTER,
    "a list": lambda _: b"[1, 2]",
    "null": lambda _: b"null",
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A target with captured answers."""
    return tiny_checkpoint.captured(tmp_path_factory.mktemp("damaged"))


@pytest.fixture(scope="module")
def trained(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished training run."""
    out = tmp_path_factory.mktemp("runs") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "_METHODS", dict(registry._METHODS))
        with pytest.raises(SystemExit) as stop:
            from msd.cli import main

            main([str(a) for a in training(place, out)])
    assert not stop.value.code
    return out


def training(place: Path, out: Path, *more: object, captured: Path | None = None) -> list[object]:
    return [
        "train", "--captured", captured or place / "captured.jsonl", "--images", place / "images", "--target", place,
        "--out", out, "--steps", STEPS, "--batch", 3, "--draft-vocabulary", 100, "--json", *FLOAT32, *more,
    ]  # fmt: skip


@pytest.fixture
def out(trained: Path, tmp_path: Path) -> Path:
    """A copy of the run."""
    shutil.copytree(trained, tmp_path / "run")
    return tmp_path / "run"


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Returns the one line of a refused call."""
    code, told, err = run(capsys, *arguments)
    lines = [line for line in err.splitlines() if line.startswith("msd: ")]
    assert (code, told, len(lines)) == (2, "", 1), err
    assert "internal error" not in err and "Traceback" not in err
    return lines[0]


@pytest.mark.parametrize("how", [*DAMAGE])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "training.json"])
def test_a_damaged_drafter_is_named(
    capsys: pytest.CaptureFixture[str], place: Path, out: Path, name: str, how: str
) -> None:
    path = out / "drafter" / name
    path.write_bytes(DAMAGE[how](path.read_bytes()))
    ask = ["generate", "-p", "Hello", "--target", place, "--drafter", out / "drafter", "--max-new-tokens", 2]
    said = refused(capsys, *ask)
    assert name in said
    if how == "pointer":
        assert "git lfs pull" in said
    elif name == "training.json":
        assert f"'{path}'" in said and "delete it" in said
        path.unlink()
        assert run(capsys, *ask)[0] == 0, "as it told to go on"
    else:
        assert "msd train" in said


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"layers": "two"}, "'layers'"),
        ({"layers": 1.5}, "'layers'"),
        ({"rope_theta": float("nan")}, "NaN"),
        ({"taps": 3}, "'taps'"),
        ({"shapes": {"language": 3}}, "'shapes"),
        ({"heads": 0}, "has shape"),
        ({"hidden": -1}, "no network can be made"),
        ({"kind": "new"}, "'kind' is unknown; was it trained by a newer msd?"),
        ({"method": 5}, "names the method 5"),
        ({"depth": None}, "'depth'"),
    ],
)
def test_a_wrong_configuration_is_named(out: Path, change: dict[str, Any], part: str) -> None:
    path = out / "drafter" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=part):
        registry.register_folder(out / "drafter")


def test_weights_that_are_not_finite_are_refused(out: Path) -> None:
    path = out / "drafter" / "model.safetensors"
    tensors = load_file(path)
    tensors["fuse.weight"][0, 0] = float("nan")
    save_file(tensors, path)
    with pytest.raises(UserError, match=r"model\.safetensors' is damaged: tensor 'fuse\.weight' holds numbers"):
        registry.register_folder(out / "drafter")


@pytest.mark.parametrize(
    "thresholds", [[1], {"0.1": 3}, {"0.1": {"vision": "much"}}, {"0.1": {"vision": float("nan")}}, "none"]
)
def test_thresholds_of_another_form_are_refused(out: Path, thresholds: Any) -> None:
    checkpoint.save_training(out / "drafter", {"thresholds": thresholds})
    with pytest.raises(UserError, match="'thresholds' is no table of numbers; delete it"):
        registry.register_folder(out / "drafter")


@pytest.mark.parametrize("where", ["eagle2", "msd-ar", "video/msd", "wrecked"])
def test_one_damaged_rival_stops_no_other(out: Path, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only a request for the damaged drafter fails, and names it."""
    root = out / "weights"
    shutil.copytree(out / "drafter", root / "msd")
    (root / where).mkdir(parents=True)
    (root / where / "config.json").write_bytes(b"")
    monkeypatch.setattr(registry, "ROOTS", (root,))
    assert registry.create("ar").name == "ar" and registry.create("msd").name == "msd"
    assert "msd" in registry.methods()
    name = {"eagle2": "eagle2", "msd-ar": "msd:ar", "video/msd": "msd:video", "wrecked": "wrecked"}[where]
    with pytest.raises(UserError, match="unknown method 'wrecked'" if where == "wrecked" else f"{where}/config.json"):
        registry.create(name)


def loop(folder: Path, steps: int) -> Loop:
    torch.manual_seed(0)
    model = torch.nn.Linear(8, 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)

    def loss(step: int) -> tuple[torch.Tensor, dict[str, float]]:
        return model(torch.full((8,), step / 10)).square().sum(), {}

    return Loop(dict(model.named_parameters()), optimizer, loss, LoopConfig(steps, log_every=1), folder)


@pytest.mark.parametrize("how", DAMAGE)
def test_a_loop_resumes_from_the_previous_checkpoint(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, how: str
) -> None:
    for steps in (3, 5):
        whole = loop(tmp_path, steps)
        assert whole.run()
    newest, previous = whole.checkpoint, whole.previous
    saved = newest.read_bytes()
    newest.write_bytes(DAMAGE[how](saved))
    capsys.readouterr()
    again = loop(tmp_path, 5)
    assert again.step == 3
    (said,) = capsys.readouterr().err.splitlines()
    assert f"'{newest}' is damaged" in said and "going on from 'checkpoint.previous.pt', step 3" in said
    assert again.run() and all(torch.equal(again.params[n], whole.params[n]) for n in whole.params)
    for path in (newest, previous):
        path.write_bytes(DAMAGE[how](saved))
    with pytest.raises(UserError, match=r"checkpoint\.pt.*, and .*checkpoint\.previous\.pt.*; delete"):
        loop(tmp_path, 5)
    for path in (newest, previous):
        path.unlink()
    assert loop(tmp_path, 5).step == 0 and (tmp_path / "log.jsonl").read_bytes() == b"", "as it told to go on"


def test_training_resumes_from_the_previous_checkpoint(
    capsys: pytest.CaptureFixture[str], place: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    newest = out / "checkpoint.pt"
    run(capsys, *training(place, out, "--steps", STEPS + 2))
    expected = load_file(out / "drafter" / "model.safetensors")
    newest.write_bytes(newest.read_bytes()[:-1000])
    code, told, err = run(capsys, *training(place, out, "--steps", STEPS + 2))
    assert code == 0 and "damaged" not in err, "a finished run asks nothing of its checkpoints"
    (out / "drafter" / "training.json").unlink()
    code, told, err = run(capsys, *training(place, out, "--steps", STEPS + 2))
    assert code == 0, err
    (said,) = [line for line in err.splitlines() if line.startswith("msd: ")]
    assert f"'{newest}' is damaged" in said and f"step {STEPS}" in said
    again = load_file(out / "drafter" / "model.safetensors")
    assert all(torch.equal(expected[name], again[name]) for name in expected), "the same two steps once more"
    assert json.loads(told)["held_out"]
    for path in (newest, out / "checkpoint.previous.pt"):
        path.write_bytes(b"")
    said = refused(capsys, *training(place, out, "--steps", STEPS + 4))
    assert "checkpoint.pt" in said and "checkpoint.previous.pt" in said and "delete" in said


def test_checkpoints_of_another_kind_are_no_checkpoints(
    capsys: pytest.CaptureFixture[str], place: Path, out: Path
) -> None:
    path = out / "checkpoint.pt"
    state = torch.load(path, weights_only=True)
    name = next(iter(state["params"]))
    spoilt = {**state["params"], name: state["params"][name] * float("nan")}
    for change, part in (
        ({"params": spoilt}, "not finite"),
        ({"step": "six"}, "no checkpoint of a run"),
        ({"schedule": {**state["schedule"], "wave": 1}}, "another version of msd"),
        ({"params": {}}, "other parameters"),
        ({"params": {**state["params"], name: torch.zeros(1)}}, "other parameters"),
    ):
        torch.save(state | change, path)
        assert part in refused(capsys, *training(place, out, "--steps", STEPS + 1))
    torch.save({"params": torch.nn.Linear(2, 2)}, path)  # code in a pickle is not run
    assert "damaged" in refused(capsys, *training(place, out, "--steps", STEPS + 1))
    path.rename(out / "checkpoint.previous.pt")  # killed between putting the old one aside and the new one in place
    torch.save(state, out / "checkpoint.previous.pt")
    code, _, err = run(capsys, *training(place, out, "--steps", STEPS + 1))
    assert code == 0 and "there is no" in err and f"step {STEPS}" in err


@pytest.mark.parametrize("how", ["empty", "cut short", "pointer", "a list"])
def test_a_damaged_run_json_names_what_to_delete(
    capsys: pytest.CaptureFixture[str], place: Path, out: Path, how: str
) -> None:
    path = out / "run.json"
    whole = path.read_bytes()
    path.write_bytes(DAMAGE[how](whole))
    said = refused(capsys, *training(place, out, "--steps", STEPS + 1))
    assert f"'{path}' is damaged" in said and ("delete it" in said or "git lfs" in said)
    path.unlink()
    code, told, _ = run(capsys, *training(place, out, "--steps", STEPS + 1))
    assert code == 0 and json.loads(told)["steps"] == STEPS + 1
    assert path.read_bytes() == whole


def test_a_finished_run_restores_its_drafter(capsys: pytest.CaptureFixture[str], place: Path, out: Path) -> None:
    drafter = out / "drafter"
    before = {path.name: path.read_bytes() for path in drafter.iterdir()}
    for name in before:
        (drafter / name).write_bytes(before[name][:20])
        code, told, err = run(capsys, *training(place, out))
        assert code == 0 and json.loads(told)["held_out"], err
        assert ("seconds of earlier parts of the run are lost" in err) == (name == "training.json")
        assert (drafter / "model.safetensors").read_bytes() == before["model.safetensors"]
        assert (drafter / "config.json").read_bytes() == before["config.json"]


def test_logs_are_used_up_to_the_damage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = tmp_path / "log.jsonl"
    log.write_bytes(b'{"step": 1, "lr": 1.0, "loss": 2.0}\n\xff\xfe\n[1]\n{"step": 2, "val_all": 0.5}\n{"step": 3, "lr')
    training_rows, held_out = read_log(log)
    assert training_rows == [{"step": 1, "lr": 1.0, "loss": 2.0}] and held_out == [{"step": 2, "all": 0.5}]
    pytest.importorskip("matplotlib")
    draw(log, tmp_path / "curves.png")
    log.write_bytes(b"")
    draw(log, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("how", [*DAMAGE, "infinite", "newer"])
def test_damaged_thresholds_name_the_remedy(
    capsys: pytest.CaptureFixture[str], place: Path, tmp_path: Path, how: str
) -> None:
    answers, thresholds = tmp_path / "captured.jsonl", tmp_path / "captured.jsonl.cuts.json"
    for path in (answers, thresholds):
        path.write_bytes((place / path.name).read_bytes())
    whole = thresholds.read_text()
    changes = {"infinite": {"vision_min": float("inf")}, "newer": {"of": "another version"}}
    spoilt = DAMAGE[how](whole.encode()) if how in DAMAGE else json.dumps(json.loads(whole) | changes[how]).encode()
    thresholds.write_bytes(spoilt)
    capturing = ["capture", "--data", place / "data.jsonl", "--images", place / "images", "--target", place]
    for command in (
        [*capturing, "--out", answers, "--max-new-tokens", 12],
        training(place, tmp_path / "run", captured=answers),
        ["bench", "--target", place, "--data", place / "data.jsonl", "--cuts", thresholds],
    ):
        said = refused(capsys, *command)
        assert str(thresholds) in said and ("when the file is deleted" in said or "git lfs" in said)
        assert thresholds.read_bytes() == spoilt
    thresholds.unlink()
    code, _, err = run(capsys, *capturing, "--out", answers, "--max-new-tokens", 12)
    assert code == 0, err
    assert ModalityThresholds.load(thresholds) == ModalityThresholds.model_validate_json(whole)


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"gain": [float("nan"), 0.0]}, "not a JSON object (NaN is not JSON)"),
        ({"gain": ["a", 0]}, "'gain' must be finite numbers"),
        ({"ids": ["5"]}, "'ids' and 'end' must be token ids"),
        ({"end": "2"}, "'ids' and 'end' must be token ids"),
        ({"image": [3]}, "'image' must be a list of file names"),
        ({"costs": [[0.1], [0.2]]}, "'costs' without 'events'"),
        ({"costs": [[0.1], [0.2, 0.3]], "events": "e.raw"}, "'costs' must be lists"),
        ({"costs": 3, "events": "e.raw"}, "'costs'"),
    ],
)
def test_a_damaged_answer_is_named(
    capsys: pytest.CaptureFixture[str], place: Path, tmp_path: Path, change: dict[str, Any], part: str
) -> None:
    good = {"image": [], "prompt": "a", "answer": "b", "ids": [5], "end": 2, "gain": [0, 0], "task": "", "split": "val"}
    path = tmp_path / "out.jsonl"
    path.write_text(json.dumps(good) + "\n" + json.dumps(good | change) + "\n")
    assert f"out.jsonl:2: {part}" in refused(capsys, *training(place, tmp_path / "run", captured=path))


def test_answers_without_gains_are_named(capsys: pytest.CaptureFixture[str], place: Path, tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    first, *rest = (place / "captured.jsonl").read_text().splitlines(keepends=True)
    without = {k: v for k, v in json.loads(first).items() if k != "gain"}
    path.write_text(json.dumps(without) + "\n" + "".join(rest))
    said = refused(
        capsys, "capture", "--data", place / "data.jsonl", "--images", place / "images", "--target", place,
        "--out", path, "--max-new-tokens", 12,
    )  # fmt: skip
    assert "no gain for each of its tokens; delete its line" in said


@pytest.mark.parametrize("how", [*DAMAGE, "other sizes", "nan", "zero"])
def test_damaged_costs_are_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    known = Costs((1, 9, 65), (64, 512), ((0.030, 0.034, 0.124), (0.030, 0.038, 0.147)))
    measured: list[int] = []
    monkeypatch.setattr(costs_of, "measure", lambda target: measured.append(1) or known)
    target = adapt(tiny.llava())
    assert costs(target, tmp_path) == costs(target, tmp_path) == known and len(measured) == 1
    (path,) = tmp_path.iterdir()
    raw = json.loads(path.read_text())
    changes = {
        "other sizes": {"nodes": [1, 9]},
        "nan": {"seconds": [[float("nan")] * 3, [0.03, 0.038, 0.147]]},
        "zero": {"seconds": [[0, 0.1, 0.2], [0.03, 0.038, 0.147]]},
    }
    path.write_bytes(DAMAGE[how](path.read_bytes()) if how in DAMAGE else json.dumps(raw | changes[how]).encode())
    assert costs(target, tmp_path) == known and len(measured) == 2
    assert costs(target, tmp_path) == known and len(measured) == 2, "and kept"
    path.unlink()
    path.mkdir()
    assert costs(target, tmp_path) == known and len(measured) == 3


@pytest.mark.parametrize("how", [*DAMAGE, "other fields", "no files"])
def test_a_damaged_manifest_causes_a_rebuild(tmp_path: Path, how: str) -> None:
    folder, built = tmp_path / "model", []

    def build(destination: Path) -> None:
        built.append(1)
        (destination / "weights").write_text("w")

    ensure(folder, build, needed_bytes=1)
    manifest = folder / MANIFEST
    whole = manifest.read_bytes()
    spoilt = {"other fields": b'{"weights": 3}', "no files": b"{}"}
    manifest.write_bytes(spoilt[how] if how in spoilt else DAMAGE[how](whole))
    assert not is_complete(folder)
    ensure(folder, build, needed_bytes=1)
    assert len(built) == 2 and manifest.read_bytes() == whole


@pytest.mark.parametrize("how", DAMAGE)
def test_damaged_checksums_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    path = tmp_path / "checksums.json"
    path.write_bytes(DAMAGE[how](folder.CHECKSUMS.read_bytes()))
    monkeypatch.setattr(folder, "CHECKSUMS", path)
    with pytest.raises(UserError, match=r"checksums\.json.*pip install"):
        folder.recorded()


@pytest.mark.parametrize("how", [*DAMAGE, "no fields"])
def test_a_damaged_target_is_named(place: Path, tmp_path: Path, how: str) -> None:
    folder = tiny_checkpoint.write(tmp_path)
    for path in sorted(folder.iterdir()):
        whole = path.read_bytes()
        path.write_bytes(b"{}" if how == "no fields" else DAMAGE[how](whole))
        if how == "no fields" and path.name in ("generation_config.json", "tokenizer_config.json"):
            load_target(folder)
        else:
            with pytest.raises(UserError, match=r"target '.*'") as said:
                load_target(folder)
            assert how == "no fields" or path.name in str(said.value)
        path.write_bytes(whole)


def test_small_readers(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    for text, part in (
        ('{"a": 1', "cut short"), ('{"a": "b', "cut short"), ("{a: 1}", "not JSON"), ('{"a": Infinity}', "Infinity"),
        ('{"a": 1e999}', "1e999"), ("[" * 100_000, "nested too deep"), ("\ufeff{}", "not JSON"),
    ):  # fmt: skip
        path.write_text(text, encoding="utf-8")
        with pytest.raises(UserError, match=f"x.json' is damaged: .*{part}.*; do this"):
            read_json(path, "do this")
    with pytest.raises(UserError, match=r"there is no file .*none\.json'; do this"):
        read_json(tmp_path / "none.json", "do this")
    with pytest.raises(UserError, match="Is a directory; do this"):
        read_json(tmp_path, "do this")
    path.write_text('{"a": NaN}\n\n{"b"\n')
    rows, damaged = read_rows(path, "")
    assert len(rows) == 1 and damaged == 1
