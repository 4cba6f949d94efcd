"""Trains a draft network for a target on captured answers, and saves it to a folder that decoding can load.

The method (`msd.drafters.registry`) defines the network, the loss and the training stages. Runs are resumable (see
`train.loop`). With `accelerate launch`, each process trains on its share of a step's answers; the main process writes.
"""

from __future__ import annotations

import hashlib
import json
import math
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn

from msd import formats
from msd.backends.packed import faster_in_bf16
from msd.drafters import registry
from msd.drafters.auxiliary import FRAMES, SPANS
from msd.drafters.toolkit import checkpoint
from msd.drafters.toolkit.network import DraftNetwork
from msd.drafters.toolkit.variant import PLAIN
from msd.errors import UserError
from msd.events.auxiliary import event_tokens
from msd.inputs.prompts import prepare
from msd.labels.gain import assert_images_matter
from msd.labels.label_thresholds import ModalityThresholds
from msd.system.files import check_place, exclusive, make_folder, read_json, remove_leftovers, write_whole
from msd.targets import Target, adapt
from msd.targets.taps import output_layer
from msd.train.capture import Captured
from msd.train.held_out import HeldOutAcceptance
from msd.train.launched import launched
from msd.train.loop import Loop, LoopConfig, Sink, StepLoss
from msd.train.losses.msd import LossConfig
from msd.train.split_target import is_split
from msd.train.teacher_batches import PublishedStages, Stages, TeacherBatches, TeacherCache

REPAIR = "delete it, and run the command once with the run's own settings"
PRECISIONS = ("measure", "bf16", "float32")
UNCHECKED = ("steps", "evaluate_every", "remember", "keep_at")  # settings that a resumed run may change
START_SETTINGS = ("form", "layers", "parts")  # fixed by a start drafter, as its method is
EVENT_ENTRIES = 3  # context entries that the drafter keeps of the temporal tokens, of the spatial ones, and of motion


@dataclass(frozen=True)
class DraftTraining:
    """Settings of a training run.

    form: of an `msd` network, "block" or "ar". layers: decoder layers of the trunk, by default the method's own number.
    batch: answers per step. anchors: maximum number of positions per answer and step that drafts start from (roots), by
    default the method's. parts: of the network, from its `parts`; by default the method's own. text_only: stage 1
    alone. precision: of matrix products in training, "float32" (that of the weights), "bf16" (autocast) or "measure"
    (bf16 where it is clearly faster); held-out figures always use that of the weights. remember: gigabytes for cached
    target outputs; it changes no result. method: a name in the registry; all but "msd" have the published form, parts,
    loss and stages. start: folder or hub id of a head of this method to start from, ours or published, which keeps its
    form and vocabulary and begins in stage 2; the name of a method instead of a folder, such as "mtp", starts from what
    the target's checkpoint brings for it. events: give `msd` the event recordings of the answers. keep_at: numbers of
    steps after which the drafter is also saved to `step-N/drafter` in the run's folder, calibrated like a finished one;
    the learning rate has not decayed to its end there. engine: the one that is to serve the drafter, "vllm" or
    "sglang": image positions have what it gives there. text_share: of the steps of stage 2, that trains on text-only
    answers in the end; by default the method's.
    """

    form: str = "block"
    layers: int | None = None
    steps: int = 4000
    batch: int = 4
    anchors: int | None = None
    lr: float = 1e-3
    draft_vocabulary: int = 4096
    seed: int = 0
    parts: tuple[str, ...] | None = None
    text_only: bool = False
    precision: str = "measure"
    remember: float = 1.2
    loss: LossConfig = field(default_factory=LossConfig)
    stages: Stages = field(default_factory=Stages)
    evaluate_every: int = 500
    method: str = "msd"
    start: str | None = None
    events: bool = True
    keep_at: tuple[int, ...] = ()
    engine: str | None = None
    text_share: float | None = None

    def __post_init__(self) -> None:
        changed = {f.name for f in fields(self) if f.name in START_SETTINGS and getattr(self, f.name) != f.default}
        if self.start is not None and changed:
            raise UserError("a start drafter fixes the method, form, layers and parts; leave these settings out")
        kind = registry.trainable(self.method) if self.start is None else registry.startable(self.method)
        unsupported = ("form" in changed and not kind.forms) or ("parts" in changed and not kind.parts)
        if unsupported or (self.loss.weighting != LossConfig.weighting and not kind.parts):
            raise UserError(
                f"form, weighting and parts are settings of msd; method '{self.method}' is trained as published"
            )
        if self.engine is not None:
            formats.engine_named(self.engine).check_method(self.method)
        if self.text_only and self.text_share is not None:
            raise UserError("a run on texts alone has no share of them; leave out text_share or text_only")
        late = [step for step in self.keep_at if not 0 < step <= self.steps]
        if late:
            raise UserError(f"a run of {self.steps} steps cannot save its drafter at step {late[0]}")


