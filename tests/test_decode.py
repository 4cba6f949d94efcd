"""The end of an answer, streamers, criteria and refused options: the same as in `transformers` `generate()`."""

from __future__ import annotations

import string
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import BPE
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerFast, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

import tiny
from msd.config import SpeculativeConfig
from msd.errors import UserError
from msd.model import SpeculativeVLM
from msd.result import Result
from random_drafter import RandomDrafter

NEW = 20
INPUTS = tiny.llava_inputs(images=1)
LENGTH = INPUTS["input_ids"].shape[1]
SAMPLED: dict[str, Any] = {"do_sample": True, "temperature": 0.9, "top_k": 0}


@cache
def model() -> Any:
    return tiny.llava(sharpness=10.0)


LETTERS = string.ascii_letters + string.digits + " ."


@cache
def processor() -> Any:
    """A tokenizer whose token i is the letter `LETTERS[i]`."""
    letters = Tokenizer(BPE({letter: i for i, letter in enumerate(LETTERS)}, merges=[]))
    letters.decoder = Fuse()
    return SimpleNamespace(tokenizer=PreTrainedTokenizerFast(tokenizer_object=letters))


def expected(seed: int = 0, **kwargs: Any) -> list[int]:
    target = model()
    torch.manual_seed(seed)
    return target.generate(**INPUTS, **kwargs)[0, LENGTH:].tolist()


def spelled(*indices: int) -> str:
    """Some tokens of the long answer, as letters."""
    return "".join(LETTERS[long_answer()[i]] for i in indices)


@cache
def long_answer(seed: int = 0, /) -> tuple[int, ...]:
    """A sampled answer without an early end. Drafts follow it, so they continue past every end."""
    return tuple(expected(seed, **SAMPLED, max_new_tokens=NEW, eos_token_id=None))


def engine(seed: int = 0, method: str | None = None) -> SpeculativeVLM:
    """An engine whose drafts are often correct, or one with a named method."""
    drafter = method or RandomDrafter(seed, 64, [long_answer(seed)])
    return SpeculativeVLM(model(), processor(), SpeculativeConfig(nodes=12), drafter)


def check(seed: int = 0, needs_accepted: bool = True, **kwargs: Any) -> Result:
    """Runs `kwargs` with each kind of drafter, compares with `transformers`, and returns the last result."""
    wanted = expected(seed, **({} if "stop_strings" not in kwargs else {"tokenizer": processor().tokenizer}), **kwargs)
    accepted = 0
    result = None
    for number in range(4):
        vlm = engine(seed, [None, "ar", "prompt-lookup", None][number])
        result = vlm.generate(**INPUTS, seed=seed, **kwargs)
        assert isinstance(result, Result)
        assert result.tokens == wanted
        accepted += result.statistics.num_accepted_draft_tokens
    assert accepted > 0 or not needs_accepted
    assert result is not None
    return result


@pytest.mark.parametrize("index", [0, 1, 4, 7, 11])
def test_nothing_follows_eos_even_when_it_was_drafted(index: int) -> None:
    eos = long_answer()[index]
    result = check(**SAMPLED, max_new_tokens=NEW, eos_token_id=eos, needs_accepted=long_answer().index(eos) > 1)
    assert result.tokens == list(long_answer()[: long_answer().index(eos) + 1])
    assert result.finish == "eos"


def test_any_of_several_eos_ids_ends_the_answer() -> None:
    answer = long_answer()
    result = check(**SAMPLED, max_new_tokens=NEW, eos_token_id=[answer[12], answer[6], 63])
    assert result.tokens[-1] in (answer[12], answer[6])
    assert result.finish == "eos"


@pytest.mark.parametrize("new", [1, 2, 3, 7, 20])
def test_max_new_tokens(new: int) -> None:
    result = check(**SAMPLED, max_new_tokens=new, eos_token_id=None, needs_accepted=new > 3)
    assert (len(result.tokens), result.finish) == (new, "length")


