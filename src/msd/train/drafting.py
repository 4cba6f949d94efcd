"""Training a draft network for a target from captured answers, to a folder that decoding loads.

What is trained, with which loss and in which stages, the method says (`msd.drafters.registry`). Resumable as
`train.loop` is. With `accelerate launch` every process trains on its own share of a step's answers; the first one
writes.
"""

from __future__ import annotations

import hashlib
import json
import math
import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from torch import Tensor, nn

from msd.backends.packed import faster_in_bf16
from msd.drafters import registry
from msd.drafters.auxiliary import FRAMES
from msd.drafters.toolkit import checkpoint
from msd.drafters.toolkit.network import DraftNetwork
from msd.drafters.toolkit.training import frequent
from msd.errors import UserError
from msd.events.auxiliary import event_tokens
from msd.inputs.prompts import prepare
from msd.labels.gain import assert_images_matter
from msd.labels.label_thresholds import ModalityThresholds
from msd.system.files import check_place, exclusive, make_folder, read_json, remove_leftovers, write_whole
from msd.targets import Target, adapt
from msd.train.capture import Captured
from msd.train.held_out import HeldOut
from msd.train.loop import Loop, LoopConfig
from msd.train.losses.msd import LossConfig
from msd.train.teacher_batches import PublishedStages, Stages, TeacherBatches, TeacherCache, token_counts

FORGET = "delete it, and give the run's own settings once more to go on"
PRECISIONS = ("measure", "bf16", "float32")
BROUGHT = ("method", "form", "layers", "off")  # settings that a drafter to start from brings
KEPT = 3  # context entries that the tokens of a recording leave, of the temporal ones and of the spatial ones


@dataclass(frozen=True)
class DraftTraining:
    """How a drafter is trained. anchors: positions per answer and step that drafts start from, at most.

    method: a name of the registry; all but "msd" have the published form, parts, loss and stages.
    layers: decoder layers of the trunk, the method's own number by default. off: parts of the network left out, names
    of its `parts`. text_only: stage 1 alone. precision: of matrix products, the target's and
    the network's, in training: "float32" (the weights' own), "bf16" (autocast) or "measure" (bf16 where it is clearly
    faster here); held-out figures are always taken with the weights' own. remember: gigabytes of memory for what the
    target computed for the answers, which changes no result. start: the folder of an `msd` drafter to go on from; it
    keeps its form, parts and vocabulary, and begins in stage 2. events: `msd` sees the event recordings that answers
    have.
    """

    form: str = "block"
    layers: int | None = None
    steps: int = 4000
    batch: int = 4
    anchors: int = 48
    lr: float = 1e-3
    draft_vocabulary: int = 4096
    seed: int = 0
    off: tuple[str, ...] = ()
    text_only: bool = False
    precision: str = "measure"
    remember: float = 1.2
    loss: LossConfig = field(default_factory=LossConfig)
    stages: Stages = field(default_factory=Stages)
    evaluate_every: int = 500
    method: str = "msd"
    start: str | None = None
    events: bool = True

    def __post_init__(self) -> None:
        given = {f.name for f in fields(self) if f.name in BROUGHT and getattr(self, f.name) != f.default}
        if self.start is not None and given:
            raise UserError(
                "a drafter to start from brings its method, form, layers and parts; leave these settings out"
            )
        kind = registry.trainable(self.method)
        own = ("form" in given and not kind.forms) or ("off" in given and not kind.parts)
        if own or (self.loss.weighting != "learned" and not kind.parts):
            raise UserError(
                f"form, weighting and parts to leave out are msd's; method '{self.method}' is trained as published"
            )


def train(
    model: Any,
    processor: Any,
    captured: Sequence[Captured],
    held_out: Sequence[Captured],
    thresholds: ModalityThresholds,
    out: Path,
    settings: DraftTraining,
    sink: Callable[[Mapping[str, float]], None] | None = None,
    notes: TeacherCache | None = None,
) -> bool:
    """Trains to `out/drafter`; False when it was asked to stop before the end (run it again to go on).

    `sink` is given every row of the log. `notes`: shared by runs on the same answers, of all layers that any of them
    reads. A finished run is left as it is. UserError when the target's images do not reach it, when `out` holds a
    run with other settings, data or target, or when another process trains there.
    """
    accelerator = Accelerator(
        cpu=model.device.type == "cpu", kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)]
    )
    if not accelerator.is_main_process:  # which alone writes
        return _train(accelerator, model, processor, captured, held_out, thresholds, out, settings, sink, notes)
    check_place(out, folder=True)
    make_folder(out)
    with exclusive(out):
        for folder in (out, out / "drafter"):
            remove_leftovers(folder)
        return _train(accelerator, model, processor, captured, held_out, thresholds, out, settings, sink, notes)