def train(
    model: Any,
    processor: Any,
    captured: Sequence[Captured],
    held_out: Sequence[Captured],
    thresholds: ModalityThresholds,
    out: Path,
    settings: DraftTraining,
    sink: Sink | None = None,
    cache: TeacherCache | None = None,
) -> bool:
    """Trains a drafter to `out/drafter`. Returns False if a signal stopped the run; call it again to resume.

    sink: receives each row of the log. cache: shared by runs on the same answers; it must hold all layers that this
    run's network reads. A finished run is left unchanged. All processes of a split target measure the drafter, else
    the main one. Raises UserError if images do not change the target's logits, if `out` holds a run with other
    settings, data or target, or if another process trains there.
    """
    accelerator = launched(model.device, settings.batch)
    main, split = accelerator.is_main_process, is_split(model)
    measures = main or split
    with _exclusive_folder(out) if main else nullcontext():
        model.requires_grad_(False)
        settings = broadcast_object_list([resolve_precision(settings, out, model.device) if main else settings])[0]
        network = initial_network(adapt(model), captured, settings, processor).to(model.device)
        _check_same_run(out, settings, network, thresholds)
        earlier = _read_record(out / "drafter")
        if earlier.get("finished") == settings.steps and checkpoint.is_whole(out / "drafter"):
            return True
        head, ids, taps = output_layer(model), network.ids, network.config.taps
        target, cache = adapt(model, taps), cache or TeacherCache(head, ids, taps, settings.remember, together=split)
        _check_images_matter(target, processor, captured)
        batches = TeacherBatches(
            adapt(model, cache.layers), processor, captured, thresholds, cache.view(ids, taps), settings.batch,
            _stages(network, settings), settings.seed, (accelerator.process_index, accelerator.num_processes),
            torch.bfloat16 if settings.precision == "bf16" else None,
        )  # fmt: skip
        exact = TeacherCache(head, ids, taps, 0.1 * settings.remember, torch.float32, split)
        objective = network.objective(settings.loss, _end_tokens(model)).to(model.device)
        test_batches = TeacherBatches(target, processor, held_out, thresholds, exact, settings.batch)
        evaluate = HeldOutAcceptance(objective, test_batches, held_out)
        shared = accelerator.prepare_model(objective)  # the objective itself if this is the only process
        begun = time.monotonic()
        count = settings.anchors or network.roots
        step_loss = _step_loss(shared, batches, count, network.prompt_roots)
        source = {"cuts": thresholds.model_dump(), "answers": len(captured), "processes": accelerator.num_processes}

        def save(folder: Path, complete: bool = False) -> None:
            record = _record(settings, loop, source, evaluate, earlier, time.monotonic() - begun, complete)
            if main:
                checkpoint.save(network, folder, record)

        keep = {step: partial(_keep, network, partial(save, step_folder(out, step), True)) for step in settings.keep_at}
        own = (evaluate, keep) if measures else (None, {})
        loop = _loop(objective, step_loss, settings, out, own[0], accelerator.backward, main, sink, own[1])
        finished = loop.run()
        if measures:
            save(out / "drafter")
        accelerator.wait_for_everyone()
        return finished


def step_folder(out: Path, step: int) -> Path:
    """Returns where a run keeps the drafter that it had after `step` steps (`DraftTraining.keep_at`)."""
    return out / f"step-{step}" / "drafter"


def _keep(network: DraftNetwork, save: Callable[[], None]) -> None:
    """Saves the network in the middle of a run, and undoes what calibration changed, so that the run is the same."""
    before, calibration = {name: tensor.clone() for name, tensor in network.state_dict().items()}, network.calibration
    save()
    network.load_state_dict(before)
    network.calibration = calibration


@contextmanager
def _exclusive_folder(out: Path) -> Iterator[None]:
    """Creates the folder of a run, locks it for this process, and removes incomplete files of a killed one."""
    check_place(out, folder=True)
    make_folder(out)
    with exclusive(out):
        for folder in (out, out / "drafter", *out.glob("step-*/drafter")):
            remove_leftovers(folder)
        yield


def resolve_precision(settings: DraftTraining, out: Path, device: torch.device) -> DraftTraining:
    """Replaces the precision "measure" by that of the run in `out`, or else by the faster one on this machine."""
    if settings.precision not in PRECISIONS:
        raise UserError(f"precision '{settings.precision}' is unknown; choose one of {', '.join(PRECISIONS)}")
    if settings.precision != "measure":
        return settings
    run = out / "run.json"
    begun = read_json(run, REPAIR).get("precision", "float32") if run.exists() else None
    if not isinstance(begun, str | None):
        raise UserError(f"'{run}' is damaged: it holds the precision {begun!r}; {REPAIR}")
    return replace(settings, precision=begun or ("bf16" if faster_in_bf16(device) else "float32"))


