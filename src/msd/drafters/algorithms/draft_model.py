"""`draft-model`: a smaller vision-language or language model drafts, with a cache and a prompt of its own.

It sees the images of the prompt (as in Spec-LLaVA and MASSV), a caption of each, neither (Gagrani et al., arXiv
2404.08856), or several of these at once (as in TABED). Its own processor prepares its prompt from the messages of the
request. Where only tensors were given, a model of the target's architecture reads them as they are, and any model reads
the text without images. Captions are written once per image: by the draft model if it sees images, else by the target.
"""

from __future__ import annotations

import hashlib
import warnings
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from msd.core.layout import Layout
from msd.core.modality import LANGUAGE
from msd.core.sampling import Sampler
from msd.core.tree import DraftTree, Scores
from msd.drafters.toolkit.chained import drafts
from msd.drafters.toolkit.ensemble import Ensemble
from msd.drafters.toolkit.growth import Shape
from msd.drafters.toolkit.level_cost import LevelCost
from msd.drafters.toolkit.observed import ObservedDrafter
from msd.drafters.toolkit.second_model import SecondModel, room
from msd.drafters.toolkit.vocabulary import Pieces, VocabularyMap
from msd.errors import UserError, named
from msd.inputs import prompts
from msd.inputs.prompts import Request
from msd.planning.plan import Budget
from msd.targets import adapt
from msd.targets import registry as targets
from msd.targets.base import Target
from msd.targets.state import State

METHOD = "draft-model"
SEES = ("image", "caption", "nothing")
CAPTION = "Describe the image in one sentence."
CAPTION_TOKENS = 32
SHARED = 0.5  # least share of the smaller vocabulary that both models have
TREE = Shape(width=3, depth=6)


