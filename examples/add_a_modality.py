# %% [markdown]
# # Add a modality, end to end
#
# A depth map as a further input: the drafter reads it, the target does not. A new modality, `near`, names the answer
# tokens that the near part of the image decides. All of it is public: one `register` for the modality, one for the
# source of the input, a subclass of the drafter, and a short training loop. The data are made here: the depth of a
# photo is invented as a blurred negative of its brightness.

# %%
from dataclasses import replace

import numpy as np
import torch
from PIL import Image, ImageFilter, ImageOps

from msd import SpeculativeVLM
from msd.core import modality
from msd.drafters import auxiliary
from msd.drafters.algorithms.msd import MSD, DraftObjective, MSDNetwork
from msd.drafters.algorithms.msd.config import shapes_of
from msd.drafters.toolkit.training import all_roots
from msd.errors import UserError
from msd.inputs.prompts import prepare
from msd.labels.gain import image_columns, image_gain, masking_cost
from msd.loading import load_target
from msd.reference import sample_photos
from msd.targets import adapt
from msd.targets.teacher import run_teacher

STEPS, TOKENS, PHOTOS, PROMPT = 60, 32, 6, "Describe the image."

# %% [markdown]
# **1. The modality and the input.** θ = 0.5 is the threshold of the lossy policy `threshold` for the new modality. A
# source says how one input is opened, and how it is shown as pictures, which the target's vision tower then encodes.

# %%
NEAR = modality.register("near", 0.5)


def opened(depth: object) -> np.ndarray:
    """A depth map [h, w], 0 near and 1 far."""
    values = np.asarray(depth, np.float32)
    if values.ndim != 2 or not np.isfinite(values).all():
        raise UserError(f"a depth map is an array [h, w] of finite numbers, got shape {values.shape}")
    return values


def slices(depth: np.ndarray, count: int) -> list[Image.Image]:
    """The map as `count` pictures: what is nearer than 1/count, 2/count, … is bright."""
    shown = [np.clip((i + 1) / count - depth, 0, 1) for i in range(count)]
    return [Image.fromarray(np.uint8(255 * layer / max(layer.max(), 1e-6))).convert("RGB") for layer in shown]


auxiliary.register(
    auxiliary.AuxiliarySource(
        name="depth",
        plural="depth maps",
        types=(np.ndarray,),
        open=opened,
        frames=slices,
        unsupported="reads no depth; train one as in examples/add_a_modality.py",
    )
)


class DepthDrafter(MSD):
    """An `msd` drafter whose further input is a depth map."""

    source = "depth"


# %% [markdown]
# **2. The data.** Photos, their invented depth, and the target's own answers.


# %%
def depth_of(photo: Image.Image) -> np.ndarray:
    """An invented depth map: dark is near."""
    blurred = ImageOps.grayscale(photo).filter(ImageFilter.GaussianBlur(8))
    return np.asarray(blurred, np.float32) / 255


model, processor = load_target("reference")
model.requires_grad_(False)
photos = [Image.open(path).convert("RGB") for path in sample_photos()[:PHOTOS]]
depths = [depth_of(photo) for photo in photos]
plain = SpeculativeVLM(model, processor, drafter="ar")
answers = [plain.generate(photo, PROMPT, max_new_tokens=TOKENS, do_sample=False).tokens for photo in photos]

# %% [markdown]
# **3. Labels.** A token is `near` if masking the near image patches costs more than masking the far ones, and
# `language` if the image matters little to it.


# %%
def labels_of(row: int) -> torch.Tensor:
    """Modality ids [T] of an answer's tokens."""
    inputs = target.encode_images(dict(prepare(processor, [[photos[row]]], [PROMPT])))
    columns = image_columns(target, inputs["input_ids"])[0].nonzero()[:, 0]
    side = int(len(columns) ** 0.5)
    small = np.asarray(Image.fromarray(depths[row]).resize((side, side)))
    near = torch.from_numpy(small < np.median(small)).flatten()
    costs = []
    for chosen in (near, ~near):
        masked = torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
        masked[0, columns[chosen]] = True
        costs.append(masking_cost(target, inputs, [answers[row]], masked)[0])
    gain = image_gain(target, inputs, [answers[row]])[0]
    decided = torch.where(costs[0] > costs[1], NEAR.id, modality.VISION.id)
    return torch.where(gain <= gain.median(), modality.LANGUAGE.id, decided)


target = adapt(model)
labels = [labels_of(row) for row in range(PHOTOS)]
names = [m.name for m in (modality.LANGUAGE, modality.VISION, NEAR)]
counts = [sum(int((each == modality.get(name).id).sum()) for each in labels) for name in names]
print("labels:", dict(zip(names, counts, strict=True)))

# %% [markdown]
# **4. The network** has a subtree shape and a router class for the new modality, and an adaptor for the depth
# tokens. **5. Training** runs the target over its answers (`run_teacher`) and minimises MSD's loss.

# %%
encoded = [auxiliary.picture_tokens(target, processor, slices(depth, auxiliary.FRAMES)) for depth in depths]
groups = ((auxiliary.FRAMES, 3), (len(encoded[0]) - auxiliary.FRAMES, 3))  # temporal and spatial tokens, 3 kept of each
torch.manual_seed(0)
network = MSDNetwork.for_target(
    target.text_config,
    draft_vocabulary=2048,
    modalities=tuple(names),
    shapes=shapes_of(names),
    auxiliary=groups,
)
used = sorted({token for answer in answers for token in answer})
rest = [token for token in range(target.text_config.vocab_size) if token not in set(used)]
network.choose_draft_vocabulary(torch.tensor(sorted(used + rest[: 2048 - len(used)])))
network.begin_from(model)
network.attach(model)

tapped = adapt(model, network.config.taps)
batches = []
for row in range(PHOTOS):
    inputs = prepare(processor, [[photos[row]]], [PROMPT])
    batch = run_teacher(tapped, inputs, [answers[row]])
    log_p = batch.logits.log_softmax(-1)[..., network.ids]
    batches.append((replace(batch, logits=log_p, auxiliary=encoded[row][None]), labels[row][None]))

objective = DraftObjective(network)
optimizer = torch.optim.AdamW(objective.parameters(), lr=1e-3)
for step in range(STEPS):
    batch, kinds = batches[step % PHOTOS]
    loss, parts = objective(batch, kinds, all_roots(batch))
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(objective.parameters(), 0.5)
    optimizer.step()
    if step % 20 == 0 or step == STEPS - 1:
        print(f"step {step}: loss {float(loss.detach()):.3f}")

# %% [markdown]
# **6. Decoding.** `depth=` is now an argument of `generate`. The answer is the target's; the drafts depend on the
# map. These answers were trained on, so τ says nothing about other photos.

# %%
vlm = SpeculativeVLM(model, processor, drafter=DepthDrafter(network.eval(), "depth-drafter"))
for row in range(min(2, PHOTOS)):
    options = {"max_new_tokens": TOKENS, "do_sample": False}
    seen = vlm.generate(photos[row], PROMPT, depth=depths[row], **options)
    blind = vlm.generate(photos[row], PROMPT, **options)
    assert seen.tokens == blind.tokens == answers[row]
    lengths = [f"{each.statistics.mean_acceptance_length:.2f}" for each in (seen, blind)]
    print(f"τ with depth {lengths[0]}, without {lengths[1]}; {seen.statistics.num_draft_tokens} drafted tokens")