def initial_network(
    target: Target, captured: Sequence[Captured], settings: DraftTraining, processor: Any = None
) -> DraftNetwork:
    """Returns the network that a run starts with. A reduced draft vocabulary holds the target's most frequent tokens.

    processor: the target's, for a drafter that reads event recordings.
    """
    if settings.start is not None:
        return _prepared(_start(target, settings.start, settings.method), settings)
    kind, config = registry.trainable(settings.method), target.text_config
    recording = next((c.events for c in captured if c.events), None)
    groups: tuple[tuple[int, int], ...] | None = None if recording is None else ()
    if recording is not None and processor and settings.events:
        spatial = len(event_tokens(target, processor, recording)) - FRAMES - SPANS
        groups = (FRAMES, EVENT_ENTRIES), (spatial, EVENT_ENTRIES), (SPANS, EVENT_ENTRIES)
    changes = kind.trained_as(settings, groups)
    if settings.layers is not None:
        changes["layers"] = settings.layers
    if kind.reduced:
        changes["draft_vocabulary"] = min(settings.draft_vocabulary, config.vocab_size)
    torch.manual_seed(settings.seed)
    network = kind.for_target(config, **changes)
    if kind.reduced:
        network.choose_draft_vocabulary(_frequent(captured, config.vocab_size, network.config.draft_vocabulary))
    network.begin_from(target.model)
    return _prepared(network.attach(target.model), settings)


def _prepared(network: DraftNetwork, settings: DraftTraining) -> DraftNetwork:
    if isinstance(network, DraftNetwork):
        network.add_ending()
    return network if settings.engine is None else formats.prepare(network, settings.engine)


def _start(target: Target, start: str, method: str) -> Any:
    """Returns the network of a start drafter: in a folder, on the hub, or in the target's own checkpoint."""
    model, native = target.model, registry.get(method).native_network
    if native is not None and start == method:
        return native.of(model)
    network = formats.load(start)
    if network.method != method:
        raise UserError(f"'{start}' holds no drafter of method '{method}' to start from")
    variant = getattr(network.config, "variant", PLAIN)
    if variant.head and network.config.draft_vocabulary < network.config.vocabulary:
        raise UserError(f"'{start}' drafts from a vocabulary of its own; its published loss needs all tokens")
    return network.attach(model).to(model.device, torch.float32).train()


def _frequent(captured: Sequence[Captured], vocabulary: int, size: int) -> Tensor:
    """Returns the ids of the `size` most frequent tokens of the answers, ascending.

    Ties go to the lower id: byte-pair vocabularies are sorted by frequency in general text.
    """
    tokens = torch.tensor([token for answer in captured for token in answer.ids], dtype=torch.long)
    counts = torch.bincount(tokens, minlength=vocabulary)
    return counts.sort(descending=True, stable=True).indices[:size].sort().values


def _check_same_run(out: Path, settings: DraftTraining, network: DraftNetwork, thresholds: ModalityThresholds) -> None:
    """Writes the settings of a new run to `run.json`. Raises UserError if those of an earlier run differ."""
    kept = {k: v for k, v in asdict(settings).items() if k not in UNCHECKED}
    ids = hashlib.sha256(network.ids.cpu().numpy().tobytes()).hexdigest()[:16]
    run = json.loads(
        json.dumps({"method": settings.method, **kept, "draft vocabulary": ids, "target": thresholds.target})
    )
    path = out / "run.json"
    if not path.exists():
        make_folder(out)
        write_whole(path, json.dumps(run, indent=1) + "\n")
        return
    earlier = {"method": "msd", "events": True, "engine": None, **read_json(path, REPAIR)}
    different = next((name for name in run if earlier.get(name) != run[name]), None)
    if different:
        raise UserError(
            f"'{out}' holds a run with {different} {earlier.get(different)!r}, not {run[different]!r}; "
            "use another folder"
        )


def _read_record(drafter: Path) -> dict[str, Any]:
    """Reads the record of earlier parts of the run; a damaged one is reported, and later replaced."""
    try:
        record = checkpoint.training(drafter)
    except UserError as error:
        print(f"msd: {str(error).partition(';')[0]}; the seconds of earlier parts of the run are lost", file=sys.stderr)
        return {}
    known = {name: record.get(name) for name in ("seconds", "peak_gigabytes")}
    numbers = {name: value for name, value in known.items() if isinstance(value, int | float) and math.isfinite(value)}
    return {"finished": record.get("finished"), **numbers}