def test_max_length_counts_the_prompt() -> None:
    assert len(check(**SAMPLED, max_length=LENGTH + 9, eos_token_id=None).tokens) == 9


def test_eos_on_the_last_allowed_token_is_eos() -> None:
    eos = long_answer()[7]
    last = long_answer().index(eos) + 1
    assert check(**SAMPLED, max_new_tokens=last, eos_token_id=eos).finish == "eos"


@pytest.mark.parametrize("stops", [[(3, 4)], [(6,)], [(11,), (9,)], [(7, 8, 9)]])
def test_stop_strings(stops: list[tuple[int, ...]]) -> None:
    strings = [spelled(*indices) for indices in stops]
    given = strings[0] if len(strings) == 1 else strings
    result = check(**SAMPLED, max_new_tokens=NEW, eos_token_id=None, stop_strings=given)
    assert result.finish == "criteria"
    assert result.text.endswith(tuple(strings))
    assert len(result.tokens) < NEW


def test_stop_strings_of_the_generation_config_argument() -> None:
    config = GenerationConfig(**SAMPLED, max_new_tokens=NEW, stop_strings=[spelled(6)], pad_token_id=0)
    wanted = expected(generation_config=config, tokenizer=processor().tokenizer)
    result = engine().generate(**INPUTS, seed=0, generation_config=config)
    assert isinstance(result, Result)
    assert result.tokens == wanted
    assert config.stop_strings == [spelled(6)], "the user's config stays as it was"


def test_default_stop_strings_hold_for_every_engine_of_the_model() -> None:
    own = tiny.llava(sharpness=10.0)
    own.generation_config.stop_strings = [spelled(6)]
    kwargs = {**SAMPLED, "max_new_tokens": NEW, "eos_token_id": None}
    torch.manual_seed(0)
    wanted = own.generate(**INPUTS, **kwargs, tokenizer=processor().tokenizer)[0, LENGTH:].tolist()
    assert len(wanted) < NEW
    first = SpeculativeVLM(own, processor(), drafter="prompt-lookup")
    for vlm in (first, first.with_method("ar"), SpeculativeVLM(own, processor(), drafter="ar")):
        result = vlm.generate(**INPUTS, seed=0, **kwargs)
        assert isinstance(result, Result)
        assert result.tokens == wanted
    assert own.generation_config.stop_strings, "the user's model stays as it was"


def test_stop_strings_without_a_tokenizer_are_refused() -> None:
    with pytest.raises(UserError, match="tokenizer"):
        SpeculativeVLM(model(), None).generate(**INPUTS, max_new_tokens=NEW, stop_strings="a")


def test_max_time_ends_after_the_current_token() -> None:
    result = check(max_time=0.0, max_new_tokens=NEW, needs_accepted=False)
    assert (len(result.tokens), result.finish) == (1, "criteria")


class StopsAfter(StoppingCriteria):
    """Stops on a token, and records the length at each call."""

    def __init__(self, token: int) -> None:
        self.token = token
        self.lengths: list[int] = []

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self.lengths.append(input_ids.shape[1])
        return input_ids[:, -1] == self.token


def test_stopping_criteria_are_called_after_each_token() -> None:
    token = long_answer()[8]
    theirs, ours = StopsAfter(token), StopsAfter(token)
    kwargs = {**SAMPLED, "max_new_tokens": NEW, "eos_token_id": None}
    wanted = expected(**kwargs, stopping_criteria=StoppingCriteriaList([theirs]))
    result = engine().generate(**INPUTS, seed=0, **kwargs, stopping_criteria=StoppingCriteriaList([ours]))
    assert isinstance(result, Result)
    assert result.tokens == wanted
    assert result.statistics.num_accepted_draft_tokens > 0
    assert ours.lengths == theirs.lengths
    assert result.finish == "criteria"


