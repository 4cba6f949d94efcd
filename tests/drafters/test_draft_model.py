"""A second model drafts: a copy of the target has all drafts accepted, and any other changes the drafts alone."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

import tiny_checkpoint
from families import BY_NAME
from family_layouts import IMAGE, VOCABULARY
from family_processor import FamilyProcessor, Letters, photos
from msd.cli import main
from msd.config import SpeculativeConfig
from msd.drafters.algorithms.draft_model import DraftModel
from msd.drafters.toolkit import second_model
from msd.drafters.toolkit.ensemble import MEMORY, Ensemble
from msd.errors import UserError
from msd.model import SpeculativeVLM
from msd.planning.plan import Budget, Plan
from serve.batches import check_a_late_join, check_joining

LENGTH = 13
CHAIN = SpeculativeConfig(nodes=4, depth=4, width=1, adaptive=False, backend="plain")
TREE = SpeculativeConfig(nodes=12, depth=4, adaptive=False, backend="plain")
GREEDY = {"do_sample": False, "max_new_tokens": LENGTH, "eos_token_id": None}
SAMPLED = {"do_sample": True, "temperature": 0.8, "top_k": 0, "max_new_tokens": LENGTH}
LLAVA = BY_NAME["llava"]
QUICK = ("llava", "qwen3_vl")
COPIED = ("qwen2_5_vl", "gemma3", "smolvlm", "internvl", "llava_onevision", "mistral3_window", "paligemma2", "qwen2_vl")


def inputs(name: str, rows: int = 1, kind: str = "image") -> dict[str, Any]:
    """Prompts of different lengths, each with a picture."""
    family = BY_NAME[name]
    return family.batch([family.parts(s, [kind], words=12 - 3 * s) for s in range(rows)])


def noisy(model: PreTrainedModel, amount: float = 0.3) -> PreTrainedModel:
    """A copy with changed weights: a draft model that is often right."""
    changed = copy.deepcopy(model)
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in changed.parameters():
            if weight.dim() > 1:
                weight.add_(torch.randn_like(weight) * weight.std() * amount)
    return changed.eval()


def language_model(vocabulary: int = VOCABULARY) -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "head_dim": 8,
    }
    model = Qwen3ForCausalLM(Qwen3Config(vocab_size=vocabulary, num_key_value_heads=2, **sizes))
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
    return model.eval()


def plain(model: PreTrainedModel, given: dict[str, Any], seed: int = 0, **settings: Any) -> list[list[int]]:
    torch.manual_seed(seed)
    return model.generate(**given, **settings)[:, given["input_ids"].shape[1] :].tolist()


def answers(engine: SpeculativeVLM, **arguments: Any) -> list[Any]:
    found = engine.generate(**arguments)
    return found if isinstance(found, list) else [found]


@pytest.mark.parametrize("name", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in COPIED)])
def test_every_draft_of_a_copy_of_the_target_is_accepted(name: str) -> None:
    """With pictures, alone and in a left-padded batch of three: each step emits the whole chain and one token more."""
    model = BY_NAME[name].make()
    for rows in (1, 3):
        given = inputs(name, rows)
        results = answers(SpeculativeVLM(model, None, CHAIN, DraftModel(copy.deepcopy(model))), **given, **GREEDY)
        assert [r.tokens for r in results] == plain(model, given, **GREEDY)
        found = results[0].statistics
        assert found.num_accepted_draft_tokens == found.num_draft_tokens == rows * 9, "4, 4 and 1 of 12 after the first"


@pytest.mark.parametrize("name", QUICK)
@pytest.mark.parametrize("warped", [{}, {"temperature": 0.6}, {"top_k": 5}, {"top_p": 0.8}], ids=str)
def test_every_draft_of_a_copy_is_accepted_when_its_request_samples(name: str, warped: dict[str, Any]) -> None:
    """It knows the noise of the coming draws: alone with torch's global generator, and in a batch with seeds."""
    model = BY_NAME[name].make()
    settings = {**GREEDY, "do_sample": True, "top_k": 0, **warped}
    engine = SpeculativeVLM(model, None, CHAIN, DraftModel(copy.deepcopy(model)))
    (expected,) = plain(model, inputs(name), 7, **settings)
    after = torch.get_rng_state()
    torch.manual_seed(7)
    (alone,) = answers(engine, **inputs(name), **settings)
    assert torch.equal(torch.get_rng_state(), after)
    together = answers(engine, **inputs(name, 3), **settings, seed=[7, 8, 9])
    assert alone.tokens == expected == together[0].tokens
    for rows, result in ((1, alone), (3, together[0])):
        found = result.statistics
        assert found.num_accepted_draft_tokens == found.num_draft_tokens == rows * 9, "4, 4 and 1 of 12 after the first"