def _check_images_matter(target: Target, processor: Any, captured: Sequence[Captured]) -> None:
    """Raises UserError unless other pixels change the target's logits, which the published Qwen2-VL teacher failed."""
    some = [c for c in captured if c.images][:2]
    if some:
        inputs = prepare(processor, [list(c.images) for c in some], [c.prompt for c in some])
        assert_images_matter(target, inputs, [c.ids for c in some])


def _stages(network: DraftNetwork, settings: DraftTraining) -> Stages:
    """Returns the stages of the method, or else of the settings."""
    if settings.text_only:
        return Stages(settings.steps, 1, 1.0)
    published = network.stages
    stages = settings.stages if published is None else PublishedStages.for_run(published, settings.steps)
    if settings.text_share is not None:
        stages = replace(stages, keep=settings.text_share)
    return stages if settings.start is None else Stages(0, 1, stages.keep)  # a start drafter has finished stage 1


def _end_tokens(model: Any) -> list[int]:
    """Returns the ids that end the target's answers."""
    ids = model.generation_config.eos_token_id
    return [] if ids is None else [ids] if isinstance(ids, int) else list(ids)


def _step_loss(objective: nn.Module, batches: TeacherBatches, roots: int, prompt_roots: int) -> StepLoss:
    """Returns the function that computes a step's loss and its parts, with speed and memory for the log."""
    begun, tokens = time.monotonic(), 0

    def step_loss(step: int) -> tuple[Tensor, Mapping[str, float]]:
        nonlocal tokens
        batch, labels = batches(step)
        lengths = [len(answer.ids) for answer in batches.answers_at(step)]
        tokens += sum(lengths)
        with torch.autocast(batches.target.model.device.type, batches.dtype, enabled=batches.dtype is not None):
            loss, parts = objective(batch, labels, batches.roots(batch, roots, prompt_roots, lengths))
        speed = {"answer_tokens_per_second": tokens / (time.monotonic() - begun), "peak_gb": peak_gigabytes()}
        return loss, {**parts, **speed}

    return step_loss


def _loop(objective: nn.Module, step_loss: StepLoss, settings: DraftTraining, *others: Any) -> Loop:
    """Returns the loop over the parameters of the objective. others: further arguments of `Loop`."""
    params = {n: p for n, p in objective.named_parameters() if p.requires_grad}
    warmup = min(20, 1 + settings.steps // 10)
    config = LoopConfig(settings.steps, settings.seed, warmup, clip=0.5, evaluate_every=settings.evaluate_every)
    return Loop(params, _optimizer(params, settings.lr), step_loss, config, *others)


def _optimizer(params: Mapping[str, nn.Parameter], lr: float) -> torch.optim.AdamW:
    """Returns AdamW with weight decay for matrices only, and a 30 times higher rate for the parameters of λ."""
    task = {n: p for n, p in params.items() if n.startswith("weights.")}
    others = [p for n, p in params.items() if n not in task]
    groups = [
        {"params": [p for p in others if p.dim() >= 2], "lr": lr, "weight_decay": 0.01},
        {"params": [p for p in others if p.dim() < 2], "lr": lr, "weight_decay": 0.0},
        {"params": list(task.values()), "lr": 30 * lr, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=lr, betas=(0.9, 0.95), fused=True)


def _record(
    settings: DraftTraining,
    loop: Loop,
    source: dict[str, Any],
    evaluate: HeldOutAcceptance,
    earlier: dict[str, Any],
    seconds: float,
    complete: bool,
) -> dict[str, Any]:
    """Returns the record that is saved with the weights. source: the training data. earlier: of this run's first parts.

    complete: measure and calibrate the drafter although the run is not finished. "before" is the history of the start
    drafter.
    """
    finished, before = loop.step >= loop.schedule.steps, None
    if complete or (finished and not evaluate.last):  # else the run was at its end already, but its record is lost
        evaluate()
    reports = evaluate.reports() if finished or complete else {}
    if settings.start is not None:
        start = checkpoint.training(settings.start)
        before = {name: start.get(name) for name in ("steps", "seconds", "answers", "before")}
    return {
        "settings": asdict(settings),
        "steps": loop.step,
        "finished": loop.step if finished else None,
        **source,
        "losses": loop.running,
        "held_out": evaluate.last,
        "seconds": earlier.get("seconds", 0.0) + seconds,
        "peak_gigabytes": max(earlier.get("peak_gigabytes", 0.0), peak_gigabytes()),
        "before": before,
        **reports,
    }


def peak_gigabytes() -> float:
    """Returns the peak resident memory of this process."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / 1e9