class Recorder(BaseStreamer):
    """Records all its calls."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def put(self, value: Tensor) -> None:
        self.seen.append(value.tolist())

    def end(self) -> None:
        self.seen.append("end")


@pytest.mark.parametrize("method", [None, "ar"])
def test_a_streamer_gets_the_same_calls_as_in_generate(method: str | None) -> None:
    theirs, ours = Recorder(), Recorder()
    kwargs = {**SAMPLED, "max_new_tokens": NEW, "eos_token_id": long_answer()[13]}
    expected(**kwargs, streamer=theirs)
    engine(method=method).generate(**INPUTS, seed=0, **kwargs, streamer=ours)
    assert ours.seen == theirs.seen
    assert ours.seen[0] == INPUTS["input_ids"].tolist()


def test_a_stream_yields_the_text_of_the_result_and_can_be_closed() -> None:
    kwargs = {**SAMPLED, "max_new_tokens": NEW, "eos_token_id": None}
    stream = engine().stream(**INPUTS, seed=0, **kwargs)
    text = "".join(stream)
    assert stream.result.tokens == list(long_answer())
    assert text == stream.result.text
    stopped = engine().stream(**INPUTS, seed=0, **{**kwargs, "max_new_tokens": 400})
    next(iter(stopped))
    stopped.close()
    assert stopped.result.finish == "criteria"
    assert len(stopped.result.tokens) < 400


def test_stream_raises_what_the_generation_raised() -> None:
    stream = engine().stream(**INPUTS, num_beams=2)
    with pytest.raises(UserError, match="num_beams"):
        list(stream)


def test_seeds() -> None:
    kwargs = {**SAMPLED, "max_new_tokens": NEW, "eos_token_id": None}
    one, again, other = (engine(s).generate(**INPUTS, seed=s, **kwargs) for s in (1, 1, 2))
    assert isinstance(one, Result) and isinstance(again, Result) and isinstance(other, Result)
    assert one.tokens == again.tokens == list(long_answer(1))
    assert other.tokens == list(long_answer(2)) != one.tokens


@pytest.mark.parametrize(
    "kwargs, said",
    [
        ({"num_beams": 2}, "num_beams=2"),
        ({"assistant_model": object()}, "assistant_model"),
        ({"prompt_lookup_num_tokens": 3}, "prompt_lookup_num_tokens"),
        ({"custom_generate": "some/repository"}, "custom_generate"),
        ({"return_dict_in_generate": True, "output_attentions": True}, "output_attentions"),
        ({"return_dict_in_generate": True, "output_hidden_states": True}, "output_hidden_states"),
        ({"max_new_tokens": 10_000}, f"context of 512; lower max_new_tokens to at most {512 - LENGTH}"),
        ({"seed": [1, 2]}, "2 seeds for 1"),
        ({"prompt": "hello"}, "not both"),
    ],
)
@pytest.mark.filterwarnings("ignore:Using the model-agnostic default")
def test_unsupported_options_raise_user_errors(kwargs: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as caught:
        engine().generate(**INPUTS, **kwargs)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_refusal_leaves_the_engine_usable() -> None:
    vlm = engine()
    with pytest.raises(UserError):
        vlm.generate(**INPUTS, num_beams=2)
    result = vlm.generate(**INPUTS, seed=0, **SAMPLED, max_new_tokens=NEW, eos_token_id=None)
    assert isinstance(result, Result)
    assert result.tokens == list(long_answer())


def test_the_whole_context_can_be_used() -> None:
    result = SpeculativeVLM(model(), None).generate(**INPUTS, max_length=512, eos_token_id=None)
    assert isinstance(result, Result)
    assert len(result.tokens) == 512 - LENGTH


def test_neither_prompt_nor_inputs_is_refused() -> None:
    with pytest.raises(UserError, match="give a prompt or messages"):
        engine().generate()


def test_an_unknown_method_names_the_known_ones() -> None:
    with pytest.raises(UserError, match="prompt-lookup"):
        SpeculativeVLM(model(), None, drafter="psychic")
