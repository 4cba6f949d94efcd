"""After any change to a wrapped model, answers are those of the changed model."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.nn.utils import parametrizations, prune
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRMSNorm

import tiny
from msd import backends
from msd.backends import revision
from msd.config import SpeculativeConfig
from msd.errors import UserError
from msd.model import SpeculativeVLM

INPUTS = tiny.llava_inputs(images=1)
NEW = 16


class Added(nn.Module):
    """A linear layer with a low-rank adapter (LoRA)."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, 2, bias=False)
        self.up = nn.Linear(2, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + 30 * self.up(self.down(x))


class Doubled(LlamaRMSNorm):
    """A norm with another output."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return 2 * super().forward(hidden_states).flip(-1)


class Scale(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flip(0)


def llava() -> Any:
    """A tiny model with weights large enough that each layer changes the answer."""
    model = tiny.llava()
    with torch.no_grad():
        for p in [*model.get_decoder().layers.parameters(), *model.model.multi_modal_projector.parameters()]:
            if p.dim() == 2:
                p.mul_(8)
    return model


def layer(model: Any, index: int = 1) -> Any:
    return model.get_decoder().layers[index]


def flipped(*given: Any) -> Any:
    """A hook that reverses the input or the output."""
    last = given[-1]
    if isinstance(last, dict):
        return given[1], {k: v.flip(-1) if k == "hidden_states" else v for k, v in last.items()}
    return tuple(x.flip(-1) for x in last) if isinstance(last, tuple) else last.flip(-1)


def patched(model: Any) -> None:
    attention = layer(model).self_attn
    own = attention.forward
    attention.forward = types.MethodType(lambda self, *a, **k: (own(*a, **k)[0].flip(-1), None), attention)


def fewer(model: Any) -> None:
    model.get_decoder().layers = model.get_decoder().layers[:2]


def swapped(model: Any) -> None:
    layers = model.get_decoder().layers
    layers[0].mlp, layers[2].mlp = layers[2].mlp, layers[0].mlp


def other_weights(model: Any) -> None:
    torch.manual_seed(5)
    model.load_state_dict({k: torch.randn_like(v) * v.std() for k, v in model.state_dict().items()}, assign=True)


def resized(model: Any) -> None:
    torch.manual_seed(5)
    model.resize_token_embeddings(80, mean_resizing=False)
    with torch.no_grad():
        model.lm_head.weight[64:].normal_(std=3.0)


def other_head(model: Any) -> None:
    torch.manual_seed(5)
    model.set_output_embeddings(nn.Linear(32, 64, bias=True))


def every_other(model: Any) -> None:
    """A weight that is a strided view of a larger tensor."""
    torch.manual_seed(5)
    layer(model).mlp.gate_proj.weight = nn.Parameter((torch.randn(64, 64) * 3)[:, ::2])


CHANGES: dict[str, Callable[[Any], Any]] = {
    "strided weights": every_other,
    "hook on a layer": lambda m: layer(m).register_forward_hook(flipped),
    "pre-hook on a layer": lambda m: layer(m).register_forward_pre_hook(flipped),
    "pre-hook with kwargs on attention": lambda m: layer(m).self_attn.register_forward_pre_hook(
        flipped, with_kwargs=True
    ),
    "hook on a projection": lambda m: layer(m).self_attn.q_proj.register_forward_hook(flipped),
    "pre-hook on a projection": lambda m: layer(m).mlp.down_proj.register_forward_pre_hook(flipped),
    "hook on a norm": lambda m: layer(m).input_layernorm.register_forward_hook(flipped),
    "hook on the last norm": lambda m: m.get_decoder().norm.register_forward_hook(flipped),
    "hook on the activation": lambda m: layer(m).mlp.act_fn.register_forward_hook(flipped),
    "hook on the rotary embedding": lambda m: m.get_decoder().rotary_emb.register_forward_hook(
        lambda _m, _a, out: (out[1], out[0])
    ),
    "hook on the word embedding": lambda m: m.get_input_embeddings().register_forward_hook(flipped),
    "hook on the output layer": lambda m: m.lm_head.register_forward_hook(flipped),
    "weights written without a version change": lambda m: layer(m).mlp.up_proj.weight.data.copy_(torch.eye(64, 32)),
    "two columns swapped": lambda m: layer(m).self_attn.o_proj.weight.data.copy_(
        layer(m).self_attn.o_proj.weight.data.roll(2, 1)
    ),
    "rows of the output layer rolled": lambda m: m.lm_head.weight.data.copy_(m.lm_head.weight.data.roll(3, 0)),
    "a sign": lambda m: layer(m, 0).mlp.gate_proj.weight.data.mul_(-1),
    "a norm's weight": lambda m: layer(m).input_layernorm.weight.data.copy_(torch.linspace(-9, 9, 32)),
    "pruned": lambda m: prune.random_unstructured(layer(m).mlp.down_proj, "weight", 0.7),
    "pruned permanently": lambda m: prune.remove(
        prune.random_unstructured(layer(m).mlp.down_proj, "weight", 0.7), "weight"
    ),
    "parametrized": lambda m: nn.utils.parametrize.register_parametrization(layer(m).mlp.up_proj, "weight", Scale()),
    "spectral norm": lambda m: parametrizations.spectral_norm(layer(m).self_attn.v_proj),
    "an adapter": lambda m: setattr(layer(m).self_attn, "v_proj", Added(layer(m).self_attn.v_proj)),
    "another norm": lambda m: setattr(layer(m), "input_layernorm", Doubled(32)),
    "another activation": lambda m: setattr(layer(m).mlp, "act_fn", nn.Tanh()),
    "an instance's forward": patched,
    "attention's scale": lambda m: setattr(layer(m).self_attn, "scaling", 9.0),
    "a norm's epsilon": lambda m: setattr(layer(m).input_layernorm, "variance_epsilon", 9.0),
    "rotary frequencies": lambda m: m.get_decoder().rotary_emb.inv_freq.data.mul_(9),
    "double": lambda m: m.double(),
    "bfloat16": lambda m: m.to(torch.bfloat16),
    "other weights assigned": other_weights,
    "fewer layers": fewer,
    "parts of layers exchanged": swapped,
    "a larger vocabulary": resized,
    "another output layer": other_head,
}
SILENT = {  # only the content of weights tells
    "weights written without a version change",
    "two columns swapped",
    "rows of the output layer rolled",
    "a sign",
}
SAME = {"double", "bfloat16"}  # may leave the answer unchanged


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def own(model: Any, **settings: Any) -> list[int]:
    inputs = {k: v.to(model.dtype) if v.is_floating_point() else v for k, v in INPUTS.items()}
    found = model.generate(**inputs, max_new_tokens=NEW, do_sample=False, **settings)
    return found[0, INPUTS["input_ids"].shape[1] :].tolist()


def ours(engine: SpeculativeVLM) -> list[int]:
    inputs = {k: v.to(engine.model.dtype) if v.is_floating_point() else v for k, v in INPUTS.items()}
    return engine.generate(**inputs, max_new_tokens=NEW, do_sample=False).tokens


def wrapped(model: Any, backend: str = "fused", taps: tuple[int, ...] = (), frozen: bool = False) -> SpeculativeVLM:
    config = SpeculativeConfig(backend=backend, frozen_weights=frozen)
    engine = SpeculativeVLM(model, None, config, "prompt-lookup")
    if taps:
        engine.target.taps = type(engine.target.taps)(model, taps)
    return engine


@pytest.mark.parametrize("name", CHANGES)
def test_the_answer_is_that_of_the_changed_model(name: str) -> None:
    model = llava()
    engine = wrapped(model)
    before = ours(engine)
    assert before == own(model)
    with torch.no_grad():
        CHANGES[name](model)
    now = own(model)
    assert now != before or name in SAME, "the change has an effect"
    assert ours(engine) == now
    assert ours(wrapped(model, "measure")) == now, "wrapped after the change"


@pytest.mark.parametrize("name", [name for name in CHANGES if name not in SILENT])
def test_frozen_weights_are_read_once_and_other_changes_seen(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, read = llava(), list[int]()
    engine = wrapped(model, frozen=True)
    content = revision._content
    monkeypatch.setattr(revision, "_content", lambda tensor: (read.append(id(tensor)), content(tensor))[1])
    before = ours(engine)
    assert ours(engine) == before == own(model) and not read
    with torch.no_grad():
        CHANGES[name](model)
    assert ours(engine) == own(model)


@pytest.mark.parametrize("register", [register_module_forward_hook, register_module_forward_pre_hook])
def test_a_global_hook_runs_for_all_modules(register: Any) -> None:
    model = llava()
    engine = wrapped(model)
    ours(engine)
    seen: set[nn.Module] = set()
    handle = register(lambda module, *_: seen.add(module))
    try:
        ours(engine)
    finally:
        handle.remove()
    assert {layer(model).self_attn.k_proj, layer(model).mlp.act_fn, model.get_decoder().norm} <= seen


def test_hooks_run_once_per_pass_until_they_are_removed() -> None:
    model = llava()
    engine, calls = wrapped(model, taps=(1, 3)), []
    backend = engine.target.backend
    handle = layer(model).mlp.up_proj.register_forward_hook(lambda *_: calls.append(1))
    result = engine.generate(**INPUTS, max_new_tokens=NEW, do_sample=False)
    assert len(calls) == 1 + result.statistics.num_spec_steps
    wrapped(model, "measure")
    assert len(calls) == 1 + result.statistics.num_spec_steps, "wrapping runs no pass of the hooked model"
    handle.remove()
    with backend.running() as fused:
        assert fused
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.get_decoder().modules())


def test_recording_hooks_do_not_disable_the_fused_pass() -> None:
    model = llava()
    engine = wrapped(model, taps=(0, 2, 3))
    model(**INPUTS, output_hidden_states=True)
    assert any(m._forward_hooks for m in model.get_decoder().modules())
    with engine.target.taps.recording(), engine.target.recording() as recorded:
        model.get_decoder()(input_ids=torch.arange(4, 9)[None])
    assert engine.target.backend.name == "fused"
    assert recorded.take() is not None


def test_a_class_whose_forward_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    model = llava()
    engine = wrapped(model)
    before = ours(engine)
    forward = LlamaAttention.forward
    monkeypatch.setattr(LlamaAttention, "forward", lambda self, *a, **k: (forward(self, *a, **k)[0].flip(-1), None))
    assert ours(engine) == ours(wrapped(model, "measure")) == own(model) != before


def test_a_custom_attention_function() -> None:
    from transformers import AttentionInterface

    def reversed_keys(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **rest: Any) -> tuple[Tensor, None]:
        return q.transpose(1, 2).flip(-1), None

    AttentionInterface.register("reversed", reversed_keys)
    model = llava()
    engine = wrapped(model)
    before = ours(engine)
    model.get_decoder().config._attn_implementation = "reversed"
    assert ours(engine) == own(model) != before


def test_autocast_runs_the_models_own_code() -> None:
    model = llava()
    engine = wrapped(model)
    with torch.autocast("cpu", torch.bfloat16):
        assert ours(engine) == own(model)


class ChangesModel:
    """A logits processor that changes the model at its fourth token."""

    def __init__(self, change: Callable[[], Any]) -> None:
        self.change, self.calls = change, 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == 4:
            self.change()
        return scores


@pytest.mark.parametrize(
    "change",
    [
        lambda m: layer(m).register_forward_hook(flipped),
        lambda m: layer(m).self_attn.k_proj.register_forward_hook(flipped),
        lambda m: m.lm_head.weight.copy_(m.lm_head.weight.roll(5, 0)),
    ],
    ids=["hook on a layer", "hook on keys", "weights"],
)
def test_a_change_in_the_middle_of_an_answer(change: Any) -> None:
    answers = []
    for engine in (None, True):
        model = llava()
        processors = [ChangesModel(lambda model=model: change(model))]
        if engine is None:
            answers.append(own(model, logits_processor=processors))
        else:
            vlm = SpeculativeVLM(model, None, SpeculativeConfig(backend="fused"), "ar")
            answers.append(
                vlm.generate(**INPUTS, max_new_tokens=NEW, do_sample=False, logits_processor=processors).tokens
            )
    assert answers[0] == answers[1]


def test_the_fused_pass_is_restored() -> None:
    model = llava()
    engine = wrapped(model)
    backend, linear = engine.target.backend, layer(model).self_attn.v_proj

    def fused() -> bool:
        with backend.running() as served:
            return served

    assert fused()
    layer(model).self_attn.v_proj = Added(linear)
    assert not fused()
    layer(model).self_attn.v_proj = linear
    assert fused()
    model.double()
    assert not fused()
    model.float()
    assert fused() and ours(engine) == own(model)
    assert backends.choose(model, "fused") is backend


def test_a_changed_encoder_encodes_again() -> None:
    for change in (
        lambda m: m.model.multi_modal_projector.linear_1.weight.data.mul_(-3),
        lambda m: m.model.multi_modal_projector.register_forward_hook(flipped),
        lambda m: setattr(m.config, "vision_feature_layer", -1),
        lambda m: setattr(m.model.multi_modal_projector, "linear_2", Added(m.model.multi_modal_projector.linear_2)),
    ):
        model = llava()
        engine = wrapped(model)
        before = ours(engine)
        handle = change(model)
        now = own(model)
        assert ours(engine) == ours(engine) == now != before
        if hasattr(handle, "remove"):
            handle.remove()
            assert ours(engine) == before, "features from a hooked encoder are not cached"


def test_a_hook_on_the_encoder_runs_for_each_request() -> None:
    model = llava()
    engine, seen = wrapped(model), []
    ours(engine)
    model.model.vision_tower.register_forward_hook(lambda *_: seen.append(1))
    ours(engine)
    ours(engine)
    assert len(seen) == 2


@pytest.mark.parametrize("turns", [0, 1])
@pytest.mark.parametrize("backend", ["plain", "fused"])
@pytest.mark.parametrize(
    ("change", "frozen"),
    [
        ("weights written without a version change", False),
        ("hook on a layer", False),
        ("an adapter", False),
        ("an adapter", True),
        ("other weights assigned", True),
    ],
)
def test_a_changed_model_reuses_nothing_of_a_conversation(turns: int, backend: str, change: str, frozen: bool) -> None:
    from msd.targets import Past

    model = llava()
    engine, past = wrapped(model, backend, frozen=frozen), Past()

    def rows() -> int:
        result = engine.generate(**INPUTS, max_new_tokens=NEW, do_sample=False, past=past)
        assert result.tokens == own(model)
        return result.statistics.num_prefill_rows

    whole = rows()
    for _ in range(turns):
        assert rows() < whole
    with torch.no_grad():
        CHANGES[change](model)
    assert rows() == whole


def test_a_conversation_continues_on_another_backend() -> None:
    from msd.targets import Past

    model, past = llava(), Past()
    for name in ("fused", "plain", "fused"):
        engine = wrapped(model, name)
        result = engine.generate(**INPUTS, max_new_tokens=NEW, do_sample=False, past=past)
        assert result.tokens == own(model)


@pytest.mark.parametrize("backend", ["plain", "fused"])
def test_a_drafter_that_no_longer_fits_is_an_error(backend: str) -> None:
    model = llava()
    engine = wrapped(model, backend, taps=(1, 3))
    ours(engine)
    fewer(model)
    with pytest.raises(UserError, match="tap 3 is outside the model's 2 layers"):
        ours(engine)
    model = llava()
    engine, attached = wrapped(model, backend), []
    engine.drafter.attach = lambda *given: attached.append(given)  # type: ignore[method-assign]
    ours(engine)
    resized(model)
    ours(engine)
    ours(engine)
    assert len(attached) == 1, "the drafter is attached once to the new vocabulary"