@pytest.mark.parametrize("sees", ["image", "nothing", "image,nothing"])
@pytest.mark.parametrize("settings", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_trees_of_another_model_change_no_answer(sees: str, settings: dict[str, Any]) -> None:
    model = BY_NAME["qwen3_vl"].make()
    engine = SpeculativeVLM(model, None, TREE, DraftModel(noisy(model), sees=sees))
    given = inputs("qwen3_vl")
    (result,) = answers(engine, **given, **settings, seed=5)
    assert result.tokens == plain(model, given, 5, **settings)[0][: len(result.tokens)]
    assert result.statistics.num_draft_tokens > LENGTH


@pytest.mark.parametrize("vocabulary", [VOCABULARY, VOCABULARY - 20, VOCABULARY + 7])
def test_a_language_model_drafts_from_the_text(vocabulary: int) -> None:
    """In a left-padded batch of three; its vocabulary may be smaller or larger."""
    model, given = LLAVA.make(), inputs("llava", 3)
    results = answers(SpeculativeVLM(model, None, TREE, DraftModel(language_model(vocabulary))), **given, **GREEDY)
    assert [r.tokens for r in results] == plain(model, given, **GREEDY)
    assert results[0].statistics.num_draft_tokens > LENGTH


class Pausing(Plan):
    """Drafts only in every fourth step, so that several tokens are unread."""

    steps = 0

    def budget(self, *arguments: Any) -> Budget:
        self.steps += 1
        found = super().budget(*arguments)
        return found if self.steps % 4 == 1 else Budget(0, [0 for _ in found.depth])


def test_tokens_of_steps_without_drafts_are_read_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in several passes, when there are many of them; the drafts of a copy stay right."""
    model, given = LLAVA.make(), inputs("llava", 3)
    for longest in (64, 2):
        monkeypatch.setattr(second_model, "LONGEST", longest)
        engine = SpeculativeVLM(model, None, CHAIN, DraftModel(copy.deepcopy(model)))
        engine.plan = Pausing(CHAIN.nodes, CHAIN.depth, CHAIN.width)
        results = answers(engine, **given, **GREEDY)
        assert [r.tokens for r in results] == plain(model, given, **GREEDY)
        found = results[0].statistics
        assert found.num_accepted_draft_tokens == found.num_draft_tokens > 3 * 4


def test_a_model_that_scores_whole_trees_only_drafts_the_same() -> None:
    """As models with recurrent layers do: each level's pass repeats the levels above."""
    model, given = LLAVA.make(), inputs("llava", 3)
    found = []
    for resumes in (True, False):
        drafter = DraftModel(noisy(model))
        engine = SpeculativeVLM(model, None, TREE, drafter)
        drafter.own.resumes = resumes
        results = answers(engine, **given, **GREEDY)
        found.append([[r.tokens for r in results], results[0].statistics.num_accepted_draft_tokens])
    assert found[0] == found[1] and found[0][1] > 0


def test_several_answers_to_one_prompt() -> None:
    model, given = LLAVA.make(), inputs("llava")
    for sees in ("image", "nothing"):
        engine = SpeculativeVLM(model, None, TREE, DraftModel(noisy(model), sees=sees))
        for seed, result in enumerate(answers(engine, **given, **SAMPLED, seed=[0, 1, 2], num_return_sequences=3)):
            assert result.tokens == plain(model, given, seed, **SAMPLED)[0][: len(result.tokens)]


def with_processors(model: PreTrainedModel, name: str = "llava", **more: Any) -> DraftModel:
    return DraftModel(model, FamilyProcessor(BY_NAME[name]), **more)


@pytest.mark.parametrize("sees", ["image", "caption", "nothing", "image,caption,nothing"])
def test_its_own_prompt_in_chats_and_batches(sees: str, tmp_path: Path) -> None:
    """A model of another family drafts for two turns about pictures, and for three prompts at once."""
    target = SpeculativeVLM(BY_NAME["qwen3_vl"].make(), FamilyProcessor(BY_NAME["qwen3_vl"]), TREE, "ar")
    engine, pictures = target.with_method(with_processors(LLAVA.make(), sees=sees)), photos(LLAVA, tmp_path, 2)
    settings, chats = {"do_sample": False, "max_new_tokens": 6}, (engine.chat(), target.chat())
    for prompt, picture in (("What?", pictures[0]), ("And?", None), ("This?", pictures[1])):
        one, other = (chat.say(prompt, picture, **settings) for chat in chats)
        assert one.tokens == other.tokens and one.statistics.num_draft_tokens > 0
    asked = (["Who?", "Where is it?", "Why?"], [pictures[0], None, pictures[1]])
    found, plainly = (e.generate(asked[1], asked[0], **settings) for e in (engine, target))
    assert [r.tokens for r in found] == [r.tokens for r in plainly]


def test_what_it_sees(tmp_path: Path) -> None:
    """A copy that sees the image drafts the target's words; the prompts without the image differ, and so do drafts."""
    model = LLAVA.make()
    (picture,) = photos(LLAVA, tmp_path, 1)
    read: list[Tensor] = []
    accepted = {}
    for sees in ("image", "caption", "nothing"):
        drafter = with_processors(copy.deepcopy(model), sees=sees)
        engine = SpeculativeVLM(model, FamilyProcessor(LLAVA), CHAIN, drafter)
        drafter.own.prefill = watched(drafter.own.prefill, read)  # type: ignore[method-assign]
        result = engine.generate(picture, "What?", **GREEDY)
        accepted[sees] = result.statistics.draft_acceptance_rate
        again = engine.generate(picture, "What?", **GREEDY)
        assert again.tokens == result.tokens and torch.equal(read[-1], read[-2]), "a caption is written once"
    assert accepted["image"] == 1 > max(accepted["caption"], accepted["nothing"])
    image, caption, nothing = (ids[0].tolist() for ids in read[::2])
    assert [ids.count(IMAGE) for ids in (image, caption, nothing)] == [4, 0, 0]
    assert [token for token in image if token != IMAGE] == nothing and len(caption) > len(nothing)


def test_a_mixture_follows_the_member_that_is_right() -> None:
    """A copy sees the image, and nothing: the weight moves to the view that knows what the target sees, in each row."""
    model, given = BY_NAME["qwen3_vl"].make(), inputs("qwen3_vl", 3)
    engine = SpeculativeVLM(model, None, TREE, DraftModel(copy.deepcopy(model), sees="image,nothing"))
    weights: list[Tensor] = []
    propose = Ensemble.propose

    def noted(self: Ensemble, *others: Any) -> Any:
        tree = propose(self, *others)
        weights.append(self.weights.exp().clone())
        return tree

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Ensemble, "propose", noted)
        results = answers(engine, **given, **GREEDY)
    assert [r.tokens for r in results] == plain(model, given, **GREEDY)
    assert torch.allclose(weights[-1].sum(1), torch.ones(3)) and (weights[-1][:, 0] > 0.9).all()
    alone = answers(
        SpeculativeVLM(model, None, TREE, DraftModel(copy.deepcopy(model), sees="nothing")), **given, **GREEDY
    )
    found = [r[0].statistics.mean_acceptance_length for r in (results, alone)]
    assert found[0] > found[1]


