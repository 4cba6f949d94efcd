"""Compares the rivals with implementations written independently from the equations of their papers.

Each reference here knows one prompt as lists of vectors, loops over positions, and shares no code with the drafters.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, LlavaForConditionalGeneration

import rivals
import tiny
from msd.core.layout import Layout
from msd.drafters.toolkit.drafter import Memory
from msd.drafters.toolkit.network import DraftNetwork
from msd.targets import adapt
from msd.targets.teacher import run_teacher

LAYERS = 8  # so that layers 2, L//2 and L-3 are three
TOLERANCE = 1e-5


def _model() -> Any:
    config = copy.deepcopy(tiny.llava().config)
    config.text_config.num_hidden_layers = LAYERS
    torch.manual_seed(3)
    return tiny._finish(LlavaForConditionalGeneration(config), 4.0)


MODEL = _model()
EMBEDDING, HEAD = MODEL.get_input_embeddings().weight.detach(), MODEL.lm_head.weight.detach()
THETA, EPS, KV = 10000.0, 1e-6, 2
PROMPTS = {"text": 0, "image": 1, "images": 2}


@dataclass
class Prompt:
    """ids: L tokens and the one after. states[l][i]: the target's hidden state of layer l at i. first: answer token."""

    ids: list[int]
    states: list[Tensor]

    @property
    def length(self) -> int:
        return len(self.ids) - 1

    def embeddings(self) -> list[Tensor]:
        """The embedding at each position i+1: the token's, or the projector's output."""
        table = [self.states[0][i + 1] for i in range(self.length - 1)]
        return [*table, EMBEDDING[self.ids[-1]]]

    def visual(self) -> list[bool]:
        return [t == tiny.IMAGE for t in self.ids[1:]]


def inputs_of(images: int) -> dict[str, Tensor]:
    one = tiny.llava_inputs(images, images=images, words=6)
    if images == 2:  # text between the two
        ids = one["input_ids"][0].tolist()
        at = ids.index(tiny.IMAGE) + 4
        one["input_ids"] = torch.tensor([[*ids[:at], 9, 17, *ids[at:]]])
        one["attention_mask"] = torch.ones_like(one["input_ids"])
    return one


@torch.no_grad()
def prompt(images: int) -> Prompt:
    """Computes the prompt's states with `transformers` alone."""
    inputs = inputs_of(images)
    out = MODEL(**inputs, output_hidden_states=True)
    states = [h[0] for h in out.hidden_states]
    return Prompt([*inputs["input_ids"][0].tolist(), int(out.logits[0, -1].argmax())], states)


@torch.no_grad()
def drafted(net: DraftNetwork, images: int, first: list[int], second: tuple[int, int]) -> list[Tensor]:
    """Returns logits below the root, its children `first`, and a grandchild `second` = (child index, token)."""
    inputs = inputs_of(images)
    reference = prompt(images)
    batch = run_teacher(adapt(MODEL, net.config.taps), inputs, [[reference.ids[-1]]])
    whole = batch.layout
    layout = Layout(whole.tokens, whole.modality, whole.positions, whole.start, [batch.prompt + 1])
    memory = Memory.begin(net, layout, batch.taps[:, : batch.prompt])
    anchors = memory.anchors()
    levels = net.levels(anchors, layout.newest())
    out = [levels.root(torch.ones(1, 1, 1)).logits[0, 0]]
    below = levels.below(torch.tensor([first]), torch.zeros(1, len(first), dtype=torch.long))
    out += list(below.logits[0])
    out.append(levels.below(torch.tensor([[second[1]]]), torch.tensor([[second[0]]])).logits[0, 0])
    return out


# -- common parts --


def rms(x: Tensor, weight: Tensor) -> Tensor:
    return x / torch.sqrt((x * x).mean() + EPS) * weight


def rotated(x: Tensor, position: int) -> Tensor:
    """Rotates the halves of one head [D] by the position."""
    half = len(x) // 2
    out = x.clone()
    for i in range(half):
        angle = position * THETA ** (-2 * i / len(x))
        out[i] = x[i] * math.cos(angle) - x[i + half] * math.sin(angle)
        out[i + half] = x[i + half] * math.cos(angle) + x[i] * math.sin(angle)
    return out


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def heads_of(x: Tensor, count: int) -> list[Tensor]:
    return list(x.view(count, -1))


def keys_of(w: dict[str, Tensor], n: Tensor, position: int) -> list[tuple[Tensor, Tensor]]:
    """Returns (key, value) of each key head, from the input of the projections."""
    ks, vs = heads_of(w["k_proj.weight"] @ n, KV), heads_of(w["v_proj.weight"] @ n, KV)
    if "k_norm.weight" in w:
        ks = [rms(k, w["k_norm.weight"]) for k in ks]
    return [(rotated(k, position), v) for k, v in zip(ks, vs, strict=True)]


