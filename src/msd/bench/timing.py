"""Times one call of a method: our decoding loop, or `transformers` `generate()` with its own ways to draft."""

from __future__ import annotations

import copy
import itertools
import time
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from msd.core.statistics import RowStep, Statistics
from msd.model import SpeculativeVLM
from msd.planning.costs import arbitrary_tokens, chain
from msd.targets.base import Target

TRANSFORMERS, PLAIN = "transformers", "ar"  # decoding without drafts: the library's, and ours

CONTEXT = 128  # tokens before the passes that `outside_kernels` times
NODES = (1, 9)  # sizes of these passes: plain decoding, and a chain of eight drafts
TIMES = 7


@dataclass(frozen=True)
class Run:
    """The answers of one timed call. Times are in seconds.

    prefill: time to the first token, None if unknown. warm: time of a second call, whose images are encoded already.
    """

    answers: list[list[int]]
    seconds: float
    prefill: float | None
    statistics: Statistics
    warm: float | None = None

    @property
    def tokens(self) -> int:
        """Number of tokens in all answers."""
        return sum(map(len, self.answers))

    def by_row(self) -> Iterable[tuple[list[RowStep], list[int]]]:
        """Yields (steps, tokens) of every answer."""
        for row, answer in enumerate(self.answers):
            yield [step for step in self.statistics.steps if step.row == row], answer


def early_exit_assistant(model: PreTrainedModel) -> PreTrainedModel:
    """Returns the model with the first third of its decoder layers, at least one. Tensors are shared.

    It is the assistant for the library's assisted generation, which takes any model of the same vocabulary. A text-only
    model refuses image tokens, so the target drafts for itself, as in LayerSkip (arXiv 2404.16710), but without
    LayerSkip's training. Raises ValueError if the decoder has no list of layers.
    """
    shared = {id(tensor): tensor for tensor in itertools.chain(model.parameters(), model.buffers())}
    assistant = copy.deepcopy(model, shared)
    decoder = assistant.get_decoder()
    layers = getattr(decoder, "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise ValueError(f"the decoder of {type(model).__name__} has no list of layers to shorten")
    kept = max(1, len(layers) // 3)
    decoder.layers = layers[:kept]
    for config in (assistant.config.get_text_config(decoder=True), decoder.config):
        config.num_hidden_layers = kept
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:kept]
    return assistant


# the library's own decoding methods: name -> arguments of `generate()` for a model
LIBRARY: dict[str, Callable[[PreTrainedModel], dict[str, Any]]] = {
    "transformers": lambda _: {},
    "transformers:prompt-lookup": lambda _: {"prompt_lookup_num_tokens": 10},
    "transformers:assisted": lambda model: {"assistant_model": early_exit_assistant(model)},
}
DRAFTING = ("prompt_lookup_num_tokens", "assistant_model")


class _FirstToken(BaseStreamer):
    """Records when the first generated token arrives."""

    def __init__(self) -> None:
        self.calls, self.at = 0, 0.0

    def put(self, value: Any) -> None:
        """Receives the prompt first, then one token per call."""
        self.calls += 1
        if self.calls == 2:
            self.at = time.perf_counter()

    def end(self) -> None:
        """Does nothing: there is no buffer to flush."""


def time_library(model: PreTrainedModel, inputs: dict[str, Any], settings: dict[str, Any], seed: int) -> Run:
    """Times `transformers` `generate()`.

    The time to the first token is unknown for batches and for the library's drafting, which take no streamer. Drafting
    passes are not counted either: their statistics are empty.
    """
    torch.manual_seed(seed)
    length, rows = inputs["input_ids"].shape[1], len(inputs["input_ids"])
    first, drafts = _FirstToken(), any(name in settings for name in DRAFTING)
    begin = time.perf_counter()
    output = model.generate(**inputs, **settings, **({"streamer": first} if rows == 1 and not drafts else {}))
    seconds = time.perf_counter() - begin
    answers = [until(row, model.generation_config.eos_token_id) for row in output[:, length:].tolist()]
    emitted = sum(map(len, answers)) - rows
    statistics = Statistics() if drafts else Statistics(num_spec_steps=emitted, num_emitted_tokens=emitted)
    return Run(answers, seconds, first.at - begin if first.at else None, statistics)


def time_engine(
    engine: SpeculativeVLM, inputs: dict[str, Any], settings: dict[str, Any], seed: int, warm: bool = False
) -> Run:
    """Times our loop with an empty vision cache; if `warm`, a second time with the images encoded."""
    engine.target.vision.clear()
    begin = time.perf_counter()
    answer = engine.generate(**inputs, **settings, seed=seed)
    seconds, second = time.perf_counter() - begin, None
    if warm:
        begin = time.perf_counter()
        engine.generate(**inputs, **settings, seed=seed)
        second = time.perf_counter() - begin
    results = answer if isinstance(answer, list) else [answer]
    statistics = results[0].statistics
    return Run([r.tokens for r in results], seconds, statistics.seconds["prefill"], statistics, second)


def until(tokens: list[int], ends: int | Collection[int | None] | None) -> list[int]:
    """Returns the tokens up to and including the first end token; padding follows it."""
    ends = {ends} if ends is None or isinstance(ends, int) else ends
    at = next((i for i, token in enumerate(tokens) if token in ends), len(tokens))
    return tokens[: at + 1]


@torch.inference_mode()
def outside_kernels(target: Target) -> dict[str, float] | None:
    """Measures the share of a target pass, in [0, 1], that is spent outside operators, by number of nodes.

    The time inside is the sum of the operators' own times in profiled passes; the total comes from passes without the
    profiler. Both are medians. An operator's own time includes its C++ dispatch and some profiler work, so the share is
    a lower bound. None for a device with a queue, such as a GPU, and where torch has no legacy profiler
    (`torch.profiler` writes two lines to stderr at each use).
    """
    if target.model.device.type != "cpu":
        return None
    try:
        from torch.autograd.profiler_legacy import profile
    except ImportError:
        return None
    state, _ = target.prefill(arbitrary_tokens(CONTEXT, target)[None], {}, CONTEXT + max(NODES) + 1)
    shares = {}
    for nodes in NODES:
        tree = chain(nodes, target)
        total, inside = [], []
        for _ in range(TIMES):
            start = time.perf_counter()
            target.score(state, tree)
            total.append(time.perf_counter() - start)
            with profile() as record:
                target.score(state, tree)
            inside.append(sum(event.self_cpu_time_total for event in record.function_events or ()) / 1e6)
        shares[str(nodes)] = max(0.0, 1 - median(inside) / median(total))
    return shares