def test_the_weights_of_a_mixture_by_hand() -> None:
    """w ∝ w^MEMORY · Π q(token), over every emitted token after the first, from single passes of the members."""
    model, given = LLAVA.make(), inputs("llava")
    engine, kept = SpeculativeVLM(model, None, CHAIN, DraftModel(noisy(model), sees="image,nothing")), []
    propose = Ensemble.propose

    def noted(self: Ensemble, layout: Any, *others: Any) -> Any:
        tree = propose(self, layout, *others)
        kept.append((layout.end[0], self.weights[0].clone()))
        return tree

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Ensemble, "propose", noted)
        (result,) = answers(engine, **given, **GREEDY)
    ids = given["input_ids"][0].tolist()
    shown, words = [*ids, *result.tokens], [token for token in ids if token != IMAGE] + result.tokens
    drafter, start = engine.drafter, len(ids)
    assert isinstance(drafter, DraftModel)
    with torch.no_grad():
        seeing = drafter.model(input_ids=torch.tensor([shown]), pixel_values=given["pixel_values"]).logits[0]
        blind = drafter.model(input_ids=torch.tensor([words])).logits[0]
    scored = [logits[-len(result.tokens) - 1 :].log_softmax(-1) for logits in (seeing, blind)]
    weights, read = torch.zeros(2).log_softmax(-1), start + 1  # the first token has no earlier prediction
    for end, found in kept:
        emitted = torch.stack(
            [sum((q[i - start, shown[i]] for i in range(read, end)), torch.zeros(())) for q in scored]
        )
        weights, read = (MEMORY * weights + emitted).log_softmax(-1), end
        assert torch.allclose(found, weights, atol=1e-3)
    assert len(kept) > 3


