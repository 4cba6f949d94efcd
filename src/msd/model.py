"""`SpeculativeVLM`, the main class: takes images and a prompt, returns text, token ids and statistics.

`transformers`' `generate()` builds the generation config, logits processors and stopping criteria, and then calls the
MSD loop through its `custom_generate` hook. Every generation option therefore has the same meaning as in `generate()`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.generation import StopStringCriteria

from msd import config, drafters, formats, loading, verify
from msd.chat import Chat
from msd.config import SpeculativeConfig
from msd.core.sampling import Sampler, Seed, generators
from msd.core.statistics import Statistics
from msd.core.tree import Scores, Step
from msd.decode import Engine, decode
from msd.drafters import Drafter, auxiliary
from msd.drafters.overlap import Prefetch
from msd.errors import UserError
from msd.inputs import prompts
from msd.planning.costs import costs
from msd.planning.plan import Plan
from msd.result import Outputs, Result
from msd.streaming import Steps, Stream, request_lock, run_to_end
from msd.system.machine import Cores, watched
from msd.targets import Past, adapt
from msd.targets.registry import fingerprint
from msd.targets.state import State


@dataclass
class Prefilled:
    """A batch of requests after its prompts have been read. input_ids: [B, L]. prompt: their scores, [B, 1, V]."""

    input_ids: Tensor
    config: GenerationConfig
    sampler: Sampler
    state: State
    prompt: Scores
    statistics: Statistics


class SpeculativeVLM:
    """A vision-language model that decodes speculatively; its output is the same as without speculation.

    model: a `transformers` image-text-to-text model of a supported architecture. processor: its processor.
    drafter: a method name, a drafter, or the folder or hub id of a head; by default the config's method, else the best
    that there is for this model (`msd.drafters.choose`). Attribute `reason`: why this drafter was chosen.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        processor: Any,
        config: SpeculativeConfig | None = None,
        drafter: str | Path | Drafter | None = None,
    ) -> None:
        self.config = config or SpeculativeConfig()
        self.reason, chosen = "the user's choice", drafter or self._draft_model(model) or self.config.method
        if chosen is None:
            chosen, self.reason = drafters.choose(fingerprint(model), model)
        if isinstance(chosen, Path) or (isinstance(chosen, str) and "/" in chosen):
            chosen = formats.drafter(chosen)
        self.drafter = drafters.create(chosen) if isinstance(chosen, str) else chosen
        self.model, self.processor = model.eval(), processor
        self.drafter.fit(model.config.get_text_config(decoder=True).num_hidden_layers)
        self.target = adapt(model, self.drafter.taps, backend=self.config.backend)
        self.target.frozen = self.config.frozen_weights
        if processor is not None:
            self.drafter.translate(processor.tokenizer)
            self.drafter.share_vision_tower(partial(auxiliary.picture_tokens, self.target, processor))
        self.drafter.attach(model, self.target.backend.name)
        self.verifier = self._policy(self.config.verifier, self.config.epsilon)
        # a plan that depends on measured times is used only if drafts cannot change the output: a seed gives one answer
        lossy = not self.verifier.lossless or self.target.backend.lossy
        adaptive = self.config.adaptive and not self.drafter.sampled and not lossy and self.drafter.name != "ar"
        measured = costs(self.target) if adaptive else None
        if adaptive and self.config.calibrate:
            self.drafter.remember(model)
        self.plan = Plan(self.config.nodes, self.config.depth, self.config.width, measured)
        self._lock = request_lock(model)
        self._attached = self._embedding()

    @classmethod
    def from_pretrained(
        cls,
        target: str | Path = "reference",
        drafter: str | Path | Drafter | None = None,
        config: SpeculativeConfig | None = None,
        **kwargs: Any,
    ) -> SpeculativeVLM:
        """Loads a target by name ("reference", "reference-video", a folder, or a hub id) and a drafter by method name.

        A drafter may also be the folder or hub id of a head, ours or published (a text with a slash).

        kwargs go to `AutoModelForImageTextToText.from_pretrained` (dtype: float32 on a CPU unless given, device_map …).
        """
        model, processor = loading.load_target(target, **kwargs)
        return cls(model, processor, config, drafter)

    def with_method(self, drafter: str | Path | Drafter) -> SpeculativeVLM:
        """Returns the same loaded model with another drafter; both share the cache of vision features."""
        other = SpeculativeVLM(self.model, self.processor, self.config, drafter)
        other.target.vision = self.target.vision
        return other

    @overload
    def generate(self, images: Any, prompt: str, *, seed: Seed = None, **kwargs: Any) -> Result: ...

    @overload
    def generate(self, images: Any, prompt: list[str], *, seed: Seed = None, **kwargs: Any) -> list[Result]: ...

    @overload
    def generate(
        self, images: Any = None, *, messages: prompts.Messages | None = None, seed: Seed = None, **kwargs: Any
    ) -> Result | list[Result]: ...

    def generate(
        self,
        images: Any = None,
        prompt: str | Sequence[str] | None = None,
        *,
        on_step: Callable[[Step], None] | None = None,
        **kwargs: Any,
    ) -> Result | list[Result]:
        """Answers a prompt about images. A list of prompts, or several answers to one prompt, return a list of results.

        images: one image or a list (path, bytes, PIL image, array, `Video`, `Audio`); with several prompts, one image
        for all of them, or a list with an image, a list of images or None for each.
        messages: a chat in `transformers`' or OpenAI's format instead of a prompt; its parts carry the images, or
        `images` does. Processor output (`**inputs`) may be passed instead of both.
        seed: an int (row i of a batch uses seed + i and answers as if it were alone), one per row, or a
        `torch.Generator` that the whole batch shares; by default torch's global generator, as in `generate()`.
        events: a recording of an event camera (file, `EventStream`, `Recording`) for a drafter that reads them, or a
        list with a recording or None for each prompt. The drafter encodes them while the target prefills. Other
        sources of auxiliary tokens register their own keyword (`msd.drafters.auxiliary`).
        auxiliary: instead of a source, auxiliary tokens [B, E, H], zero in rows without any, or a function that
        computes them (their times in `statistics.seconds`: see `msd.drafters.overlap`).
        request: with processor output, the `prompts.Request` that it was made of, for drafters that read prompts.
        past: the state of a conversation (`Past`), which this method reuses and updates; `chat` keeps one.
        on_step: called with each `msd.core.tree.Step`: its tree, scores and accepted tokens.
        kwargs: any option of `transformers`' `generate()` with one beam: generation_config, do_sample, temperature,
        logits_processor, stopping_criteria, stop_strings, streamer, max_new_tokens …
        With return_dict_in_generate=True, the result also has `sequences`, and `scores` and `logits` if output_scores
        and output_logits are set: the tensors of `GenerateDecoderOnlyOutput` for the whole batch (see `Outputs`).
        output_attentions and output_hidden_states are refused.
        """
        with self._lock:
            return run_to_end(self._answers(images, prompt, **kwargs), on_step)

    def _answers(
        self,
        images: Any = None,
        prompt: str | Sequence[str] | None = None,
        *,
        messages: prompts.Messages | None = None,
        seed: Seed = None,
        past: Past | None = None,
        **kwargs: Any,
    ) -> Steps[Result | list[Result]]:
        """Runs `generate` as a generator of steps, without the lock."""
        if isinstance(prompt, list | tuple) and not prompt:
            return []
        listed = prompt is not None and not isinstance(prompt, str)
        if "input_ids" not in kwargs:
            request = self._request(images, prompt, messages)
            kwargs = {**request.inputs(), "request": request, **kwargs}
        elif images is not None or prompt is not None or messages is not None:
            raise UserError("give processor output or images with a prompt, not both")
        results = yield from self._generate(kwargs, seed, past)
        return results if listed or len(results) > 1 else results[0]

    def stream(self, images: Any = None, prompt: str | None = None, **kwargs: Any) -> Stream:
        """Answers one prompt like `generate`, and yields the text in pieces; see `Stream`."""
        return Stream(partial(self._answers, images, prompt), self._lock, self.processor.tokenizer, kwargs)

    def chat(self) -> Chat:
        """Starts a conversation; see `Chat`."""
        return Chat(self._answers, self._lock, self.processor)

    def _request(self, images: Any, prompt: Any, messages: Any) -> prompts.Request:
        """Returns the request for a prompt, a list of prompts, or messages."""
        if (prompt is None) == (messages is None):
            raise UserError("give a prompt or messages (one of the two), or processor output")
        if self.processor is None:
            raise UserError("this engine has no processor; give it one, or give processor output: generate(**inputs)")
        if messages is not None or isinstance(prompt, str):
            group = [] if images is None else images if isinstance(images, list | tuple) else [images]
            chats = None if messages is None else [messages]
            return prompts.Request.of(self.processor, [group], None if prompt is None else [prompt], chats)
        if not isinstance(prompt, list | tuple):
            raise UserError(f"the prompt must be text or a list of texts, got {type(prompt).__name__}")
        return prompts.Request.of(self.processor, prompts.grouped(images, len(prompt)), prompt)

    @torch.inference_mode()
    def _generate(self, kwargs: dict[str, Any], seed: Seed, past: Past | None = None) -> Steps[list[Result]]:
        """Prefills the prompts of a request and decodes them."""
        begin = time.perf_counter()
        streamer = kwargs.pop("streamer", None)
        with watched() as cores:
            request = self._prefill(kwargs, seed, past, streamer, cores)
            results = yield from self._decode(request, streamer, cores)
        if past is not None:
            past.renew(request.state)
        seconds = request.statistics.seconds
        seconds["total"] = time.perf_counter() - begin - seconds.pop("paused")
        seconds["host"] = seconds["total"] - seconds["prefill"] - seconds["draft"] - seconds["verify"]
        return results

    @torch.inference_mode()
    def prefill(self, inputs: dict[str, Any], seed: Seed = None, past: Past | None = None, **kwargs: Any) -> Prefilled:
        """Prefills a request, whose answer `msd.decode` then computes, for a caller that batches requests itself.

        inputs: processor output. seed, past, kwargs: as for `generate`. The caller holds the lock of the model's
        requests (`msd.streaming.request_lock`). UserError: as from `generate`.
        """
        with watched() as cores:
            return self._prefill({**inputs, **kwargs}, seed, past, None, cores)

    def _prefill(
        self, kwargs: dict[str, Any], seed: Seed, past: Past | None, streamer: Any, cores: Cores
    ) -> Prefilled:  # fmt: skip
        """Has the model's `generate()` prepare a request, then encodes its images and runs its prompt."""
        statistics = Statistics()
        self._reattach()
        request = kwargs.pop("request", None)
        kwargs = self._with_stop_strings(kwargs, config.checked(self.model, kwargs))
        prefetch = Prefetch(self.drafter, auxiliary.take(self.drafter, kwargs), statistics)
        inputs = {name: value for name, value in kwargs.items() if isinstance(value, Tensor)}
        with prefetch.prefill():
            kwargs = self.target.encode_images(kwargs)
        cores.check()
        prefilled: Prefilled = self.model.generate(
            **kwargs,
            custom_generate=lambda _, input_ids, **options: partial(
                self._run_prompt, input_ids, **options, seed=seed, streamer=streamer, past=past, prefetch=prefetch
            ),
        )()
        prefilled.state.inputs, prefilled.state.request = inputs, request
        prefetch.finish(prefilled.state)
        return prefilled

    def _run_prompt(
        self,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        *,
        seed: Seed,
        streamer: Any,
        past: Past | None,
        prefetch: Prefetch,
        **model_kwargs: Any,
    ) -> Prefilled:
        """Runs the prompt and creates the sampler; `generate()` calls it as its decoding method."""
        B, L = input_ids.shape
        self._refuse(generation_config, B, L, streamer)
        capacity = generation_config.max_length + self.plan.nodes + 1
        if generation_config.max_length > L + 2:  # the first token and the last that fits are never drafted
            prefetch.read_prompt(lambda: self.target.lay_out(input_ids, model_kwargs, capacity)[0])
        with prefetch.prefill():
            before = past.state if past else None
            state, prompt = self.target.prefill(input_ids, model_kwargs, capacity, before, past is not None)
        prefetch.statistics.num_prefill_rows = B * state.prefilled
        padding = generation_config._pad_token_tensor
        sampler = Sampler(
            state.layout, logits_processor, stopping_criteria, bool(generation_config.do_sample),
            prompt.logits.shape[-1], generators(seed, B, input_ids.device), input_ids,
            None if padding is None else int(padding), Outputs.need_logits(generation_config),
        )  # fmt: skip
        return Prefilled(input_ids, generation_config, sampler, state, prompt, prefetch.statistics)

    def _decode(self, request: Prefilled, streamer: Any, cores: Cores) -> Steps[list[Result]]:
        """Runs the decoding loop on a prefilled batch."""
        statistics, sampler = request.statistics, request.sampler
        outputs = Outputs(request.input_ids, request.config)
        if streamer is not None:
            streamer.put(request.input_ids.cpu())
        answers: list[list[int]] = [[] for _ in request.input_ids]
        for step in decode(self.engine, sampler, request.state, request.prompt):
            statistics.read(step)
            outputs.read(step)
            for row, tokens in enumerate(step.accepted.tokens):
                answers[row] += [] if row in step.accepted.padded else tokens
            if streamer is not None:
                for token in step.accepted.tokens[0]:
                    streamer.put(torch.tensor([token]))
            cores.check()
            with statistics.timed("paused"):
                yield step
            cores.resume()
        self.drafter.finish()
        if streamer is not None:
            streamer.end()
        fields = outputs.fields()
        return [self._result(tokens, sampler.finish[i], i, statistics, fields) for i, tokens in enumerate(answers)]

    @property
    def engine(self) -> Engine:
        """What decodes prefilled requests."""
        return Engine(self.target, self.drafter, self.verifier, self.plan, self.config.label, self.config.foresight)

    def engine_with(self, policy: str, epsilon: float = 0.0) -> Engine:
        """What decodes prefilled requests under another policy. UserError: an unknown one, or an ε that it lacks."""
        verifier, c = self._policy(policy, epsilon), self.config
        plan = self.plan if verifier.lossless else Plan(c.nodes, c.depth, c.width)
        return replace(self.engine, verifier=verifier, plan=plan)

    def _policy(self, name: str, epsilon: float) -> verify.Verifier:
        """The policy `name`, with the config's thresholds for its own policy, else those of the drafter for ε."""
        thresholds = self.config.thresholds if name == self.config.verifier else {}
        if verify.policy(name).calibrated and not thresholds:
            thresholds = self.drafter.thresholds(epsilon)
        return verify.create(name, thresholds, epsilon)

    def _draft_model(self, model: PreTrainedModel) -> Drafter | None:
        """Loads the config's draft model, in the target's dtype and on its device; None if it has none."""
        c = self.config
        if c.draft_model is None:
            return None
        return loading.load_draft_model(c.draft_model, c.draft_sees, str(model.device), dtype=model.dtype)

    def _embedding(self) -> tuple[Any, ...]:
        """Returns what the drafter is attached to: the embedding layer, the shape of its weights, and the device."""
        embedding = self.model.get_input_embeddings()
        return embedding, getattr(getattr(embedding, "weight", None), "shape", None), self.model.device

    def _reattach(self) -> None:
        """Attaches the drafter again if the model's embedding has changed; UserError if it does not fit any more."""
        if self._attached != self._embedding():
            self.drafter.attach(self.model, self.target.backend.name)
            self._attached = self._embedding()

    def _refuse(self, config: GenerationConfig, batch: int, length: int, streamer: Any) -> None:
        """Raises UserError for a batch with a streamer, or a length that exceeds the model's context."""
        if streamer is not None and batch > 1:
            raise UserError(f"a streamer takes one prompt at a time, got {batch}")
        context = self.target.context_length
        if context is not None and config.max_length > context:
            raise UserError(
                f"{length} prompt tokens and {config.max_length - length} new ones do not fit the model's context of "
                f"{context}; lower max_new_tokens to at most {max(context - length, 0)} or shorten the prompt"
            )

    def _with_stop_strings(self, kwargs: dict[str, Any], config: GenerationConfig) -> dict[str, Any]:
        """Turns stop strings into a stopping criterion; `generate()` does not pass the tokenizer to a decoding method.

        config: the merged options of the generation.
        """
        strings = config.stop_strings
        tokenizer = kwargs.pop("tokenizer", None) or (self.processor and self.processor.tokenizer)
        if not strings:
            return {**kwargs, "stop_strings": None}
        if tokenizer is None:
            raise UserError(f"stop_strings={strings!r} need a tokenizer; give tokenizer=… or load a processor")
        criteria = StoppingCriteriaList(kwargs.pop("stopping_criteria", None) or [])
        criteria.append(StopStringCriteria(stop_strings=strings, tokenizer=tokenizer))
        return {**kwargs, "stopping_criteria": criteria, "stop_strings": None}

    def _result(
        self, tokens: list[int], finish: str | None, row: int, statistics: Statistics, fields: dict[str, Any]
    ) -> Result:
        """Builds the result of a row. finish: why it stopped. fields: those of `return_dict_in_generate`."""
        text = self.processor.tokenizer.decode(tokens, skip_special_tokens=True) if self.processor else ""
        labels = [None, *statistics.predicted[row]] if row in statistics.predicted else None
        return Result(text, tokens, finish or "", self.drafter.name, statistics, labels, **fields)