def _train(
    accelerator: Accelerator,
    model: Any,
    processor: Any,
    captured: Sequence[Captured],
    held_out: Sequence[Captured],
    thresholds: ModalityThresholds,
    out: Path,
    settings: DraftTraining,
    sink: Callable[[Mapping[str, float]], None] | None,
    notes: TeacherCache | None,
) -> bool:
    """As `train`, in one of its processes."""
    model.requires_grad_(False)
    settings = _settled(settings, out, model.device)
    network = untrained(adapt(model), captured, settings, processor).to(model.device)
    _check_same_run(out, settings, network, thresholds)
    before = _told_before(out / "drafter")
    if before.get("finished") == settings.steps and checkpoint.is_whole(out / "drafter"):
        return True
    taps = network.config.taps
    target = adapt(model, taps)
    _refuse_blind_targets(target, processor, captured)
    share = (accelerator.process_index, accelerator.num_processes)
    dtype = torch.bfloat16 if settings.precision == "bf16" else None
    head, ids = model.get_output_embeddings(), network.ids
    notes = notes or TeacherCache(head, ids, taps, settings.remember)
    teacher, notes, stages = adapt(model, notes.layers), notes.read_by(ids, taps), _stages(network, settings)
    teacher_batches = TeacherBatches(
        teacher, processor, captured, thresholds, notes, settings.batch, stages, settings.seed, share, dtype
    )
    objective = network.objective(settings.loss, _ends(model)).to(model.device)
    exact = TeacherCache(head, ids, taps, 0.1 * settings.remember, torch.float32)
    evaluate = HeldOut(
        objective, TeacherBatches(target, processor, held_out, thresholds, exact, settings.batch), held_out
    )
    shared = accelerator.prepare_model(objective)  # the objective itself, when this is the only process
    begun = time.monotonic()
    step_loss = _step_loss(
        shared, teacher_batches, min(settings.anchors, network.max_roots or settings.anchors), model, dtype
    )
    params = {n: p for n, p in objective.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(_groups(params, settings.lr), lr=settings.lr, betas=(0.9, 0.95))
    warmup = min(20, 1 + settings.steps // 10)
    config = LoopConfig(settings.steps, settings.seed, warmup, clip=0.5, evaluate_every=settings.evaluate_every)
    main = accelerator.is_main_process
    loop = Loop(params, optimizer, step_loss, config, out, evaluate, accelerator.backward, main, sink)
    finished = loop.run()
    if main:
        if finished and not evaluate.last:  # the run had ended, but what it told is lost
            evaluate()
        source = {"cuts": thresholds.model_dump(), "answers": len(captured)}
        told = _told(settings, loop, finished, source, evaluate, before, time.monotonic() - begun)
        checkpoint.save(network, out / "drafter", told)
    return finished


def _stages(network: DraftNetwork, settings: DraftTraining) -> Stages:
    """Those of the method, or else of the settings."""
    stages = settings.stages if network.stages is None else PublishedStages.of(network.stages, settings.steps)
    if settings.start is not None:  # it has the first stage behind it
        stages = Stages(0, 1, stages.keep)
    return Stages(settings.steps, 1, 1.0) if settings.text_only else stages


def _step_loss(
    objective: nn.Module, teacher_batches: TeacherBatches, anchors: int, model: Any, dtype: torch.dtype | None
) -> Callable[[int], tuple[Tensor, Mapping[str, float]]]:
    """The loss of a step and its parts, with speed and memory for the log. dtype: of autocast; None: no autocast."""
    begun, tokens = time.monotonic(), 0

    def step_loss(step: int) -> tuple[Tensor, Mapping[str, float]]:
        nonlocal tokens
        taught, labels = teacher_batches(step)
        tokens += sum(taught.lengths)
        with torch.autocast(model.device.type, dtype, enabled=dtype is not None):
            loss, parts = objective(taught, labels, teacher_batches.roots(taught, anchors))
        speed = {"answer_tokens_per_second": tokens / (time.monotonic() - begun), "peak_gb": peak_gigabytes()}
        return loss, {**parts, **speed}

    return step_loss


def _told(
    settings: DraftTraining,
    loop: Loop,
    finished: bool,
    source: dict[str, Any],
    evaluate: HeldOut,
    before: dict[str, Any],
    seconds: float,
) -> dict[str, Any]:
    """What is kept beside the weights. source: of the training data. before: what an earlier part of this run kept."""
    reports = evaluate.reports() if finished else {}
    return {
        "settings": asdict(settings),
        "steps": loop.step,
        "finished": loop.step if finished else None,
        **source,
        "losses": loop.running,
        "held_out": evaluate.last,
        "seconds": before.get("seconds", 0.0) + seconds,
        "peak_gigabytes": max(before.get("peak_gigabytes", 0.0), peak_gigabytes()),
        "before": None if settings.start is None else _history(checkpoint.training(settings.start)),
        **reports,
    }


def untrained(
    target: Target, captured: Sequence[Captured], settings: DraftTraining, processor: Any = None
) -> DraftNetwork:
    """The network that a run begins with; a draft vocabulary of its own is what the target writes most.

    processor: the target's; it encodes event recordings for a drafter that reads them.
    """
    kind, config = registry.trainable(settings.method), target.text_config
    if settings.start is not None:
        network = registry.load(settings.start)
        if not isinstance(network, kind):
            raise UserError(f"'{settings.start}' holds no drafter of method '{settings.method}' to go on from")
        return network.attach(target.model).to(target.model.device).train()
    auxiliary = None
    if any(c.events for c in captured):
        auxiliary = _event_groups(target, processor, captured) if processor and settings.events else ()
    changes = kind.trained_as(settings, auxiliary)
    if settings.layers is not None:
        changes["layers"] = settings.layers
    if kind.reduced:
        changes["draft_vocabulary"] = min(settings.draft_vocabulary, config.vocab_size)
    torch.manual_seed(settings.seed)
    network = kind.for_target(config, **changes)
    if kind.reduced:
        counts = token_counts(captured, config.vocab_size)
        network.choose_draft_vocabulary(frequent(counts, network.config.draft_vocabulary))
    network.begin_from(target.model)
    return network.attach(target.model)


def _event_groups(target: Target, processor: Any, captured: Sequence[Captured]) -> tuple[tuple[int, int], ...]:
    """Groups of tokens that a recording gives, temporal and spatial, with what is kept of each."""
    recording = next(c.events for c in captured if c.events)
    assert recording is not None
    given = len(event_tokens(target, processor, recording))
    return (FRAMES, KEPT), (given - FRAMES, KEPT)


def _history(told: Mapping[str, Any]) -> dict[str, Any]:
    """What the drafter that a run starts from had behind it."""
    return {name: told.get(name) for name in ("steps", "seconds", "answers", "before")}


def _ends(model: Any) -> list[int]:
    """Ids of the tokens that end the target's answers."""
    ids = model.generation_config.eos_token_id
    return [] if ids is None else [ids] if isinstance(ids, int) else list(ids)


def _groups(params: Mapping[str, nn.Parameter], lr: float) -> list[dict[str, Any]]:
    """Matrices with weight decay, the rest without; the few numbers behind λ move faster."""
    free = {n: p for n, p in params.items() if p.dim() < 2 and not n.startswith("weights.")}
    task = [p for n, p in params.items() if n.startswith("weights.")]
    matrices = [p for n, p in params.items() if n not in free and not n.startswith("weights.")]
    groups = [
        {"params": matrices, "lr": lr, "weight_decay": 0.01},
        {"params": list(free.values()), "lr": lr, "weight_decay": 0.0},
        {"params": task, "lr": 30 * lr, "weight_decay": 0.0},
    ]
    return [g for g in groups if g["params"]]


def _settled(settings: DraftTraining, out: Path, device: torch.device) -> DraftTraining:
    """The settings with a precision: what the run in `out` began with, or else what is faster here."""
    if settings.precision not in PRECISIONS:
        raise UserError(f"precision '{settings.precision}' is unknown; choose one of {', '.join(PRECISIONS)}")
    if settings.precision != "measure":
        return settings
    run = out / "run.json"
    begun = read_json(run, FORGET).get("precision", "float32") if run.exists() else None
    if not isinstance(begun, str | None):
        raise UserError(f"'{run}' is damaged: it holds the precision {begun!r}; {FORGET}")
    return replace(settings, precision=begun or ("bf16" if faster_in_bf16(device) else "float32"))


def _check_same_run(out: Path, settings: DraftTraining, network: DraftNetwork, thresholds: ModalityThresholds) -> None:
    """Notes what a run is made of, or compares with what was noted."""
    own = {k: v for k, v in asdict(settings).items() if k not in ("steps", "evaluate_every", "remember")}
    ids = hashlib.sha256(network.ids.cpu().numpy().tobytes()).hexdigest()[:16]
    run = json.loads(
        json.dumps({"method": settings.method, **own, "draft vocabulary": ids, "target": thresholds.target})
    )
    path = out / "run.json"
    if not path.exists():
        out.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(run, indent=1) + "\n")
        return
    noted = {"method": "msd", "events": True, **read_json(path, FORGET)}
    other = [k for k in run if noted.get(k) != run[k]]
    if other:
        name = other[0]
        raise UserError(f"'{out}' holds a run with {name} {noted.get(name)!r}, not {run[name]!r}; use another folder")


def _told_before(drafter: Path) -> dict[str, Any]:
    """What earlier parts of a run told of themselves, as far as it can be read; the run writes it anew."""
    try:
        told = checkpoint.training(drafter)
    except UserError as error:
        print(f"msd: {str(error).partition(';')[0]}; the seconds of earlier parts of the run are lost", file=sys.stderr)
        return {}
    known = {name: told.get(name) for name in ("seconds", "peak_gigabytes")}
    numbers = {name: value for name, value in known.items() if isinstance(value, int | float) and math.isfinite(value)}
    return {"finished": told.get("finished"), **numbers}


def _refuse_blind_targets(target: Target, processor: Any, captured: Sequence[Captured]) -> None:
    """The teacher test: other pixels must change the target's logits (the published Qwen2-VL teacher saw none)."""
    some = [c for c in captured if c.images][:2]
    if some:
        inputs = prepare(processor, [list(c.images) for c in some], [c.prompt for c in some])
        assert_images_matter(target, inputs, [c.ids for c in some])


def peak_gigabytes() -> float:
    """Peak resident memory of this process."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / 1e9
