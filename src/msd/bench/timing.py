"""An assistant for the library's assisted generation, for targets that nobody made one for.

The library takes any model of the same vocabulary; one that does not see refuses image tokens. So the assistant is the
target itself with the first third of its layers, sharing their weights, as in early-exit drafting without training for
it (LayerSkip, arXiv 2404.16710, does train for it, and drafts better).
"""

from __future__ import annotations

import copy
import itertools
import time
from collections.abc import Callable, Iterable
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


def shallow(model: PreTrainedModel) -> PreTrainedModel:
    """The model with the first third of its decoder layers, at least one; tensors are shared.

    ValueError where the decoder is not a list of layers.
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


@dataclass(frozen=True)
class Run:
    """Answers of one call and its times, in seconds. warm: of the same again, its photos being encoded already."""

    answers: list[list[int]]
    seconds: float
    prefill: float | None
    statistics: Statistics
    warm: float | None = None

    @property
    def tokens(self) -> int:
        """Tokens of all answers."""
        return sum(map(len, self.answers))

    def by_row(self) -> Iterable[tuple[list[RowStep], list[int]]]:
        """(steps, tokens) of every answer."""
        for row, answer in enumerate(self.answers):
            yield [step for step in self.statistics.steps if step.row == row], answer


class _FirstToken(BaseStreamer):
    """Notes when the first generated token comes."""

    def __init__(self) -> None:
        self.calls, self.at = 0, 0.0

    def put(self, value: Any) -> None:
        """The prompt comes first, then one call per token."""
        self.calls += 1
        if self.calls == 2:
            self.at = time.perf_counter()

    def end(self) -> None:
        """Nothing to flush."""


# ways of the library's own to decode: name -> what is added to `generate()` of a model
LIBRARY: dict[str, Callable[[PreTrainedModel], dict[str, Any]]] = {
    "transformers": lambda _: {},
    "transformers:prompt-lookup": lambda _: {"prompt_lookup_num_tokens": 10},
    "transformers:assisted": lambda model: {"assistant_model": shallow(model)},
}
TRANSFORMERS, PLAIN = "transformers", "ar"  # the library's plain decoding, and ours
DRAFTING = ("prompt_lookup_num_tokens", "assistant_model")


def library(model: PreTrainedModel, inputs: dict[str, Any], settings: dict[str, Any], seed: int) -> Run:
    """`transformers` `generate()`. Of a batch the time to the first token is not known: it takes no streamer.

    Nor does it when it drafts, and then its passes are not counted: statistics are empty.
    """
    torch.manual_seed(seed)
    length, rows = inputs["input_ids"].shape[1], len(inputs["input_ids"])
    first, drafts = _FirstToken(), any(name in settings for name in DRAFTING)
    begin = time.perf_counter()
    output = model.generate(**inputs, **settings, **({"streamer": first} if rows == 1 and not drafts else {}))
    seconds = time.perf_counter() - begin
    ends = model.generation_config.eos_token_id
    ends = set(ends if isinstance(ends, list) else [ends])
    answers = [_until(row, ends) for row in output[:, length:].tolist()]
    emitted = sum(map(len, answers)) - rows
    statistics = Statistics() if drafts else Statistics(num_spec_steps=emitted, num_emitted_tokens=emitted)
    return Run(answers, seconds, first.at - begin if first.at else None, statistics)


def ours(
    engine: SpeculativeVLM, inputs: dict[str, Any], settings: dict[str, Any], seed: int, warm: bool = False
) -> Run:
    """Our loop with empty caches, and once more with the photos encoded if `warm`."""
    engine.target.vision.clear()
    begin = time.perf_counter()
    answer = engine.generate(**inputs, **settings, seed=seed)
    seconds, again = time.perf_counter() - begin, None
    if warm:
        begin = time.perf_counter()
        engine.generate(**inputs, **settings, seed=seed)
        again = time.perf_counter() - begin
    results = answer if isinstance(answer, list) else [answer]
    statistics = results[0].statistics
    return Run([r.tokens for r in results], seconds, statistics.seconds["prefill"], statistics, again)


def _until(tokens: list[int], ends: set[int]) -> list[int]:
    """Tokens up to the first that ends an answer, which is kept; padding comes after it."""
    at = next((i for i, token in enumerate(tokens) if token in ends), len(tokens))
    return tokens[: at + 1]


CONTEXT = 128
NODES = (1, 9)  # of plain decoding, and of a tree of eight drafts
TIMES = 7


@torch.inference_mode()
def outside_kernels(target: Target) -> dict[str, float] | None:
    """Nodes of a pass -> share of its time outside operators, in [0, 1].

    None where work is queued, as on a GPU, and with a torch that no longer has this profiler. (`torch.profiler` writes
    two lines to stderr each time it is used.)

    The time inside is the sum of the operators' own times in profiled passes, the whole that of passes without the
    profiler; medians of both. An operator's own time holds its C++ dispatch and some of the profiler's work, so the
    share is a lower bound.
    """
    if target.model.device.type != "cpu":
        return None
    try:
        from torch.autograd.profiler_legacy import profile
    except ImportError:
        return None
    state, _ = target.prefill(arbitrary_tokens(CONTEXT, target)[None], {}, CONTEXT + max(NODES) + 1)
    found = {}
    for nodes in NODES:
        tree = chain(nodes, target)
        whole, inside = [], []
        for _ in range(TIMES):
            start = time.perf_counter()
            target.score(state, tree)
            whole.append(time.perf_counter() - start)
            with profile() as record:
                target.score(state, tree)
            inside.append(sum(event.self_cpu_time_total for event in record.function_events or ()) / 1e6)
        found[str(nodes)] = max(0.0, 1 - median(inside) / median(whole))
    return found
