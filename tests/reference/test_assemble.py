"""The assembled checkpoint equals its parts applied by hand: language model, adapters as added terms, projector."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from msd.reference.assemble import IMAGE_TOKEN, SPARE_TOKEN, build_model, build_processor
from msd.reference.encoder import EfficientNetLite, EfficientNetLiteConfig

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<spare>", SPARE_TOKEN]
IMAGE_ID = SPECIAL.index(SPARE_TOKEN)
VISION = EfficientNetLiteConfig(
    image_size=64, stem_size=8, hidden_size=24, stages=[(1, 3, 1, 1, 8)] + [(1, 3, 2, 2, 8)] * 4
)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, after the special tokens."""
    vocabulary = {token: i for i, token in enumerate(SPECIAL + sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    ends = {"bos_token": SPECIAL[1], "eos_token": SPECIAL[2], "pad_token": SPECIAL[2], "unk_token": SPECIAL[0]}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **ends)


def tiny_language_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(SPECIAL) + 256,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    return LlamaForCausalLM(config).eval()


def trained_parts() -> dict[str, Tensor]:
    """Returns random trained parts, with adapters of different ranks on different matrices."""
    generator = torch.Generator().manual_seed(1)
    shapes = {
        "tower.norm.weight": (24,),
        "tower.norm.bias": (24,),
        "tower.pos": (4, 24),
        "tower.colour": (24, 48),
        "linear_1.weight": (32, 24),
        "linear_1.bias": (32,),
        "linear_2.weight": (32, 32),
        "linear_2.bias": (32,),
        "lm.model.layers.0.self_attn.q_proj.A": (3, 32),
        "lm.model.layers.0.self_attn.q_proj.B": (32, 3),
        "lm.model.layers.1.self_attn.v_proj.A": (4, 32),
        "lm.model.layers.1.self_attn.v_proj.B": (16, 4),
        "lm.model.layers.1.mlp.down_proj.A": (5, 48),
        "lm.model.layers.1.mlp.down_proj.B": (32, 5),
    }
    return {name: 0.3 * torch.randn(shape, generator=generator).half() for name, shape in shapes.items()}


def encoder_weights() -> dict[str, Tensor]:
    state = EfficientNetLite(VISION).state_dict()
    return {name: weight for name, weight in state.items() if not name.startswith(("norm.", "position"))}


def colours_by_hand(pixels: Tensor) -> Tensor:
    """[B, 3, 64, 64] -> [B, 4, 48]: mean colours of 8x8 pixels, 16 of them in each cell of 32x32."""
    cells = [pixels[..., y : y + 32, x : x + 32] for y in (0, 32) for x in (0, 32)]
    return torch.stack([F.avg_pool2d(cell, 8).flatten(1) for cell in cells], 1)


def logits_by_hand(trained: dict[str, Tensor], encoder: dict[str, Tensor], pixels: Tensor, ids: Tensor) -> Tensor:
    """Returns logits [L, V] of the published language model, with adapters added to the outputs of its linears."""
    lm, values = tiny_language_model(), {name: value.float() for name, value in trained.items()}
    for name in (n.removesuffix(".A") for n in values if n.endswith(".A")):
        linear = lm.get_submodule(name.removeprefix("lm."))
        A, B = values[f"{name}.A"], values[f"{name}.B"]

        def add(module: nn.Module, inputs: tuple[Tensor], out: Tensor, A: Tensor = A, B: Tensor = B) -> Tensor:
            return out + 2 * F.linear(F.linear(inputs[0], A), B)

        linear.register_forward_hook(add)
    tower = EfficientNetLite(VISION)
    tower.load_state_dict(encoder, strict=False)
    x = F.layer_norm(tower.features(pixels), (24,), values["tower.norm.weight"], values["tower.norm.bias"])
    x = F.gelu(
        F.linear(
            x + values["tower.pos"] + colours_by_hand(pixels) @ values["tower.colour"].T,
            values["linear_1.weight"],
            values["linear_1.bias"],
        )
    )
    x = F.linear(x, values["linear_2.weight"], values["linear_2.bias"])  # [1, 4, 32]
    embedded = lm.get_input_embeddings()(ids)  # [1, L, 32]
    start = int((ids[0] == IMAGE_ID).nonzero()[0])
    embedded = torch.cat([embedded[:, :start], x, embedded[:, start + 4 :]], 1)
    return lm(inputs_embeds=embedded).logits[0]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    """A folder as `assemble` writes it, from tiny parts, and the encoder's weights."""
    folder, encoder = tmp_path_factory.mktemp("checkpoint"), encoder_weights()
    build_model(tiny_language_model(), VISION, encoder, trained_parts(), IMAGE_ID).save_pretrained(folder)
    build_processor(tiny_tokenizer(), VISION).save_pretrained(folder)
    return folder, encoder


@pytest.fixture(scope="module")
def processor(checkpoint: tuple[Path, dict[str, Tensor]]) -> LlavaProcessor:
    return AutoProcessor.from_pretrained(checkpoint[0])


def photo() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 80, 3), dtype=np.uint8))


