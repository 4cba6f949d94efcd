"""SpeculativeVLM: the front door. Images and a prompt in; text, token ids and statistics out.

Preparation is `transformers` own: `generate()` builds the generation config, logits processors and stopping criteria,
then hands over to the MSD loop through its `custom_generate` hook, so that everything a user can set there means here
exactly what it means there.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.generation import StopStringCriteria

from msd import config, drafters, loading, verify
from msd.chat import Chat
from msd.config import SpeculativeConfig
from msd.core.sampling import Sampler, Seed, generators
from msd.core.statistics import Statistics
from msd.core.tree import Step
from msd.decode import decode
from msd.drafters import BorrowsEye, Calibrated, Drafter, Translates, recordings
from msd.drafters.overlap import Ahead, Beside
from msd.drafters.recordings import event_tokens
from msd.errors import UserError
from msd.inputs import prompts
from msd.planning.costs import costs
from msd.planning.plan import Plan
from msd.result import Outputs, Result
from msd.streaming import Steps, Stream, finished, request_lock
from msd.system.machine import Cores, watched
from msd.targets import Past, adapt
from msd.targets.registry import fingerprint


class SpeculativeVLM:
    """A vision-language model that decodes speculatively; its output is that of the model alone.

    model: a `transformers` image-text-to-text model of a supported architecture. processor: its processor.
    drafter: a method name or a drafter; by default the config's method, or what ships for this very model.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        processor: Any,
        config: SpeculativeConfig | None = None,
        drafter: str | Drafter | None = None,
    ) -> None:
        self.config = config or SpeculativeConfig()
        chosen = drafter or self.config.method or drafters.default(fingerprint(model))
        self.drafter = drafters.create(chosen) if isinstance(chosen, str) else chosen
        self.model, self.processor = model.eval(), processor
        self.target = adapt(model, self.drafter.taps, backend=self.config.backend)
        if processor is not None and isinstance(self.drafter, Translates):
            self.drafter.translate(processor.tokenizer)
        if processor is not None and isinstance(self.drafter, BorrowsEye):
            self.drafter.borrow(partial(event_tokens, self.target, processor))
        self.drafter.attach(model, self.target.backend.name)
        thresholds = self.config.thresholds
        policy = verify.policy(self.config.verifier)
        if policy.calibrated and not thresholds and isinstance(self.drafter, Calibrated):
            thresholds = self.drafter.thresholds(self.config.epsilon)
        self.verifier = verify.create(self.config.verifier, thresholds, self.config.epsilon)
        # where a draft has a say in what is drawn, the time that steps take must not: a seed gives one answer
        lossy = not policy.lossless or self.target.backend.lossy
        silent = not self.drafter.sampled and not lossy
        adaptive = self.config.adaptive and silent and self.drafter.name != "ar"
        measured = costs(self.target) if adaptive else None
        self.plan = Plan(self.config.nodes, self.config.depth, self.config.width, measured)
        self._lock = request_lock(model)
        self._attached = self._embedding()

    @classmethod
    def from_pretrained(
        cls,
        target: str | Path = "reference",
        drafter: str | Drafter | None = None,
        config: SpeculativeConfig | None = None,
        **kwargs: Any,
    ) -> SpeculativeVLM:
        """Loads a target by name ("reference", "reference-video", a folder, or a hub id) and a drafter by method name.

        kwargs go to `AutoModelForImageTextToText.from_pretrained` (dtype: float32 on a CPU unless given, device_map …).
        """
        model, processor = loading.load_target(target, **kwargs)
        return cls(model, processor, config, drafter)

    def with_method(self, drafter: str | Drafter) -> SpeculativeVLM:
        """The same loaded model with another drafter; vision features are shared."""
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
        messages: prompts.Messages | None = None,
        seed: Seed = None,
        past: Past | None = None,
        on_step: Callable[[Step], None] | None = None,
        **kwargs: Any,
    ) -> Result | list[Result]:
        """Answers a prompt about images; a list of prompts, or several answers to one, give a list of results.

        images: one source or a list (path, bytes, PIL image, array, `Video`, `Audio`); with several prompts, one source
        that all of them are about, or a list with a source, a list of sources or None for each.
        messages: a chat in `transformers`' or OpenAI's format instead of a prompt; what it shows is carried by its
        parts, or given as images. Or give processor output (`**inputs`) and neither.
        seed: an int (row i of a batch uses seed + i and answers as if it were alone), one per row, or a
        `torch.Generator` that the whole batch shares; without one, torch's global generator, as `generate()` has it.
        events: an event recording (file, `EventStream`, `Recording`), or a list with one, or None, for each prompt, for
        a drafter that sees events. What it makes of them is made while the target prefills.
        beside: in their place, tokens [B, E, H] that only the drafter sees, zero in rows without any, or a function
        that makes them (`statistics.seconds`: see `msd.drafters.overlap`).
        past: what earlier turns of a conversation computed; renewed here (`chat` keeps one).
        on_step: is given every step with its trees, scores and choices (`msd.core.tree.Step`), as it is made.
        kwargs: anything `transformers` `generate()` takes with one beam: generation_config, do_sample, temperature,
        logits_processor, stopping_criteria, stop_strings, streamer, max_new_tokens …
        With return_dict_in_generate=True, the result also has `sequences`, and `scores` and `logits` if output_scores
        and output_logits are set: the tensors of `GenerateDecoderOnlyOutput` for the whole batch (see `Outputs`).
        output_attentions and output_hidden_states are refused.
        """
        with self._lock:
            steps = self._answers(images, prompt, messages=messages, seed=seed, past=past, **kwargs)
            return finished(steps, on_step)

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
        """What `generate` does, step by step."""
        if isinstance(prompt, list | tuple) and not prompt:
            return []
        listed = prompt is not None and not isinstance(prompt, str)
        if "input_ids" not in kwargs:
            kwargs = {**self._inputs(images, prompt, messages), **kwargs}
        elif images is not None or prompt is not None or messages is not None:
            raise UserError("give processor output or images with a prompt, not both")
        results = yield from self._generate(kwargs, seed, past)
        return results if listed or len(results) > 1 else results[0]

    def stream(self, images: Any = None, prompt: str | None = None, **kwargs: Any) -> Stream:
        """As `generate` for one prompt, in text pieces: iterate over it; `.result` afterwards, `.close()` to stop."""
        return Stream(partial(self._answers, images, prompt), self._lock, self.processor.tokenizer, kwargs)

    def chat(self) -> Chat:
        """A new conversation; see `Chat`."""
        return Chat(self._answers, self._lock, self.processor)

    def _inputs(self, images: Any, prompt: Any, messages: Any) -> dict[str, Any]:
        """Processor output of either front-door form."""
        if (prompt is None) == (messages is None):
            raise UserError("give a prompt or messages (one of the two), or processor output")
        if self.processor is None:
            raise UserError("this engine has no processor; give it one, or give processor output: generate(**inputs)")
        if messages is not None or isinstance(prompt, str):
            group = [] if images is None else images if isinstance(images, list | tuple) else [images]
            chats = None if messages is None else [messages]
            return prompts.prepare(self.processor, [group], None if prompt is None else [prompt], chats)
        if not isinstance(prompt, list | tuple):
            raise UserError(f"the prompt must be text or a list of texts, got {type(prompt).__name__}")
        return prompts.prepare(self.processor, prompts.grouped(images, len(prompt)), prompt)

    @torch.inference_mode()
    def _generate(self, kwargs: dict[str, Any], seed: Seed, past: Past | None = None) -> Steps[list[Result]]:
        """Lets `generate()` prepare, and runs the loop in its place."""
        begin = time.perf_counter()
        statistics = Statistics()
        self._reattach()
        kwargs = self._with_stop_strings(kwargs, config.checked(self.model, kwargs))
        streamer, ahead = kwargs.pop("streamer", None), Ahead(self.drafter, self._beside(kwargs), statistics)
        run = partial(self._run, seed=seed, streamer=streamer, statistics=statistics, past=past, ahead=ahead)
        with watched() as cores:
            with ahead.prefill():
                kwargs = self.target.encode_images(kwargs)
            cores.check()
            decoding_method = _as_decoding_method(partial(run, cores=cores))
            results: list[Result] = yield from self.model.generate(**kwargs, custom_generate=decoding_method)
        seconds = statistics.seconds
        seconds["total"] = time.perf_counter() - begin - seconds.pop("paused")
        seconds["host"] = seconds["total"] - seconds["prefill"] - seconds["draft"] - seconds["verify"]
        return results

    def _run(
        self,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        *,
        seed: Seed,
        streamer: Any,
        statistics: Statistics,
        past: Past | None,
        ahead: Ahead,
        cores: Cores,
    ) -> Steps[list[Result]]:
        """The decoding method `generate()` calls: prefill, then the loop."""
        B, L = input_ids.shape
        self._refuse(generation_config, B, L, streamer)
        capacity = generation_config.max_length + self.plan.nodes + 1
        if generation_config.max_length > L + 2:  # neither an answer's first token is drafted nor the last that fits
            ahead.read(lambda: self.target.lay_out(input_ids, model_kwargs, capacity)[0])
        with ahead.prefill():
            before = past.state if past else None
            state, prompt = self.target.prefill(input_ids, model_kwargs, capacity, before, past is not None)
        statistics.num_prefill_rows = B * state.prefilled
        ahead.give(state)
        vocabulary = prompt.logits.shape[-1]
        randomness = generators(seed, B, input_ids.device)
        do_sample = bool(generation_config.do_sample)
        padding = generation_config._pad_token_tensor
        sampler = Sampler(
            state.layout, logits_processor, stopping_criteria, do_sample, vocabulary, randomness, input_ids,
            None if padding is None else int(padding), Outputs.need_logits(generation_config),
        )  # fmt: skip
        outputs = Outputs(input_ids, generation_config)
        if streamer is not None:
            streamer.put(input_ids.cpu())
        parts = (self.target, self.drafter, self.verifier, self.plan, sampler, state, prompt)
        answers: list[list[int]] = [[] for _ in range(B)]
        for step in decode(*parts, label=self.config.label):
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
        if streamer is not None:
            streamer.end()
        if past is not None:
            past.renew(state)
        fields = outputs.fields()
        return [self._result(tokens, sampler.finish[i], i, statistics, fields) for i, tokens in enumerate(answers)]

    def _embedding(self) -> tuple[Any, ...]:
        """What a drafter takes of its target."""
        embedding = self.model.get_input_embeddings()
        return embedding, getattr(getattr(embedding, "weight", None), "shape", None), self.model.device

    def _reattach(self) -> None:
        """Where the model's embedding is another since; UserError where the drafter does not fit any more."""
        if self._attached != self._embedding():
            self.drafter.attach(self.model, self.target.backend.name)
            self._attached = self._embedding()

    def _beside(self, kwargs: dict[str, Any]) -> Beside:
        """What only the drafter sees, taken out of the arguments of a generation."""
        beside, seen = kwargs.pop("beside", None), kwargs.pop("events", None)
        if seen is None:
            return beside
        if beside is not None:
            raise UserError("give events or what stands beside, not both")
        return recordings.work(self.drafter, seen, len(kwargs["input_ids"]))

    def _refuse(self, config: GenerationConfig, batch: int, length: int, streamer: Any) -> None:
        """One clear line for what speculative decoding cannot do, or the model cannot hold."""
        if streamer is not None and batch > 1:
            raise UserError(f"a streamer takes one prompt at a time, got {batch}")
        context = self.target.context_length
        if context is not None and config.max_length > context:
            raise UserError(
                f"{length} prompt tokens and {config.max_length - length} new ones do not fit the model's context of "
                f"{context}; lower max_new_tokens to at most {max(context - length, 0)} or shorten the prompt"
            )

    def _with_stop_strings(self, kwargs: dict[str, Any], config: GenerationConfig) -> dict[str, Any]:
        """Moves stop strings into a stopping criterion with our tokenizer, which `generate()` cannot hand to a loop.

        config: of the generation, merged from all doors.
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
        """The result of `row`. fields: those of `return_dict_in_generate`."""
        text = self.processor.tokenizer.decode(tokens, skip_special_tokens=True) if self.processor else ""
        labels = [None, *statistics.predicted[row]] if row in statistics.predicted else None
        return Result(text, tokens, finish or "", self.drafter.name, statistics, labels, **fields)


def _as_decoding_method(run: Any) -> Any:
    """A callable with the signature that `generate(custom_generate=…)` expects."""

    def decoding_method(
        model: PreTrainedModel,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **model_kwargs: Any,
    ) -> Steps[list[Result]]:
        return run(input_ids, logits_processor, stopping_criteria, generation_config, model_kwargs)

    return decoding_method