def attention(w: dict[str, Tensor], n: Tensor, position: int, seen: list[list[tuple[Tensor, Tensor]]]) -> Tensor:
    out = []
    queries = heads_of(w["q_proj.weight"] @ n, 4)
    if "q_norm.weight" in w:
        queries = [rms(q, w["q_norm.weight"]) for q in queries]
    for i, q in enumerate(queries):
        q = rotated(q, position)
        pairs = [entry[i // (4 // KV)] for entry in seen]
        scores = torch.stack([q @ k for k, _ in pairs]) / math.sqrt(len(q))
        weights = torch.exp(scores - scores.max())
        weights = weights / weights.sum()
        out.append(sum(a * v for a, (_, v) in zip(weights, pairs, strict=True)))
    return w["o_proj.weight"] @ torch.cat(out)


def mlp(w: dict[str, Tensor], y: Tensor) -> Tensor:
    n = rms(y, w["mlp_norm.weight"])
    return w["down_proj.weight"] @ (silu(w["gate_proj.weight"] @ n) * (w["up_proj.weight"] @ n))


def weights(net: DraftNetwork, layer: int = 0) -> dict[str, Tensor]:
    own = {k: v.detach() for k, v in net.state_dict().items()}
    return own | {k.removeprefix(f"layers.{layer}."): v for k, v in own.items() if k.startswith(f"layers.{layer}.")}


def eagle(w: dict[str, Tensor], xs: list[Tensor], places: list[int], enter: Any, first: list[int], second: Any) -> Any:
    """EAGLE's drafting: states below a text whose inputs are xs at `places`; enter(state, token) is a draft's input."""
    seen = [keys_of(w, x, p) for x, p in zip(xs, places, strict=True)]

    def state(x: Tensor, position: int, entries: Any) -> Tensor:
        y = x + attention(w, x, position, entries)
        return y + mlp(w, y)

    root = state(xs[-1], places[-1], seen)
    out, kept = [root], []
    for token in first:
        x = enter(root, token)
        own = keys_of(w, x, places[-1] + 1)
        kept.append((state(x, places[-1] + 1, [*seen, own]), own))
        out.append(kept[-1][0])
    above, own = kept[second[0]]
    x = enter(above, second[1])
    out.append(state(x, places[-1] + 2, [*seen, own, keys_of(w, x, places[-1] + 2)]))
    return out


def assert_same(actual: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(actual, expected, strict=True):
        assert (a - b).abs().max() <= TOLERANCE
        assert b.std() > 1e-3


FIRST, SECOND = [5, 40], (1, 11)


@pytest.mark.parametrize("images", PROMPTS.values(), ids=PROMPTS)
def test_eagle_2(images: int) -> None:
    """x_i = fc([e_{i+1}; h_i]); one layer without an input norm; the target's head on its state."""
    net, reference = rivals.network(MODEL, "eagle2"), prompt(images)
    w = weights(net)
    fc = lambda e, h: w["fc.weight"] @ torch.cat([e, h]) + w["fc.bias"]  # noqa: E731
    xs = [fc(e, h) for e, h in zip(reference.embeddings(), reference.states[-1], strict=True)]
    states = eagle(w, xs, list(range(reference.length)), lambda s, t: fc(EMBEDDING[t], s), FIRST, SECOND)
    assert_same(drafted(net, images, FIRST, SECOND), [HEAD @ s for s in states])


@pytest.mark.parametrize("images", PROMPTS.values(), ids=PROMPTS)
def test_msd_as_published(images: int) -> None:
    """At visual positions the embedding itself is the layer's input; the state there is dropped."""
    net, reference = rivals.network(MODEL, "msd-published"), prompt(images)
    w = weights(net)
    fc = lambda e, h: w["fc.weight"] @ torch.cat([e, h]) + w["fc.bias"]  # noqa: E731
    three = zip(reference.embeddings(), reference.states[-1], reference.visual(), strict=True)
    xs = [e if visual else fc(e, h) for e, h, visual in three]
    states = eagle(w, xs, list(range(reference.length)), lambda s, t: fc(EMBEDDING[t], s), FIRST, SECOND)
    assert_same(drafted(net, images, FIRST, SECOND), [HEAD @ s for s in states])


@pytest.mark.parametrize("images", PROMPTS.values(), ids=PROMPTS)
def test_hivis(images: int) -> None:
    """Visual positions are removed, and text positions are counted without them."""
    net, reference = rivals.network(MODEL, "hivis"), prompt(images)
    w = weights(net)
    level = lambda h, d: h + w["residual"][d]  # noqa: E731
    fc = lambda e, h: w["fc.weight"] @ torch.cat([e, h]) + w["fc.bias"]  # noqa: E731
    three = zip(reference.embeddings(), reference.states[-1], reference.visual(), strict=True)
    xs = [fc(e, level(h, 0)) for e, h, visual in three if not visual]
    seen = []

    def enter(state: Tensor, token: int) -> Tensor:
        seen.append(token)
        return fc(EMBEDDING[token], level(state, 1 if len(seen) <= len(FIRST) else 2))

    states = eagle(w, xs, list(range(len(xs))), enter, FIRST, SECOND)
    assert_same(drafted(net, images, FIRST, SECOND), [HEAD @ s for s in states])


@pytest.mark.parametrize("images", PROMPTS.values(), ids=PROMPTS)
def test_vispec(images: int) -> None:
    """An image is one token at its last position; text after it has img_fc([h; g]) for its feature, before it g = 0."""
    net, reference = rivals.network(MODEL, "vispec"), prompt(images)
    w = weights(net)
    H = len(EMBEDDING[0])

    def adapted(image: list[Tensor]) -> list[Tensor]:
        """The two queries' results: per head, softmax(q·k/√D) over the image's embeddings, then the output matrix."""
        ks = [heads_of(w["adaptor.k_proj.weight"] @ e, 4) for e in image]
        vs = [heads_of(w["adaptor.v_proj.weight"] @ e, 4) for e in image]
        out = []
        for query in w["adaptor.q"]:
            parts = []
            for i in range(4):
                scores = torch.stack([query[i] @ k[i] for k in ks]) / math.sqrt(H // 4)
                share = torch.exp(scores) / torch.exp(scores).sum()
                parts.append(sum(a * v[i] for a, v in zip(share, vs, strict=True)))
            out.append(w["adaptor.o_proj.weight"] @ torch.cat(parts))
        return out

    g = torch.zeros(H)

    def text(e: Tensor, h: Tensor) -> Tensor:
        feature = w["img_fc.weight"] @ torch.cat([h, g]) + w["img_fc.bias"]
        return w["fc.weight"] @ torch.cat([e, feature]) + w["fc.bias"]

    xs, places, image = [], [], []
    visual = [*reference.visual(), False]
    for i, (e, h) in enumerate(zip(reference.embeddings(), reference.states[-1], strict=True)):
        if not visual[i]:
            xs.append(text(e, h))
            places.append(i)
            continue
        image.append(e)
        if not visual[i + 1]:
            token, g = adapted(image)
            xs.append(token)
            places.append(i)
            image = []
    states = eagle(w, xs, places, lambda s, t: text(EMBEDDING[t], s), FIRST, SECOND)
    assert len(xs) == reference.length - 3 * images
    assert_same(drafted(net, images, FIRST, SECOND), [HEAD @ s for s in states])


@pytest.mark.parametrize("images", PROMPTS.values(), ids=PROMPTS)
def test_eagle_3(images: int) -> None:
    """Features fc([h2; h_{L//2}; h_{L-3}]); attention reads [norm(e); norm(h)]; a reduced draft vocabulary."""
    net, reference = rivals.network(MODEL, "eagle3"), prompt(images)
    w = weights(net)
    fused = [
        torch.cat([reference.states[layer][i] for layer in (2, LAYERS // 2, LAYERS - 3)])
        for i in range(reference.length)
    ]
    pairs = [(e, w["fc.weight"] @ f) for e, f in zip(reference.embeddings(), fused, strict=True)]
    normed = lambda e, h: torch.cat([rms(e, w["input_norm.word.weight"]), rms(h, w["input_norm.feature.weight"])])  # noqa: E731
    seen = [keys_of(w, normed(e, h), i) for i, (e, h) in enumerate(pairs)]
    last = reference.length - 1

    def state(e: Tensor, h: Tensor, position: int, entries: Any) -> Tensor:
        y = h + attention(w, normed(e, h), position, entries)
        return y + mlp(w, y)

    root = state(*pairs[-1], last, seen)
    states, own = [root], []
    for token in FIRST:
        own.append(keys_of(w, normed(EMBEDDING[token], root), last + 1))
        states.append(state(EMBEDDING[token], root, last + 1, [*seen, own[-1]]))
    above, token = states[1 + SECOND[0]], SECOND[1]
    keys = keys_of(w, normed(EMBEDDING[token], above), last + 2)
    states.append(state(EMBEDDING[token], above, last + 2, [*seen, own[SECOND[0]], keys]))
    expected = [w["lm_head.weight"] @ rms(s, w["norm.weight"]) for s in states]
    assert_same(drafted(net, images, FIRST, SECOND), expected)


def test_eagle_3_vocabulary() -> None:
    """target id = i + d2t[i], and t2d marks the target ids in it."""
    net = rivals.network(MODEL, "eagle3", draft_vocabulary=3)
    net.choose_draft_vocabulary(torch.tensor([4, 5, 40]))
    assert net.d2t.tolist() == [4, 4, 38] and net.d2t.dtype == torch.int64
    assert [i for i, there in enumerate(net.t2d.tolist()) if there] == [4, 5, 40] and net.t2d.dtype == torch.bool
    assert net.ids.tolist() == [4, 5, 40]


@pytest.mark.parametrize("method", ["dflash", "dspark"])
@pytest.mark.parametrize("images", PROMPTS.values(), ids=PROMPTS)
def test_block_drafters(method: str, images: int) -> None:
    """Queries [e(root), e(mask), …] see each other and, in every layer, keys and values of norm(fc([states])).

    Query and key heads are normalised before the rotation. DFlash: a mask drafts its own place. DSpark: a position
    drafts the next, with W2·W1[parent] added.
    """
    net, reference = rivals.network(MODEL, method), prompt(images)
    own = weights(net)
    taps = net.config.taps[:-1]
    assert taps == (2, 4, 6)
    fused = [own["fc.weight"] @ torch.cat([reference.states[t][i] for t in taps]) for i in range(reference.length)]
    context = [rms(f, own["context_norm.weight"]) for f in fused]
    count = 8 if method == "dflash" else 7
    x = [EMBEDDING[reference.ids[-1]], *[EMBEDDING[net.config.variant.mask_token]] * (count - 1)]
    for layer in range(net.config.layers):
        w = weights(net, layer)
        before = [keys_of(w, c, i) for i, c in enumerate(context)]
        normed = [rms(h, w["input_norm.weight"]) for h in x]
        block = [keys_of(w, n, reference.length + j) for j, n in enumerate(normed)]
        y = [
            h + attention(w, n, reference.length + j, before + block)
            for j, (h, n) in enumerate(zip(x, normed, strict=True))
        ]
        x = [h + mlp(w, h) for h in y]
    states = [rms(h, own["norm.weight"]) for h in x][-7:]
    markov = lambda t: 0.0  # noqa: E731
    if method == "dspark":
        markov = lambda t: own["markov_out.weight"] @ own["markov_in.weight"][t]  # noqa: E731
    parents = [(0, reference.ids[-1]), *((1, t) for t in FIRST), (2, SECOND[1])]
    expected = [HEAD @ states[d] + markov(t) for d, t in parents]
    assert_same(drafted(net, images, FIRST, SECOND), expected)
    if method == "dspark":
        confidence = net.confidence_logits(torch.stack(states), torch.tensor([7] * 7))
        by_hand = [own["confidence.weight"][0] @ torch.cat([s, own["markov_in.weight"][7]]) for s in states]
        assert torch.allclose(confidence, torch.stack(by_hand) + own["confidence.bias"], atol=TOLERANCE)


@pytest.mark.parametrize("images", PROMPTS.values(), ids=PROMPTS)
@torch.no_grad()
def test_text_only_is_a_language_model(images: int) -> None:
    """Compares with `transformers`' Llama with the same layers, on the text without image tokens."""
    net = rivals.network(MODEL, "text-only", layers=3)
    net.begin_from(MODEL)
    text = MODEL.config.text_config
    config = LlamaConfig(**(text.to_dict() | {"num_hidden_layers": 3}))
    model = LlamaForCausalLM(config).eval()
    model.model.embed_tokens.load_state_dict(MODEL.get_input_embeddings().state_dict())
    model.lm_head.load_state_dict(MODEL.lm_head.state_dict())
    decoder = MODEL.model.language_model
    model.model.norm.load_state_dict(decoder.norm.state_dict())
    for layer, source in enumerate((0, 4, 7)):
        model.model.layers[layer].load_state_dict(decoder.layers[source].state_dict())
    reference = prompt(images)
    text = [t for t in reference.ids if t != tiny.IMAGE]
    logits = lambda *more: model(torch.tensor([[*text, *more]])).logits[0, -1]  # noqa: E731
    expected = [logits(), *(logits(t) for t in FIRST), logits(FIRST[SECOND[0]], SECOND[1])]
    assert_same(drafted(net, images, FIRST, SECOND), expected)