def user(text: str, images: int = 0) -> dict[str, object]:
    return {"role": "user", "content": [{"type": "image"}] * images + [{"type": "text", "text": text}]}


@torch.no_grad()
def test_logits_equal_those_of_the_parts(checkpoint: tuple[Path, dict[str, Tensor]], processor: LlavaProcessor) -> None:
    folder, encoder = checkpoint
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    text = processor.apply_chat_template([user("Hello?", 1)], add_generation_prompt=True)
    inputs = processor(images=[photo()], text=[text], return_tensors="pt")
    wanted = logits_by_hand(trained_parts(), encoder, inputs["pixel_values"], inputs["input_ids"])
    assert wanted.std() > 0.01
    torch.testing.assert_close(model(**inputs).logits[0], wanted, atol=1e-5, rtol=1e-4)
    assert model.generation_config.eos_token_id == model.generation_config.pad_token_id == 2


def test_pixels_are_resized_without_cropping_and_scaled(processor: LlavaProcessor) -> None:
    wanted = (np.asarray(photo().resize((64, 64), Image.Resampling.BICUBIC), np.float32) - 127) / 128
    pixels = processor.image_processor(photo(), return_tensors="pt")["pixel_values"][0]
    np.testing.assert_allclose(pixels.permute(1, 2, 0).numpy(), wanted, atol=1e-5)


@pytest.mark.parametrize("size", [(1, 1), (3, 50), (50, 3), (3, 3), (1, 200)])
def test_odd_sizes_keep_their_channels(processor: LlavaProcessor, size: tuple[int, int]) -> None:
    image = Image.new("RGB", size, (255, 127, 0))
    pixels = processor.image_processor(image, return_tensors="pt")["pixel_values"][0]
    np.testing.assert_allclose(pixels.mean((1, 2)).numpy(), [1, 0, -127 / 128], atol=1e-4)


def test_the_placeholder_takes_a_spare_id(processor: LlavaProcessor) -> None:
    tokenizer = processor.tokenizer
    assert len(tokenizer) == len(tiny_tokenizer())
    assert tokenizer.encode(IMAGE_TOKEN) == [IMAGE_ID]
    text = "Two  spaces, é, 你好 and 12345."
    assert tokenizer.encode(text) == tiny_tokenizer().encode(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert SPARE_TOKEN not in tokenizer.get_vocab()
    with pytest.raises(ValueError, match=SPARE_TOKEN):
        build_processor(tokenizer, VISION)


def test_every_image_becomes_its_cells(processor: LlavaProcessor) -> None:
    texts = [processor.apply_chat_template([user("a", images)], add_generation_prompt=True) for images in (1, 2)]
    inputs = processor(images=[photo()] * 3, text=texts, padding=True, return_tensors="pt")
    assert (inputs["input_ids"] == IMAGE_ID).sum(1).tolist() == [4, 8]
    assert inputs["pixel_values"].shape == (3, 3, 64, 64)
    assert inputs["attention_mask"][0, 0] == 0  # padded on the left
    assert inputs["input_ids"][0, 0] == 2


def test_chat_format(processor: LlavaProcessor) -> None:
    render = processor.apply_chat_template
    start, end = "<|im_start|>", "<|im_end|>\n"
    assert render([user("Q", 1)], add_generation_prompt=True) == f"{start}user\n<image>\nQ{end}{start}assistant\n"
    assert render([{"role": "user", "content": "Q"}]) == f"{start}user\nQ{end}"
    assert render([user("Q", 2)]) == f"{start}user\n<image>\n<image>\nQ{end}"
    chat = [
        {"role": "system", "content": "Be brief."},
        user("Q", 1),
        {"role": "assistant", "content": [{"type": "text", "text": "A"}]},
        {"role": "user", "content": [{"type": "text", "text": "More"}, {"type": "text", "text": "please"}]},
    ]
    assert render(chat, add_generation_prompt=True) == (
        f"{start}system\nBe brief.{end}{start}user\n<image>\nQ{end}{start}assistant\nA{end}"
        f"{start}user\nMore\nplease{end}{start}assistant\n"
    )


def test_other_media_are_refused_by_the_template(processor: LlavaProcessor) -> None:
    with pytest.raises(Exception, match="not video"):
        processor.apply_chat_template([{"role": "user", "content": [{"type": "video"}]}])


@pytest.mark.parametrize("name", ["tower.pos", "tower.colour", "linear_2.bias", "lm.model.layers.0.self_attn.q_proj.B"])
def test_a_missing_tensor_is_an_error(name: str) -> None:
    trained = {key: value for key, value in trained_parts().items() if key != name}
    with pytest.raises((KeyError, RuntimeError), match=name.split(".")[-1]):
        build_model(tiny_language_model(), VISION, encoder_weights(), trained, IMAGE_ID)


def test_a_misshapen_tensor_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="position"):
        build_model(
            tiny_language_model(),
            VISION,
            encoder_weights(),
            trained_parts() | {"tower.pos": torch.zeros(5, 24)},
            IMAGE_ID,
        )
