"""A run interrupted by Ctrl-C, a kill or a full disk keeps its work, and the same command resumes it."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny_checkpoint
from msd.bench import measure
from msd.bench.data import load_data
from msd.certify import certificate
from msd.drafters.algorithms.msd import DraftObjective
from msd.errors import UserError
from msd.model import SpeculativeVLM
from msd.system.files import PARTIAL, check_place, exclusive, write_whole
from msd.train.capture import Answer, Prompt, capture
from msd.train.loop import Loop, LoopConfig
from training_command import FLOAT32, run, train

ASK = ("Describe it.", "What is it?")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A target with captured answers, and four data lines about its photos."""
    folder = tiny_checkpoint.captured(tmp_path_factory.mktemp("kept"))
    lines = [{"image": f"{i}.png", "prompt": prompt, "task": "see"} for i in (0, 1) for prompt in ASK]
    (folder / "ask.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture(autouse=True)
def no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes reports quick to write."""
    monkeypatch.setattr("msd.bench.plots.all_of", lambda results: {})
    monkeypatch.setattr("msd.bench.measure.outside_kernels", lambda target: None)


def options(place: Path, *more: object) -> list[object]:
    return ["--target", place, "--data", place / "ask.jsonl", "--method", "prompt-lookup", "--max-new-tokens", 6, *more]


def bench(place: Path, out: Path, *more: object) -> list[object]:
    return ["bench", *options(place, "--out", out, "--backend", "plain", "--json", *more)]


def stop_at(monkeypatch: pytest.MonkeyPatch, call: int, error: BaseException) -> None:
    """Makes our loop raise `error` in its `call`-th answer from now on."""
    generate, calls = SpeculativeVLM.generate, []

    def stopped(self: SpeculativeVLM, *args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == call:
            raise error
        return generate(self, *args, **kwargs)

    monkeypatch.setattr(SpeculativeVLM, "generate", stopped)


@contextmanager
def small_files(size: int) -> Iterator[None]:
    """No file grows beyond `size` bytes, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def one_line(err: str) -> str:
    """Returns the only line for the user."""
    lines = [line for line in err.splitlines() if line.startswith("msd: ")]
    assert len(lines) == 1 and "internal error" not in err and "Traceback" not in err, err
    return lines[0]


def test_the_page_of_an_interrupted_bench_has_plots(
    capsys: pytest.CaptureFixture[str], place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    stop_at(monkeypatch, 8, KeyboardInterrupt())
    code, _, _ = run(capsys, *bench(place, tmp_path, "--cuts", place / "captured.jsonl.cuts.json"))
    assert code == 130 and "<svg" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize("stop", [KeyboardInterrupt(), RuntimeError("out of luck"), UserError("a bad picture")])
def test_an_interrupted_bench_has_results_and_is_resumed(
    capsys: pytest.CaptureFixture[str],
    place: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stop: BaseException,
) -> None:
    out = tmp_path / "out"
    thresholds = ("--cuts", place / "captured.jsonl.cuts.json")
    with monkeypatch.context() as patch:
        stop_at(patch, 8, stop)  # two of each to warm up and for two samples, then one
        code, _, err = run(capsys, *bench(place, out, *thresholds))
    assert code == {KeyboardInterrupt: 130, RuntimeError: 1, UserError: 2}[type(stop)]
    assert "2 of 4 samples" in err.splitlines()[-1] and "run the same command to resume" in err
    part = json.loads((out / "results.json").read_text())
    assert part["environment"]["broken_off"] == "2 of 4 samples"
    assert {row["samples"] for row in part["rows"]} == {2}
    assert "Interrupted: 2 of 4 samples" in (out / "report.md").read_text()

    asked: list[int] = []
    ask_all = measure.Bench._ask_all
    monkeypatch.setattr(measure.Bench, "_ask_all", lambda self, n, *a: asked.append(n) or ask_all(self, n, *a))
    code, output, err = run(capsys, *bench(place, out, *thresholds))
    assert code == 0 and "resuming the run" in err
    assert asked == [2, 2, 3], "the first of those left warms up"
    whole = json.loads((out / "results.json").read_text())
    assert json.loads(output) == whole
    assert "broken_off" not in whole["environment"]
    assert {row["samples"] for row in whole["rows"]} == {4} and {row["identical"] for row in whole["rows"]} == {1.0}
    for way, seconds in part["sample_seconds"].items():
        assert whole["sample_seconds"][way][:2] == seconds, "what was measured stays"
    row = next(r for r in whole["rows"] if r["method"] == "prompt-lookup")
    assert row["acceptance_by_modality"] is not None and whole["target_top_mass"]["all"] is not None
    assert sorted(path.name for path in out.iterdir()) == ["report.html", "report.md", "results.json"]


def test_a_killed_bench_is_resumed_only_with_equal_settings(
    capsys: pytest.CaptureFixture[str], place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        stop_at(patch, 8, KeyboardInterrupt())
        run(capsys, *bench(place, out))
    kept = out / "unfinished.jsonl"
    kept.write_bytes(kept.read_bytes()[:-40])  # killed while it wrote the second sample
    whole = kept.read_bytes()
    data = (place / "ask.jsonl").read_text()
    for more, part in ((("--limit", 3), "data"), (("--temperature", 1), "temperature"), (("--warm",), "warm")):
        code, _, err = run(capsys, *bench(place, out, *more))
        assert code == 2 and part in one_line(err) and f"delete '{kept}'" in err
        assert kept.read_bytes() == whole
    (place / "ask.jsonl").write_text(data.replace("What is it?", "Who is it?"))
    code, _, err = run(capsys, *bench(place, out))
    (place / "ask.jsonl").write_text(data)
    assert code == 2 and "with data" in one_line(err)
    code, _, err = run(capsys, *bench(place, out))
    assert code == 0 and "1 damaged lines are measured again" in err
    kept.write_text("no log\n")
    code, _, err = run(capsys, *bench(place, out))
    assert code == 2 and f"delete '{kept}'" in one_line(err)


def test_a_bench_on_a_full_disk_is_resumed(capsys: pytest.CaptureFixture[str], place: Path, tmp_path: Path) -> None:
    with small_files(6000):
        code, _, err = run(capsys, *bench(place, tmp_path))
    said = one_line(err)
    assert code == 2 and "unfinished.jsonl': File too large; free some space" in said and "of 4 samples" in said
    assert [path.name for path in tmp_path.iterdir()] == ["unfinished.jsonl"]
    code, output, err = run(capsys, *bench(place, tmp_path))
    assert code == 0 and "resuming the run" in err and "broken_off" not in json.loads(output)["environment"]


def test_an_interrupted_bench_without_out_prints_its_results(
    capsys: pytest.CaptureFixture[str], place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_at(monkeypatch, 8, KeyboardInterrupt())
    code, output, err = run(capsys, "bench", *options(place, "--backend", "plain", "--json"))
    assert code == 130 and "with --out" in one_line(err)
    assert json.loads(output)["environment"]["broken_off"] == "2 of 4 samples"


@pytest.mark.parametrize("command", ["bench", "verify"])
def test_sigterm_interrupts_like_ctrl_c(
    capsys: pytest.CaptureFixture[str], place: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    generate, calls = SpeculativeVLM.generate, []

    def stopped(self: SpeculativeVLM, *args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 8:
            os.kill(os.getpid(), signal.SIGTERM)
        return generate(self, *args, **kwargs)

    monkeypatch.setattr(SpeculativeVLM, "generate", stopped)
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        code, output, err = run(capsys, command, *options(place, "--backend", "plain", "--json"))
    finally:
        signal.signal(signal.SIGTERM, before)
    assert code == 130 and "interrupted" in one_line(err) and json.loads(output)


def test_an_interrupted_certificate_has_not_passed(
    capsys: pytest.CaptureFixture[str], place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(certificate, "SETTINGS", {"greedy": certificate.GREEDY})
    with monkeypatch.context() as patch:
        stop_at(patch, 3, KeyboardInterrupt())
        code, output, err = run(capsys, "verify", *options(place, "--json"))
    assert code == 130 and "interrupted after 2 comparisons" in one_line(err)
    assert "2 of 4 samples: prompt-lookup 2 of 2 identical" in err.splitlines(), "printed as they come"
    (row,) = json.loads(output)["rows"]
    assert (row["compared"], row["identical"], row["passed"], row["finished"]) == (2, 2, False, False)
    with monkeypatch.context() as patch:
        stop_at(patch, 3, KeyboardInterrupt())
        _, output, _ = run(capsys, "verify", *options(place))
    assert "not yet" in output
    code, output, _ = run(capsys, "verify", *options(place, "--json"))
    (row,) = json.loads(output)["rows"]
    assert code == 0 and row["passed"] and "finished" not in row


@pytest.mark.parametrize("command", ["bench", "verify"])
@pytest.mark.parametrize(
    ("line", "part"),
    [
        ({"image": "broken.png", "prompt": "What is it?"}, "broken.png"),
        ({"image": "0.png", "prompt": "a <image> b"}, "reserves"),
        ({"image": "0.png", "prompt": "long " * 120}, "context"),
        ({"image": "0.png", "turns": ["What is it?", "a <image> b"]}, "reserves"),
        ({"image": "0.png", "events": "broken.png", "prompt": "What is it?"}, "broken.png"),
    ],
)
def test_a_bad_line_is_named_before_anything_is_answered(
    capsys: pytest.CaptureFixture[str],
    place: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    command: str,
    line: dict[str, Any],
    part: str,
) -> None:
    monkeypatch.setattr(SpeculativeVLM, "generate", None)
    (place / "images" / "broken.png").write_bytes(b"no picture")
    data, out = tmp_path / "bad.jsonl", tmp_path / "out"
    data.write_text(json.dumps({"image": "0.png", "prompt": "What is it?"}) + "\n\n" + json.dumps(line) + "\n")
    more = ["--data", data, "--images", place / "images", *(["--out", out] if command == "bench" else [])]
    code, output, err = run(capsys, command, *options(place, *more))
    assert (code, output) == (2, "")
    assert "bad.jsonl:3: " in one_line(err) and part in err
    assert not list(out.glob("*"))


def test_outputs_are_checked_before_they_are_audited(
    capsys: pytest.CaptureFixture[str], place: Path, tmp_path: Path
) -> None:
    outputs, good = tmp_path / "outputs.jsonl", {"image": "0.png", "prompt": "What is it?", "tokens": [5]}
    for bad, part in (({"tokens": [10**6]}, "token 1000000 is not one"), ({"text": 5, "tokens": None}, "must be text")):
        outputs.write_text(json.dumps(good) + "\n" + json.dumps(good | bad) + "\n")
        code, output, err = run(
            capsys, "verify", "--target", place, "--outputs", outputs, "--images", place / "images"
        )  # fmt: skip
        assert (code, output) == (2, "") and "outputs.jsonl:2: " in one_line(err) and part in err


def test_an_unwritable_out_is_found_before_any_work(
    capsys: pytest.CaptureFixture[str], place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("msd.loading.load_target", None)
    (tmp_path / "file").write_text("mine")
    captured = ["--captured", place / "captured.jsonl", "--images", place / "images"]
    for out in (tmp_path / "file", tmp_path / "file" / "deep"):
        for command in (bench(place, out), ["train", *captured, "--target", place, "--out", out]):
            code, output, err = run(capsys, *command)
            assert (code, output) == (2, "") and f"cannot write '{out}'" in one_line(err)
    for out in (tmp_path, tmp_path / "file" / "deep.jsonl"):
        code, _, err = run(capsys, "capture", "--target", place, "--data", place / "ask.jsonl", "--out", out)
        assert code == 2 and f"cannot write '{out}'" in one_line(err)
    code, _, err = run(capsys, "inspect", place / "images" / "0.png", "-p", "?", "-o", "/proc/trace.html")
    assert code == 2 and "cannot write '/proc/trace.html'" in one_line(err)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]
    assert (tmp_path / "file").read_text() == "mine"


def test_a_full_disk_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    write_whole(path, "old")
    with small_files(1000):
        with pytest.raises(UserError, match=r"cannot write .*results\.json': File too large; free some space"):
            write_whole(path, "new" * 1000)
        with pytest.raises(UserError, match="free some space"):
            check_place(tmp_path / "more" / "out.json")
    (tmp_path / "folder").mkdir()
    for place in (tmp_path / "folder", path / "x", tmp_path / "none" / "x", tmp_path / ("n" * 300), Path("/proc/x")):
        with pytest.raises(UserError, match="cannot write"):
            write_whole(place, "new")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["folder", "results.json"]
    assert path.read_text() == "old"


def test_links_stay_and_devices_are_written_to(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("real")
    write_whole(tmp_path / "link", "τ")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real").read_bytes() == "τ".encode()
    (tmp_path / "real").chmod(0o640)
    write_whole(tmp_path / "link", "new")
    assert (tmp_path / "real").stat().st_mode & 0o777 == 0o640
    write_whole("/dev/null", "gone")
    assert Path("/dev/null").is_char_device()


def test_one_process_writes_a_place(tmp_path: Path) -> None:
    def write(prompts: Any) -> list[Answer]:
        with pytest.raises(UserError, match="another process is writing"):
            capture([Prompt("b")], write, tmp_path / "out.jsonl")
        return [Answer(p.text, (5,), True) for p in prompts]

    assert len(capture([Prompt("a")], write, tmp_path / "out.jsonl")) == 1
    with exclusive(tmp_path), pytest.raises(UserError, match="another process"), exclusive(tmp_path):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["out.jsonl"]


def loop(folder: Path, steps: int, size: int = 8) -> Loop:
    torch.manual_seed(0)
    model = torch.nn.Linear(size, 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    config = LoopConfig(steps, log_every=1, save_seconds=1e9)
    return Loop(
        dict(model.named_parameters()),
        optimizer,
        lambda s: (model(torch.ones(size)).square().sum(), {}),
        config,
        folder,
    )


def test_a_checkpoint_that_does_not_fit_leaves_the_old_one(tmp_path: Path) -> None:
    made = loop(tmp_path, 2, 100_000)
    made.run()
    before = made.checkpoint.read_bytes()
    with small_files(100_000), pytest.raises(UserError, match=r"cannot write .*checkpoint\.pt'.*full"):
        made.save()
    assert made.checkpoint.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint.pt", "log.jsonl"]
    assert loop(tmp_path, 2, 100_000).step == 2


def test_a_capture_on_a_full_disk_keeps_what_is_whole(tmp_path: Path) -> None:
    path, asked = tmp_path / "out.jsonl", []

    def write(prompts: Any) -> list[Answer]:
        asked.extend(prompts)
        return [Answer("x" * 400, (5,), True) for _ in prompts]

    prompts = [Prompt(str(i)) for i in range(8)]
    with small_files(1500), pytest.raises(UserError, match="free some space"):
        capture(prompts, write, path, batch=1)
    assert len(asked) == 3
    assert len(capture(prompts, write, path, batch=1)) == 8
    assert len(asked) == 9, "two were whole"
    assert len({json.loads(line)["prompt"] for line in path.read_text().splitlines()}) == 8


def test_reading_a_capture_changes_nothing(tmp_path: Path) -> None:
    from msd.train.capture import pending

    path = tmp_path / "out.jsonl"
    capture([Prompt("a")], lambda ps: [Answer("x", (5,), True) for _ in ps], path)
    whole = path.read_bytes()
    for end in (b'{"image": [], "pro', bytes(40)):
        path.write_bytes(whole + end)
        assert len(pending([Prompt("a"), Prompt("b")], path)) == 1
        assert path.read_bytes() == whole + end
    path.write_bytes(whole.rstrip(b"\n"))  # as some editors leave it
    records = capture([Prompt("a"), Prompt("b")], lambda ps: [Answer("y", (6,), True) for _ in ps], path)
    assert [r["answer"] for r in records] == ["x", "y"] and path.read_bytes().startswith(whole)


def test_a_killed_training_run_is_resumed(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, never = tmp_path / "run", 10**6
    command = [
        sys.executable, "-m", "msd", "train", "--captured", place / "captured.jsonl", "--images", place / "images",
        "--target", place, "--out", out, "--steps", never, "--batch", 3, "--draft-vocabulary", 100, *FLOAT32,
    ]  # fmt: skip
    with (tmp_path / "said").open("wb") as said:
        process = subprocess.Popen([str(c) for c in command], stdout=said, stderr=said)
        try:
            log = out / "log.jsonl"
            while not log.exists() and process.poll() is None:
                time.sleep(0.05)
            code, _, err = run(
                capsys, "train", "--captured", place / "captured.jsonl", "--images", place / "images",
                "--target", place, "--out", out,
            )  # fmt: skip
        finally:
            process.kill()
            process.wait()
    assert log.exists(), (tmp_path / "said").read_text()
    assert code == 2 and "another process is writing" in one_line(err)
    (out / f"{PARTIAL}0").write_bytes(bytes(9))
    with log.open("ab") as file:
        file.write(b'{"step": 99, "lr"')
    output = train(capsys, place, out, *FLOAT32)
    assert output["finished"] and not list(out.glob(f"{PARTIAL}*"))
    steps = [json.loads(line)["step"] for line in log.read_text().splitlines()]
    assert max(steps) == output["steps"] and steps == sorted(steps)


def test_a_diverged_run_keeps_its_checkpoint(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    train(capsys, place, tmp_path, *FLOAT32)
    forward = DraftObjective.forward

    def diverged(self: DraftObjective, *args: Any) -> Any:
        loss, parts = forward(self, *args)
        return loss * float("inf"), parts

    monkeypatch.setattr(DraftObjective, "forward", diverged)
    before = (tmp_path / "checkpoint.pt").read_bytes()
    code, _, err = run(
        capsys, "train", "--captured", place / "captured.jsonl", "--images", place / "images", "--target", place,
        "--out", tmp_path, "--steps", 9, "--batch", 3, "--draft-vocabulary", 100, *FLOAT32,
    )  # fmt: skip
    assert code == 2 and "diverged; start again" in one_line(err)
    assert (tmp_path / "checkpoint.pt").read_bytes() == before
    code, _, err = run(
        capsys, "train", "--captured", place / "captured.jsonl", "--images", place / "images", "--target", place,
        "--out", tmp_path, "--steps", 3, "--batch", 3, "--draft-vocabulary", 100, *FLOAT32,
    )  # fmt: skip
    assert code == 2 and "cannot end at step 3" in one_line(err)


def test_equal_prompts_and_files_have_equal_digests(place: Path, tmp_path: Path) -> None:
    from msd.bench.conversation import digest

    samples = load_data(place / "ask.jsonl")
    assert digest(samples) == digest(load_data(place / "ask.jsonl")) != digest(samples[:3])
    other = tmp_path / "images"
    tiny_checkpoint.photos(other, 2)
    moved = load_data(place / "ask.jsonl", other)
    assert digest(moved) == digest(samples), "the same pictures elsewhere"
    (other / "1.png").replace(other / "0.png")
    (other / "1.png").write_bytes((other / "0.png").read_bytes())
    assert digest(load_data(place / "ask.jsonl", other)) != digest(samples)


def test_a_resumed_bench_keeps_its_backend(
    capsys: pytest.CaptureFixture[str], place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every process measures which backend is faster, and on a busy machine the result varies."""
    command = [a if a != "plain" else "measure" for a in bench(place, tmp_path)]
    for fused, call in ((True, 8), (False, None)):
        with monkeypatch.context() as patch:
            patch.setattr("msd.backends.comparison.faster", lambda model, calls, fused=fused: (1,) if fused else ())
            if call is not None:
                stop_at(patch, call, KeyboardInterrupt())
            code, output, err = run(capsys, *command)
    assert code == 0 and "resuming the run" in err
    assert json.loads(output)["environment"]["backend"] == "fused"


def test_the_error_and_the_saved_work_are_one_line(
    capsys: pytest.CaptureFixture[str], place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for error, code in (
        (RuntimeError("can't allocate memory"), 2),
        (OSError(28, "No space left on device"), 2),
        (RuntimeError("ours"), 1),
    ):
        with monkeypatch.context() as patch:
            stop_at(patch, 8, error)
            found, _, err = run(capsys, *bench(place, tmp_path / str(error)))
        assert found == code and err.count("\n") == 1 and "2 of 4 samples are measured and kept in" in err, err


def test_a_capture_cannot_be_resumed_in_a_device(
    capsys: pytest.CaptureFixture[str], place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reading a device never ends."""
    monkeypatch.setattr("msd.loading.load_target", None)
    code, _, err = run(capsys, "capture", "--target", place, "--data", place / "ask.jsonl", "--out", "/dev/null")
    assert code == 2 and "'/dev/null' is not a regular file" in one_line(err)


def test_a_name_that_no_file_can_have(capsys: pytest.CaptureFixture[str], place: Path) -> None:
    code, _, err = run(capsys, "inspect", place / "images" / "0.png", "-p", "?", "-o", "x" * 300)
    assert code == 2 and "name too long" in one_line(err)
