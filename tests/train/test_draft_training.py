"""Training: draft networks learn, and acceptance in training equals acceptance in decoding."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import tiny
from msd.config import SpeculativeConfig
from msd.core.modality import FUSION, LANGUAGE, VISION
from msd.drafters import registry
from msd.drafters.algorithms.msd import MSD, SWITCHES, DraftObjective, MSDConfig, MSDNetwork
from msd.drafters.toolkit.training import all_roots
from msd.errors import UserError
from msd.model import SpeculativeVLM
from msd.targets import Target, adapt
from msd.targets.teacher import TeacherBatch, run_teacher
from msd.train import drafting
from msd.train.losses.msd import LossConfig, TaskWeights
from msd.train.teacher_batches import TeacherCache

FORMS = ["block", "ar"]
EVERY = dict.fromkeys(SWITCHES, True)
LENGTH = 24


def network(model: Any, form: str, **changes: Any) -> MSDNetwork:
    config = MSDConfig.for_target(model.config.text_config, 60, form=form, rank=4, parent_rank=8, **changes)
    torch.manual_seed(1)
    made = MSDNetwork(config)
    made.heads.ids = torch.arange(4, 64)
    return made.attach(model)


def teacher_batch(model: Any, made: MSDNetwork) -> tuple[Target, dict[str, Any], TeacherBatch, torch.Tensor]:
    """Greedy answers to prompts of different lengths, with alternating labels."""
    inputs = tiny.batch(*(tiny.llava_inputs(s, images=s % 3, words=6 + s) for s in range(4)))
    out = model.generate(
        **inputs, max_new_tokens=LENGTH, min_new_tokens=LENGTH, do_sample=False, suppress_tokens=[tiny.IMAGE]
    )
    answers = out[:, inputs["input_ids"].shape[1] :].tolist()
    target = adapt(model, made.config.taps)
    labels = torch.tensor([LANGUAGE.id, VISION.id, FUSION.id])[torch.arange(LENGTH) % 3].expand(4, -1)
    cache = TeacherCache(model.get_output_embeddings(), made.heads.ids, made.config.taps, 1.0, torch.float32)
    batch, labels = cache.get(0, lambda: (run_teacher(target, inputs, answers), labels))
    return target, inputs, batch, labels


def overfit(
    made: MSDNetwork, batch: TeacherBatch, labels: torch.Tensor, steps: int = 60
) -> tuple[list[float], DraftObjective]:
    objective = DraftObjective(made, LossConfig(), ends=[int(batch.answers[0, -1])])
    optimizer = torch.optim.AdamW([p for p in objective.parameters() if p.requires_grad], lr=1e-2)
    roots = torch.arange(LENGTH - 1).expand(4, -1)
    losses = []
    for step in range(steps):
        torch.manual_seed(step)
        loss, _ = objective(batch, labels, roots)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses, objective


@pytest.mark.parametrize("form", FORMS)
def test_learns_and_counts_as_decoding_does(form: str) -> None:
    model = tiny.llava()
    made = network(model, form)
    _, inputs, batch, labels = teacher_batch(model, made)
    before = DraftObjective(made, LossConfig()).acceptance(batch, labels)
    losses, objective = overfit(made, batch, labels)
    after = objective.acceptance(batch, labels)
    assert losses[-1] < 0.6 * losses[0]
    rate = lambda counts: sum(a for a, _ in counts.values()) / sum(d for _, d in counts.values())  # noqa: E731
    assert rate(after) > rate(before) + 0.3
    # the same by decoding: a chain of 5 from every root that decoding comes by
    engine = SpeculativeVLM(model, None, SpeculativeConfig(nodes=5, depth=5), MSD(made))
    engine.plan = type(engine.plan)(nodes=5, depth=5, width=1)
    results = engine.generate(
        **inputs, max_new_tokens=LENGTH, min_new_tokens=LENGTH, do_sample=False, suppress_tokens=[tiny.IMAGE]
    )
    for row, result in enumerate(results):
        assert result.tokens == batch.answers[row].tolist()
    decoded = results[0].statistics
    first = torch.arange(LENGTH - 1).expand(4, -1)
    drafts, states = objective.states(batch, first)
    logits, _ = objective.logits(batch, drafts, states, objective.routes(batch, drafts, states).exp())
    guess = made.heads.ids[logits[:, :, :5].argmax(-1)]
    accepted = 0
    for row in range(4):
        at, answer = 0, batch.answers[row].tolist()
        while at < LENGTH - 1:
            n = 0
            while n < 5 and at + 1 + n < LENGTH - 1 and int(guess[row, at, n]) == answer[at + 1 + n]:
                n += 1
            accepted += n
            at += n + 1
    assert decoded.num_accepted_draft_tokens == accepted


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("parts", [{}, EVERY], ids=["default", "every"])
def test_training_states_are_decodings_states(form: str, parts: dict[str, bool]) -> None:
    """The draft laws of a root are the same from a whole batch as from a prompt in decoding."""
    from msd.core.layout import Layout
    from msd.drafters.toolkit.drafter import Memory

    model = tiny.llava()
    made = network(model, form, **parts).eval()
    with torch.no_grad():
        for p in made.parameters():
            if not p.any():
                torch.nn.init.normal_(p, std=0.2)
    _, _, batch, _ = teacher_batch(model, made)
    objective = DraftObjective(made, LossConfig())
    at = 7
    drafts, states = objective.states(batch, torch.full((4, 1), at))
    weights = torch.rand(4, 1, objective.depth, 3)
    weights = weights / weights.sum(-1, keepdim=True)
    routes = objective.routes(batch, drafts, states)
    states = made.looked(states, drafts.anchors.seen)
    logits, sure = objective.logits(batch, drafts, states, torch.cat([weights[:, :, :1], routes[:, :, 1:].exp()], 2))
    L = batch.prompt + at
    whole = batch.layout
    cut = Layout(whole.tokens, whole.modality, whole.positions, whole.start, [L + 1] * 4)
    memory = Memory.begin(made, cut, batch.taps[:, :L])
    assert torch.allclose(made.routed(memory.anchor), routes[:, 0, 0].exp(), atol=1e-5)
    anchors = memory.anchors()
    laws = made.levels(anchors, cut.newest())
    found = [laws.root(weights[:, 0, :1])]
    for d in range(1, 4):
        found.append(laws.below(batch.answers[:, at + d, None], torch.zeros(4, 1, dtype=torch.long)))
    for d, law in enumerate(found):
        assert torch.allclose(law.logits[:, 0], logits[:, 0, d], atol=1e-4), d
        assert torch.allclose(law.confidence[:, 0], sure[:, 0, d], atol=1e-4)


def test_images_reach_the_drafts_only_through_the_adaptor() -> None:
    """Without the vision path, image positions are context entries; with it, a few compressed tokens replace them."""
    model = tiny.llava()
    for vision, kept in ((True, 2), (False, 4)):
        made = network(model, "block", vision=vision, image_tokens=2)
        _, _, batch, _ = teacher_batch(model, made)
        found = made.read(batch.layout, batch.taps[:, :-1])
        text = batch.layout.tokens[:, :-1].shape[1] - torch.tensor(batch.layout.start)
        images = torch.tensor([s % 3 for s in range(4)])
        runs = images.clamp_max(1) if vision else images  # two images side by side are one run of image columns
        assert found.selection.present.sum(1).tolist() == (text - 4 * images + kept * runs).tolist()


def test_endings_are_learnt_and_save_drafts(monkeypatch: pytest.MonkeyPatch) -> None:
    """If the answer is predicted to end, a plan with measured costs drafts nothing; without costs it always drafts."""
    from msd.planning.costs import Costs
    from msd.planning.plan import Governor, Plan

    model = tiny.llava()
    made = network(model, "block")
    _, _, batch, labels = teacher_batch(model, made)
    end = int(batch.answers[0, -1])
    _, objective = overfit(made, batch, labels)
    said, last, _ = objective.endings(batch, all_roots(batch))
    expected = (batch.answers[:, 1:] == end) & (torch.arange(LENGTH - 1) < LENGTH - 1)
    assert torch.equal(last, expected) and last.any()
    assert ((said > 0) == last).float().mean() > 0.97
    one = tiny.llava_inputs(0, images=0, words=6)
    plain = model.generate(**one, max_new_tokens=12, do_sample=False)[0, one["input_ids"].shape[1] :].tolist()
    engine = SpeculativeVLM(model, None, SpeculativeConfig(adaptive=False), MSD(made))
    costs = Costs((1, 9), (8, 64), ((0.01, 0.01), (0.01, 0.01)))
    for sure, counted, drafts_some in ((100.0, costs, False), (-100.0, costs, True), (100.0, None, True)):
        torch.nn.init.constant_(made.ending.out.bias, sure)
        engine.plan = Plan(costs=counted)
        monkeypatch.setattr(Governor, "drafts", lambda self: True)
        result = engine.generate(**one, max_new_tokens=12, do_sample=False)
        assert result.tokens == plain
        assert (result.statistics.num_draft_tokens > 0) == drafts_some


def test_task_weights_follow_the_losses_within_bounds() -> None:
    weights = TaskWeights(("language", "vision", "fusion"), "learned")
    optimizer = torch.optim.SGD(weights.parameters(), lr=0.1)
    for _ in range(200):
        loss = weights(torch.tensor([1.25, 1.0, 0.8]), torch.ones(3, dtype=torch.bool))
        assert float(loss.detach()) == pytest.approx(float((weights.values() * torch.tensor([1.25, 1.0, 0.8])).sum()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert weights.values().tolist() == pytest.approx([0.8, 1.0, 1.25], abs=0.02)
    for _ in range(200):
        loss = weights(torch.tensor([0.01, 1.0, 9.0]), torch.ones(3, dtype=torch.bool))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    easy, vision, hard = weights.values().tolist()
    assert vision == 1.0
    assert easy == pytest.approx(2.0)
    assert hard == pytest.approx(0.5)
    assert TaskWeights(("language", "vision", "fusion"), "threshold").values().tolist() == pytest.approx(
        [0.4, 1.0, 0.5]
    )


def test_every_part_gets_a_gradient() -> None:
    model = tiny.llava()
    for form in FORMS:
        made = network(model, form, **EVERY)
        _, _, batch, labels = teacher_batch(model, made)
        _, objective = overfit(made, batch, labels, steps=2)  # what starts at zero moves first
        loss, _ = objective(batch, labels, torch.arange(LENGTH - 1).expand(4, -1))
        loss.backward()
        still = [n for n, p in objective.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
        assert still == []


def test_router_report_counts_every_first_draft_once() -> None:
    from msd.drafters.algorithms.msd.objective import router_report

    model = tiny.llava()
    made = network(model, "block")
    _, _, batch, labels = teacher_batch(model, made)
    _, objective = overfit(made, batch, labels)
    report = router_report(objective, [(batch, labels)])
    assert report["positions"] == 4 * (LENGTH - 1)
    assert sum(sum(row.values()) for row in report["confusion"].values()) == report["positions"]
    right = sum(report["confusion"][n][n] for n in report["confusion"])
    assert report["accuracy"] == pytest.approx(right / report["positions"])
    assert report["accuracy"] > 0.6 > report["majority"]  # it has learnt labels that come in turn
    assert 0 <= report["ece"] <= 1


def test_msd_draft_loss_by_hand() -> None:
    import msd

    torch.manual_seed(0)
    draft, target, h, t = torch.randn(6, 9), torch.randn(6, 9), torch.randn(6, 4), torch.randn(6, 4)
    kinds = torch.tensor([VISION.id, LANGUAGE.id, VISION.id, FUSION.id, LANGUAGE.id, LANGUAGE.id])
    weights = TaskWeights(("language", "vision", "fusion"), "threshold")
    loss, terms = msd.msd_draft_loss(draft, target, h, t, kinds, weights)
    p, q = target.softmax(-1), draft.softmax(-1)
    by_hand = []
    for i in range(6):
        regression = torch.nn.functional.smooth_l1_loss(h[i], t[i])
        by_hand.append(0.2 * regression + 0.6 * (p[i] - q[i]).abs().sum() - 0.4 * (p[i] * q[i].log()).sum())
    mean = lambda *rows: float(sum(by_hand[r] for r in rows)) / len(rows)  # noqa: E731
    assert terms == pytest.approx({"language": mean(1, 4, 5), "vision": mean(0, 2), "fusion": mean(3)}, rel=1e-5)
    assert float(loss) == pytest.approx(mean(0, 2) + 0.4 * mean(1, 4, 5) + 0.5 * mean(3), rel=1e-5)
    with pytest.raises(msd.UserError, match="6 modalities need"):
        msd.msd_draft_loss(draft[:5], target, h, t, kinds, weights)


def test_confidence_is_calibrated_on_held_out_answers() -> None:
    from msd.drafters.toolkit.calibration import calibrate
    from msd.drafters.toolkit.chance import NodeFeatures

    model = tiny.llava()
    made = network(model, "block")
    _, _, batch, labels = teacher_batch(model, made)
    node = NodeFeatures(torch.log(torch.tensor([0.9, 0.3, 0.01])), torch.zeros(3))
    assert torch.allclose(made.log_acceptance(node), node.log_q, atol=1e-5)  # before any fit: q itself
    _, objective = overfit(made, batch, labels)
    report = calibrate(objective, [batch])["confidence"]
    assert report["candidates"] > 100
    assert report["ece"] < max(0.05, report["ece_of_q"])
    assert made.calibration is not None and made.calibration.keys() >= {"log_odds", "confidence", "bias"}


def test_each_epoch_trains_on_every_answer_once() -> None:
    from pathlib import Path

    from msd.labels.label_thresholds import ModalityThresholds
    from msd.train.capture import Captured, mixed
    from msd.train.teacher_batches import Stages, TeacherBatches

    lengths = torch.randint(2, 90, (64,), generator=torch.Generator().manual_seed(0)).tolist()
    answers = [
        Captured(
            (Path("a.jpg"),) if i % 4 else (), f"{i}", (5,) * n, (0.0,) * n, "detail" if n > 40 else "vqa", "train"
        )
        for i, n in enumerate(lengths)
    ]
    thresholds = ModalityThresholds(language_max=0.1, vision_min=0.2, tokens=1, target="t")
    cache: Any = None
    make = lambda: TeacherBatches(None, None, answers, thresholds, cache, 4, Stages(text=3, rise=4, keep=0.0))  # type: ignore[arg-type]  # noqa: E731
    teacher_batches = make()
    steps = [teacher_batches.answers_at(s) for s in range(40)]
    assert all(not a.images for step in steps[:3] for a in step)  # stage 1
    assert all(len({bool(a.images) for a in step}) == 1 for step in steps)
    assert make().answers_at(17) == steps[17]  # a function of the step
    about = [[a.prompt for a in step] for step in steps if step[0].images]
    first_pass, second_pass = ([p for step in about[at : at + 12] for p in step] for at in (0, 12))
    assert len(set(first_pass)) == 48 == sum(bool(a.images) for a in answers)
    assert sorted(first_pass) == sorted(second_pass) and first_pass != second_pass
    spread = [max(len(a.ids) for a in step) - min(len(a.ids) for a in step) for step in steps[10:]]
    assert sum(spread) / len(spread) < 20  # alike in length: little padding
    assert [a.task for a in mixed(answers, 4)] in (["detail", "vqa"] * 2, ["vqa", "detail"] * 2)

    roots = teacher_batches.roots(SimpleNamespace(lengths=[3, 60], answers=torch.zeros(1)), 10)  # type: ignore[arg-type]
    assert roots[0].tolist() == [0, 1, *[2] * 8]  # from token 2 on there is nothing to draft
    assert len(set(roots[1].tolist())) == 10 and max(roots[1].tolist()) < 59


@pytest.mark.parametrize("method", ["msd", "eagle3", "vispec"])
def test_the_share_of_text_in_the_end_can_be_set(method: str) -> None:
    kind, late = registry.trainable(method), 10**6

    def shares(**changes: Any) -> tuple[float, float]:
        settings = drafting.DraftTraining(method=method, steps=1000, **changes)
        stages = drafting._stages(kind, settings)  # type: ignore[arg-type]  # it reads only class attributes
        return stages.share(0), stages.share(late)

    own = {"msd": 0.05, "eagle3": 0.05, "vispec": 0.0}[method]
    assert shares() == (0.0, 1 - own), "stage 1 is text"
    assert shares(text_share=0.25) == (0.0, 0.75)
    assert shares(text_share=0.25, start="folder") == (0.5, 0.75), "a start drafter has finished stage 1"
    with pytest.raises(UserError, match="leave out text_share"):
        shares(text_share=0.25, text_only=True)


def test_a_half_precision_teacher_has_nearly_the_same_logits() -> None:
    model, made = tiny.llava(), network(tiny.llava(), "block")
    target, inputs, batch, _ = teacher_batch(model, made)
    answers = batch.answers.tolist()
    exact = run_teacher(target, inputs, answers)
    rough = run_teacher(target, inputs, answers, dtype=torch.bfloat16)
    apart = (rough.logits - exact.logits).abs().max()
    assert 0 < apart < 0.05 * exact.logits.abs().max()
    assert rough.taps is not None and rough.taps.shape == exact.taps.shape  # type: ignore[union-attr]


def test_a_measured_precision_stays_for_the_whole_run(tmp_path: Path) -> None:
    measured = drafting.resolve_precision(drafting.DraftTraining(), tmp_path, torch.device("cpu"))
    assert measured.precision in ("bf16", "float32")
    (tmp_path / "run.json").write_text('{"precision": "noted"}')
    assert drafting.resolve_precision(drafting.DraftTraining(), tmp_path, torch.device("cpu")).precision == "noted"
    with pytest.raises(UserError, match="precision 'half' is unknown"):
        drafting.resolve_precision(drafting.DraftTraining(precision="half"), tmp_path, torch.device("cpu"))


def test_a_cached_batch_equals_the_computed_one() -> None:
    model = tiny.llava()
    made = network(model, "block")
    target, inputs, batch, labels = teacher_batch(model, made)
    answers, ids, head = batch.answers.tolist(), made.heads.ids, model.get_output_embeddings()
    whole = run_teacher(target, inputs, answers)
    calls = []

    def compute() -> tuple[TeacherBatch, torch.Tensor]:
        calls.append(1)
        return run_teacher(target, inputs, answers), labels

    said = whole.answer_mask()
    for dtype, near in ((torch.float32, 1e-5), (torch.bfloat16, 0.05)):
        cache, uncached = (TeacherCache(head, ids, made.config.taps, room, dtype) for room in (1.0, 0.0))
        calls.clear()
        first, again = cache.get(1, compute)[0], cache.get(1, compute)[0]
        assert len(calls) == 1
        recomputed = [uncached.get(1, compute)[0] for _ in range(2)]
        assert len(calls) == 3
        for other in (again, *recomputed):  # bit-identical, cached or not, so that runs can be resumed
            assert torch.equal(other.logits, first.logits) and torch.equal(other.taps, first.taps)  # type: ignore[arg-type]
        law = whole.logits.softmax(-1)[..., ids]
        assert (first.logits.exp() - law)[said].abs().max() < near * law.max()


def test_a_view_of_a_cache_equals_a_cache_of_its_own_layers() -> None:
    model = tiny.llava()
    made = network(model, "block")
    head, ids, layers = model.get_output_embeddings(), made.heads.ids, made.config.taps
    every, fewer = tuple(range(layers[-1] + 1)), ids[::2]
    assert every != layers
    target, inputs, batch, labels = teacher_batch(model, made)
    answers = batch.answers.tolist()
    for room in (1.0, 0.0):  # cached, and recomputed each time
        shared = TeacherCache(head, fewer, every, room)
        shared.get(0, lambda: (run_teacher(adapt(model, every), inputs, answers), labels))
        read = shared.view(ids, layers).get(0, lambda: (run_teacher(adapt(model, every), inputs, answers), labels))[0]
        own = TeacherCache(head, ids, layers, room).get(0, lambda: (run_teacher(target, inputs, answers), labels))[0]
        assert read.taps is not None and own.taps is not None
        assert torch.equal(read.taps, own.taps) and torch.equal(read.logits, own.logits)
    with pytest.raises(ValueError, match="cannot be read"):
        shared.view(ids, (99, layers[-1]))


def test_a_nonlinear_head_is_recomputed_each_time() -> None:
    model = tiny.llava()
    made = network(model, "block")
    target, inputs, batch, labels = teacher_batch(model, made)
    whole = run_teacher(target, inputs, batch.answers.tolist())
    whole.logits = 3 * torch.tanh(whole.logits)  # soft-capped
    cache = TeacherCache(model.get_output_embeddings(), made.heads.ids, made.config.taps, 1.0)
    for _ in range(2):
        found, _ = cache.get(0, lambda: (whole, labels))
        assert torch.equal(found.logits, whole.logits.log_softmax(-1)[..., made.heads.ids])
    assert cache.head_is_linear is False