def watched(prefill: Any, read: list[Tensor]) -> Any:
    def noted(ids: Tensor, *others: Any) -> Any:
        read.append(ids)
        return prefill(ids, *others)

    return noted


def test_what_does_not_fit_is_refused_or_drafts_nothing(tmp_path: Path) -> None:
    model, given = LLAVA.make(), inputs("llava")
    with pytest.raises(UserError, match="takes no images; let it see a caption or nothing"):
        DraftModel(language_model(), sees="image")
    with pytest.raises(UserError, match="tensors of a 'llava' processor are not those of a 'qwen3_vl' model"):
        answers(SpeculativeVLM(model, None, TREE, DraftModel(BY_NAME["qwen3_vl"].make())), **given, **GREEDY)
    with pytest.raises(UserError, match="a caption needs images and messages"):
        answers(SpeculativeVLM(model, None, TREE, DraftModel(noisy(model), sees="caption")), **given, **GREEDY)
    with pytest.raises(UserError, match="choose one of image, caption, nothing"):
        DraftModel(model, sees="sound")
    with pytest.warns(UserWarning, match="more than the target's"):
        SpeculativeVLM(model, None, TREE, DraftModel(language_model(5000)))
    foreign = with_processors(noisy(model))
    foreign.processor.tokenizer = Foreign()
    with pytest.raises(UserError, match="draft model 'draft-model' shares only 10 of 64 tokens with the target"):
        SpeculativeVLM(model, FamilyProcessor(LLAVA), TREE, foreign)
    short = noisy(model)
    short.config.text_config.max_position_embeddings = 8
    (result,) = answers(SpeculativeVLM(model, None, TREE, DraftModel(short)), **given, **GREEDY)
    assert result.tokens == plain(model, given, **GREEDY)[0] and result.statistics.num_draft_tokens == 0


class Foreign(Letters):
    """A tokenizer with other words."""

    def get_vocab(self) -> dict[str, int]:
        return {name if i < 10 else f"other{i}": i for name, i in super().get_vocab().items()}


def test_options_that_do_not_belong_together() -> None:
    for fields, message in (
        ({"draft_sees": "image"}, "draft_sees 'image' is for a draft model"),
        ({"draft_model": "x", "draft_sees": "image,sound"}, "draft_sees 'sound' is unknown"),
        ({"draft_model": "x", "draft_sees": "image,image"}, "names one view twice"),
        ({"draft_model": "x", "method": "ar"}, "draft model 'x' is for method 'draft-model', not 'ar'"),
        ({"method": "draft-model"}, "method 'draft-model' needs a model"),
    ):
        with pytest.raises(UserError, match=message):
            SpeculativeConfig(**fields)


