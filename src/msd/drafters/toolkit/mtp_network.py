"""The multi-token-prediction layers of a target, as `msd train` trains them further.

The layers are the library's (`MtpModel`): loaded from the target's checkpoint, or from the folder of a training run.
Training computes all levels of all columns in as many passes as there are levels. In pass d, a column reads the token
in it and the state that pass d-1 had one column before. Of several layers, layer d computes pass d, and reads keys of
pass d only. A single layer computes all passes, and a column of pass d reads the keys that a draft of depth d has in
decoding: those of pass 0 up to the root, and those of its ancestors in the passes between (the training-time test of
EAGLE-3, arXiv 2503.01840, section 3.2; DeepSeek-V3 trains one pass per layer, arXiv 2412.19437, section 2.2).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.modeling_layers import MtpModel

from msd.drafters.toolkit import checkpoint
from msd.drafters.toolkit.chance import Weights
from msd.drafters.toolkit.context import pick
from msd.drafters.toolkit.training import Objective
from msd.errors import UserError
from msd.system.files import tensor_names
from msd.targets import masks
from msd.targets.teacher import TeacherBatch

METHOD = "mtp"
DEPTH = 6  # levels of trees of a single layer
REACH = 4  # levels below a root that training drafts with a single layer
FAULTS = (ValueError, TypeError, AttributeError, KeyError, RuntimeError, OSError)  # of the library, without such layers


@dataclass(frozen=True, kw_only=True)
class MtpConfig(checkpoint.Configuration):
    """The configuration of trained layers.

    layers: their number. hidden, vocabulary: of the target. taps: the index of the target's final state.
    """

    owner: ClassVar[str] = "trained multi-token-prediction layers"
    omitted: ClassVar[tuple[str, ...]] = ()
    method: str
    layers: int
    hidden: int
    vocabulary: int
    taps: tuple[int, ...]

    @property
    def depth(self) -> int:
        """Levels of a tree: as many as layers, or `DEPTH` with a single layer."""
        return DEPTH if self.layers == 1 else self.layers


class MtpNetwork(nn.Module):
    """The layers of one target, with their own weights only: embedding and output layer are the target's.

    stored: the weights in a folder, which `attach` loads. The class variables are those of `DraftNetwork`.
    """

    method: ClassVar[str] = METHOD
    forms: ClassVar[tuple[str, ...]] = ()
    parts: ClassVar[tuple[str, ...]] = ()
    routes: ClassVar[bool] = False
    roots: ClassVar[int] = 24
    prompt_roots: ClassVar[int] = 0
    stages: ClassVar[None] = None
    ending: ClassVar[None] = None
    published_loss: ClassVar[Callable[..., Any]]  # set by the registration
    layers: nn.ModuleList

    def __init__(self, config: MtpConfig, stored: dict[str, Tensor] | None = None, place: Path | str = "") -> None:
        super().__init__()
        self.config, self._stored, self._place = config, stored, place
        self.provenance: dict[str, Any] = {}
        self.calibration: Weights | None = None
        self._whole: list[MtpModel] = []  # with the target's modules; a list keeps them out of the state dict

    @classmethod
    def of(cls, model: PreTrainedModel) -> MtpNetwork:
        """Loads the layers of a target's checkpoint, for training. UserError if it has none."""
        layers, text = load(model), model.config.get_text_config(decoder=True)
        config = MtpConfig(
            method=METHOD, layers=len(layers.layers), hidden=text.hidden_size, vocabulary=text.vocab_size,
            taps=(text.num_hidden_layers,),
        )  # fmt: skip
        return cls(config)._take(layers).float().train()

    @classmethod
    def in_folder(cls, folder: Path | str, dtype: torch.dtype = torch.float32) -> MtpNetwork:
        """Reads the folder of a training run. UserError if it is damaged."""
        text = checkpoint.configuration(Path(folder))
        try:
            config = MtpConfig.from_json(text)
        except UserError as error:
            raise UserError(f"drafter '{folder}': {error}") from error
        tensors = checkpoint.weights(Path(folder))
        network = cls(config, {name: tensor.to(dtype) for name, tensor in tensors.items()}, folder)
        network.provenance = checkpoint.provenance(folder)
        network.calibration = network.provenance.get("calibration")
        return network

    def attach(self, model: PreTrainedModel) -> MtpNetwork:
        """Builds the layers of a folder for their target, in its dtype. UserError if they belong to another one."""
        if self._whole:
            self.whole.tie_with_main_model(model)
            return self
        text, c, stored = model.config.get_text_config(decoder=True), self.config, self._stored
        assert stored is not None
        if (text.hidden_size, text.vocab_size, (text.num_hidden_layers,)) != (c.hidden, c.vocabulary, c.taps):
            raise UserError(
                f"drafter '{self._place}' was trained for a target with {c.vocabulary} tokens, hidden size {c.hidden} "
                f"and {c.taps[0]} layers, not {text.vocab_size}, {text.hidden_size} and {text.num_hidden_layers}"
            )
        try:
            with declared(model):
                layers = MtpModel(model, c.layers)
        except FAULTS as error:
            raise UserError(f"method '{METHOD}': the library has no such layers for this target ({error})") from error
        self._take(layers)
        checkpoint.fill(self, stored, self._place)
        self._stored = None
        self.to(model.device, model.dtype).eval()
        return self

    def _take(self, layers: MtpModel) -> MtpNetwork:
        self._whole, self.layers = [layers], layers.layers
        if layers.use_shared_post_norm:
            self.shared_post_norm = layers.shared_post_norm
        return self

    @property
    def whole(self) -> MtpModel:
        """The layers with the target's embedding and output layer; both exist after `attach`."""
        return self._whole[0]

    @property
    def ids(self) -> Tensor:
        """[V] int64: the tokens that they can draft."""
        return token_ids(self.whole)

    @property
    def reach(self) -> int:
        """Levels below a root that training drafts."""
        return REACH if self.config.layers == 1 else self.config.layers

    def objective(self, settings: Any = None, ends: Sequence[int] = ()) -> Objective:
        """See `DraftNetwork`."""
        return Objective(self)

    def loss(self, batch: TeacherBatch, roots: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """See `DraftNetwork`."""
        return type(self).published_loss(self, batch, roots)

    def states(self, batch: TeacherBatch, roots: Tensor, depth: int) -> Tensor:
        """Computes the states [B, A, depth, H] below the answer tokens `roots` [B, A], by teacher forcing."""
        columns, last = roots + batch.prompt, batch.layout.tokens.shape[1] - 1
        passes = self._passes(batch, depth)
        return torch.stack([pick(states, (columns + d).clamp_max(last)) for d, states in enumerate(passes)], 2)

    def logits(self, states: Tensor, parents: Tensor) -> Tensor:
        """Computes logits [..., V] from states [..., H]."""
        head: Any = self.whole.shared_head
        logits: Tensor = self.whole._project_to_logits(states.to(head.weight.dtype))
        return logits

    def confidence_logits(self, states: Tensor, parents: Tensor) -> Tensor:
        """See `DraftNetwork`; 0, as there are none."""
        return torch.zeros_like(states[..., 0])

    def _passes(self, batch: TeacherBatch, depth: int) -> Iterator[Tensor]:
        """Yields the states [B, C, H] of passes 0 to `depth` - 1 over all C columns."""
        tokens, start, single = batch.layout.tokens, batch.layout.start, self.config.layers == 1
        C, cache, windows = tokens.shape[1], DynamicCache(), masks.attention_windows(self.whole.config)
        above = batch.taps[..., -self.config.hidden :].to(next(self.layers.parameters()).dtype)
        for d in range(depth):
            k = 0 if single else d
            tables = masks.row_tables([first + 1 + k for first in start], C, tokens.device)
            if single:
                tables = _below(tables, d)
            positions = batch.layout.positions[:, :, (torch.arange(C, device=tokens.device) - 1 - k).clamp_min(0)]
            above = run_layer(self.whole, k, tokens, shifted(above), positions, tables, windows, cache)
            yield above


def _below(tables: masks.Tables, d: int) -> masks.Tables:
    """The tables [B, C, (d+1)*C] of pass d of a single layer, from those of whole rows."""
    visible, distance, column = tables
    columns = torch.arange(visible.shape[1], device=visible.device)
    ancestors = [(columns == columns[:, None] - d + j)[None].expand_as(visible) for j in range(1, d + 1)]
    until_root = visible & (columns <= columns[:, None] - d)
    return torch.cat([until_root, *ancestors], -1), distance.repeat(1, 1, d + 1), column


def run_layer(
    network: MtpModel, k: int, tokens: Tensor, above: Tensor, positions: Tensor, tables: masks.Tables,
    windows: masks.Windows, cache: Any,
) -> Tensor:  # fmt: skip
    """Runs layer k on tokens [R, W] with the states above them [R, W, H] at positions [A, R, W]: [R, W, H]."""
    kinds = getattr(network.config, "layer_types", None)
    kind = kinds[k] if kinds else None
    found = masks.masks(tables, windows, above.dtype)
    embedded, rope = network.embed_tokens(tokens).to(above.dtype), None
    place = positions if len(positions) > 1 else positions[0]
    if network.rotary_emb is not None:
        options = {"layer_type": kind} if network.has_per_layer_rope else {}
        rope = network.rotary_emb(embedded, position_ids=place, **options)
    states: Tensor = network.layers[k](
        embedded, above, position_embeddings=rope, position_ids=positions[0], past_key_values=cache,
        attention_mask=found if isinstance(found, Tensor) else found[kind],
    )  # fmt: skip
    return network.shared_post_norm(states) if network.use_shared_post_norm else states


def shifted(states: Tensor) -> Tensor:
    """States [B, L, H] of the column before each column; zero for the first."""
    return torch.cat([torch.zeros_like(states[:, :1]), states[:, :-1]], 1)


def token_ids(network: MtpModel) -> Tensor:
    """Returns the tokens [V] int64 that the layers can draft: all of the target's."""
    size = getattr(network.config, "unpadded_vocab_size", None) or network.shared_head.weight.shape[0]
    return torch.arange(size, device=network.shared_head.weight.device)


def load(model: PreTrainedModel) -> MtpModel:
    """Loads the layers of a target from its checkpoint. UserError if it has none, or the library cannot load them."""
    try:
        with declared(model):
            return MtpModel.from_pretrained(model, device_map={"": model.device})
    except FAULTS as error:
        raise UserError(
            f"method '{METHOD}': target '{model.config.name_or_path}' has no multi-token-prediction layers that the "
            f"library can load ({error}); choose another method"
        ) from error


def present(model: PreTrainedModel) -> bool:
    """Whether the target's checkpoint has such layers, and they can be found without loading anything."""
    try:
        with declared(model):
            wanted = MtpModel.get_mtp_weights_regex(model)
            layers = getattr(model.config.get_text_config(decoder=True), "num_mtp_layers", None)
            return bool(layers) and any(wanted.search(name) for name in tensor_names(model.config.name_or_path))
    except FAULTS:
        return False


@contextmanager
def declared(model: PreTrainedModel) -> Iterator[None]:
    """Inside, the config of a checkpoint with tensors `mtp.…` says so, as the library expects (Qwen3.5's does not)."""
    config: Any = model.config.get_text_config(decoder=True)
    added = {}
    if not hasattr(config, "num_mtp_layers") and hasattr(config, "mtp_num_hidden_layers"):
        count = config.mtp_num_hidden_layers
        added = {"num_mtp_layers": count, "mtp_layer_types": [masks.FULL] * count}
    for name, value in added.items():
        setattr(config, name, value)
    try:
        yield
    finally:
        for name in added:
            delattr(config, name)