class DraftModel(ObservedDrafter):
    """Drafts with `model`; its candidates are deterministic.

    processor: the model's own (a `TextProcessor` for a language model); without one, the token ids of both models are
    taken to be the same. sees: one of `SEES`, or several with commas, whose drafts are mixed (`toolkit/ensemble.py`);
    by default the images if the model takes any, else nothing. label: its name in messages.
    """

    name = METHOD

    def __init__(
        self, model: PreTrainedModel, processor: Any = None, sees: str | None = None, label: str = METHOD
    ) -> None:
        takes = model.config.model_type in targets.families()
        self.model, self.processor, self.label, self.cost = model.eval(), processor, label, LevelCost()
        self.sees = views(sees or ("image" if takes else "nothing"))
        if "image" in self.sees and not takes:
            raise UserError(f"draft model '{label}' takes no images; let it see a caption or nothing (--draft-sees)")
        self._takes_images = takes
        self._theirs: PreTrainedModel | None = None
        self._map: VocabularyMap | None = None  # of the two tokenizers
        self._captions: dict[str, str] = {}

    def translate(self, tokenizer: Any) -> None:
        """See `Drafter`."""
        if self.processor is not None:
            self._map = shared_pieces(self.processor.tokenizer, tokenizer, self.label)

    def attach(self, model: PreTrainedModel, backend: str = "plain") -> None:
        """Moves to the target's device and sizes the map; warns if the draft model is larger than the target."""
        own, theirs = (m.get_input_embeddings().weight.shape[0] for m in (self.model, model))
        mapping = self._map or VocabularyMap.identity(min(own, theirs))
        self.mapping = mapping.sized(own, theirs).to(model.device)
        self.model.to(model.device)
        requested = "plain" if backend == "plain" else "measure"
        self.own = adapt(self.model, backend=requested) if self._takes_images else text_target(self.model, requested)
        self._theirs = model
        sizes = [sum(p.numel() for p in m.parameters()) for m in (self.model, model)]
        if sizes[0] > sizes[1]:
            warnings.warn(
                f"draft model '{self.label}' has {sizes[0]:,} parameters, more than the target's {sizes[1]:,}: "
                "it costs more than it can save",
                stacklevel=2,
            )

    def twin(self, model: PreTrainedModel) -> DraftModel:
        """Returns a drafter with the model itself as its draft model, which sees what it sees."""
        seen = dict.fromkeys("nothing" if view == "caption" else view for view in self.sees)
        return DraftModel(model, None, ",".join(seen), self.label)

    def fingerprint(self) -> str:
        """See `ObservedDrafter`."""
        return f"{targets.fingerprint(self.model)} sees {','.join(self.sees)}"

    @property
    def ids(self) -> Tensor:
        """[n] int64: the target's ids of the tokens that can be drafted."""
        return self.mapping.ids

    def begin(self, state: State, scores: Scores) -> None:
        """Stores the number of columns of the prompt; the first draft reads it."""
        self.cost.begin()
        state.memory = state.layout.end[0] - 1

    def propose(self, state: State, budget: Budget, sampler: Sampler) -> DraftTree:
        """Drafts the most probable nodes of one tree, level by level; nothing where its context is too short."""
        memory = self._memory(state) if drafts(budget) else None
        if memory is None:
            return DraftTree.root_only(state.layout.newest())
        return memory.propose(state.layout, state.cache.rows, TREE, self, budget, sampler, self.cost)

    def _memory(self, state: State) -> SecondModel | Ensemble | None:
        """The memory of the state; the first time, it reads the prompts. None where they are too long for it."""
        if isinstance(state.memory, int):
            read = [self._read(state, state.memory, view) for view in self.sees]
            members = [member for member in read if member is not None]
            state.memory = Ensemble(members) if len(members) > 1 else members[0] if members else None
        memory: SecondModel | Ensemble | None = state.memory
        return memory

    @property
    def joinable(self) -> bool:
        """See `Drafter`; a mixture is not, because the views that fit the model's context differ between requests."""
        return len(self.sees) == 1

    def select(self, state: State, rows: list[int]) -> None:
        """See `Drafter`."""
        if isinstance(memory := self._memory(state), SecondModel):
            memory.select(rows)

    def join(self, state: State, other: State) -> None:
        """See `Drafter`; reads the prompts of both. Rows whose prompt is too long are not drafted for."""
        mine, theirs = self._memory(state), self._memory(other)
        if not self.joinable:
            super().join(state, other)
        elif isinstance(mine, SecondModel) and isinstance(theirs, SecondModel):
            mine.join(theirs)
        elif isinstance(mine, SecondModel):
            mine.add_rows(behind=other.layout.batch)
        elif isinstance(theirs, SecondModel):
            theirs.add_rows(before=state.layout.batch)
            state.memory = theirs

    def _read(self, state: State, columns: int, view: str) -> SecondModel | None:
        """Reads the prompt with one view of the images; None if prompt and answer do not fit the model's context."""
        own, device, B = self.own, self.model.device, state.layout.batch
        with named(f"draft model '{self.label}'"):
            inputs = self._prompt(state, columns, view)
        inputs = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in inputs.items()}
        inputs = own.encode_images(inputs)
        ids = inputs.pop("input_ids")
        if len(ids) < B:  # several answers to each prompt
            ids, inputs = self.model._expand_inputs_for_generation(B // len(ids), False, ids, **inputs)
        capacity = ids.shape[1] + room(state.layout, columns, TREE)
        if own.context_length is not None and capacity > own.context_length:
            return None
        prefilled, _ = own.prefill(ids, inputs, capacity)
        return SecondModel(own, self.mapping, prefilled, [columns] * B)

    def _prompt(self, state: State, columns: int, view: str) -> dict[str, Any]:
        """Returns the draft model's prompts as its processor prepares them, or from the target's tensors."""
        request = state.request
        if self.processor is not None and request is not None:
            own = replace(request, processor=self.processor)
            if view == "image":
                return own.inputs()
            return own.described(self._described(request) if view == "caption" else None).inputs()
        if view == "caption":
            raise UserError("a caption needs images and messages, and both processors; give images and a prompt")
        if view == "nothing":
            return self._text(state.layout, columns)
        assert self._theirs is not None
        kinds = [m.config.model_type for m in (self.model, self._theirs)]
        if kinds[0] != kinds[1]:
            raise UserError(
                f"tensors of a '{kinds[1]}' processor are not those of a '{kinds[0]}' model; give images and a prompt"
            )
        return {**state.inputs, "input_ids": self.mapping.read(state.inputs["input_ids"].to(self.model.device))}

    def _text(self, layout: Layout, columns: int) -> dict[str, Tensor]:
        """Returns the text of the first `columns` columns without images, as tokens of the draft model."""
        rows = []
        for row, start in enumerate(layout.start):
            text = layout.modality[row, start:columns] == LANGUAGE.id
            rows.append(self.mapping.read(layout.tokens[row, start:columns][text]))
        ids = pad_sequence([tokens.flip(0) for tokens in rows], batch_first=True).flip(1)
        length = torch.tensor([len(tokens) for tokens in rows], device=ids.device)
        column = torch.arange(ids.shape[1], device=ids.device)
        return {"input_ids": ids, "attention_mask": (column >= ids.shape[1] - length[:, None]).long()}

    def _described(self, request: Request) -> list[list[str]]:
        """Returns a caption of each image of each prompt. UserError for videos and sounds."""
        if any(prompts.kind(source) != "image" for group in request.media for source in group):
            raise UserError("only images get captions; let the draft model see 'nothing' of videos and sounds")
        return [[self._caption(request, image) for image in group] for group in request.media]

    def _caption(self, request: Request, image: Image.Image) -> str:
        """Returns one sentence about an image, greedily decoded the first time that it appears."""
        key = hashlib.sha256(repr(image.size).encode() + np.asarray(image.convert("RGB")).tobytes()).hexdigest()
        if key not in self._captions:
            model, processor = self.model, self.processor
            if not self._takes_images:
                assert self._theirs is not None
                model, processor = self._theirs, request.processor
            inputs = prompts.prepare(processor, [[image]], [CAPTION])
            inputs = {k: v.to(model.device) if isinstance(v, Tensor) else v for k, v in inputs.items()}
            tokens = model.generate(**inputs, do_sample=False, max_new_tokens=CAPTION_TOKENS)
            text = processor.tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            self._captions[key] = text.strip()
        return self._captions[key]


def views(sees: str) -> tuple[str, ...]:
    """Parses what a draft model sees, such as "image,nothing". UserError for an unknown or a repeated part."""
    parts = tuple(part.strip() for part in sees.split(","))
    for part in parts:
        if part not in SEES:
            raise UserError(f"draft_sees '{part}' is unknown; choose one of {', '.join(SEES)}, or several with commas")
    if len(set(parts)) < len(parts):
        raise UserError(f"draft_sees '{sees}' names one view twice; name each once")
    return parts


def text_target(model: PreTrainedModel, backend: str) -> Target:
    """Returns the adapter of a language model, which no family of targets lists."""
    return Target(model, backend=backend, pictures=())


def shared_pieces(own: Any, theirs: Any, label: str) -> VocabularyMap:
    """Returns the map between the vocabularies of two tokenizers; UserError if they share less than `SHARED`."""
    drafter, target = Pieces.of(own), Pieces.of(theirs)
    mapping = VocabularyMap.between(drafter, target)
    smaller = min(sum(name is not None for name in table.names) for table in (drafter, target))
    if len(mapping.pairs) < SHARED * smaller:
        raise UserError(
            f"draft model '{label}' shares only {len(mapping.pairs):,} of {smaller:,} tokens with the target; choose "
            "one with the target's tokenizer, or most of it"
        )
    return mapping