def test_a_folder_drafts_in_the_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A checkpoint of the target's kind, and a language model with the same tokenizer."""
    target, small, text = (tmp_path / name for name in ("target", "small", "text"))
    tiny_checkpoint.write(target)
    tiny_checkpoint.write(small, seed=1)
    language_model(len(tiny_checkpoint.SPECIAL) + 256).save_pretrained(text)
    tiny_checkpoint.processor().tokenizer.save_pretrained(text)
    (photo,) = tiny_checkpoint.photos(tmp_path, 1)
    (tmp_path / "data.jsonl").write_text(json.dumps({"image": photo, "prompt": "Who?"}))
    asked = ["--target", str(target), "--draft-model"]
    lines = ["--data", str(tmp_path / "data.jsonl"), "--max-new-tokens", "8", "--json"]
    for folder, sees in ((small, "image"), (text, "caption"), (small, "image,caption,nothing")):
        chosen = [*asked, str(folder), "--draft-sees", sees]
        rows = command(capsys, "verify", *chosen, *lines, "--method", "draft-model")["rows"]
        assert [(row["method"], row["passed"]) for row in rows] == [("draft-model", True)] and rows[0]["compared"] == 6
    answer = command(capsys, "generate", str(tmp_path / photo), "-p", "Who?", *asked, str(small), "--json")
    assert answer["method"] == "draft-model" and answer["num_spec_steps"] > 0
    config = SpeculativeConfig(draft_model=str(small), adaptive=False)
    assert (
        SpeculativeVLM.from_pretrained(target, config=config)
        .generate(tmp_path / photo, "Who?")
        .statistics.num_draft_tokens
    )
    with pytest.raises(SystemExit):
        main(["generate", str(tmp_path / photo), "-p", "Who?", *asked, str(small), "--method", "ar"])
    assert "is for method 'draft-model', not 'ar'" in capsys.readouterr().err


def command(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    with pytest.raises(SystemExit) as stop:
        main(list(arguments))
    captured = capsys.readouterr()
    assert not stop.value.code, captured.err
    return json.loads(captured.out)


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl", "llava"])
def test_the_librarys_assistant_never_sees_the_picture(name: str) -> None:
    """`generate(assistant_model=…)` runs the assistant's vision tower zero times; ours runs it once."""
    model, given = BY_NAME[name].make(), inputs(name)
    calls = {}
    for drafting in ("library", "ours"):
        same, count = copy.deepcopy(model), []
        tower = getattr(same.model, "visual", None) or same.model.vision_tower
        tower.register_forward_hook(lambda *_, count=count: count.append(1))
        if drafting == "library":
            model.generate(**given, **GREEDY, assistant_model=same)
        else:
            answers(SpeculativeVLM(model, None, CHAIN, DraftModel(same)), **given, **GREEDY)
        calls[drafting] = len(count)
    assert calls == {"library": 0, "ours": 1}


@pytest.mark.parametrize(
    ("name", "context"), [("llava", None), ("llava", 80), pytest.param("qwen3_5", None, marks=pytest.mark.full)]
)
def test_requests_join_and_leave_a_batch(name: str, context: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a short context of the draft model, long requests are not drafted for, and the others are."""
    family = BY_NAME[name]
    model = family.make()
    engine = SpeculativeVLM(model, None, TREE, DraftModel(noisy(model)))
    requests = []
    for i, n in enumerate([40, 12, 28, 6, 20, 30]):
        row = family.row(family.parts(i, family.kinds[:1], words=4 + 3 * (i % 4)))
        requests.append((row, {**GREEDY, "max_new_tokens": n}))
    if context is not None:
        own = engine.drafter.own
        monkeypatch.setattr(type(own), "context_length", property(lambda one: context if one is own else None))
    assert engine.drafter.joinable and not DraftModel(model, sees="image,nothing").joinable
    assert (min(check_joining(engine, requests)) == 1) == (context is not None)


def test_a_long_prompt_joins_after_a_long_pause() -> None:
    model = LLAVA.make()
    engine = SpeculativeVLM(model, None, TREE, DraftModel(noisy(model)))
    short, long = (LLAVA.row(LLAVA.parts(i, ["image"], words=n)) for i, n in enumerate((4, 120)))
    check_a_late_join(engine, (short, {**GREEDY, "max_new_tokens": 70}), (long, {**GREEDY, "max_new_tokens": 8}))
