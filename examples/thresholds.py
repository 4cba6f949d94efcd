# %% [markdown]
# # Learn thresholds
#
# Two kinds: *label thresholds* divide the tokens of answers into language, fusion and vision by their image gain, and
# the thresholds *θ* of the lossy policy `budget` say which drafts it accepts. Both are learned from the target,
# without labels by people.

# %%
from msd import SpeculativeConfig, SpeculativeVLM, verify
from msd.core import modality
from msd.inputs.prompts import prepare
from msd.labels.gain import image_gain
from msd.labels.label_thresholds import ModalityThresholds
from msd.reference import sample_photos
from msd.targets.registry import fingerprint
from msd.train.held_out import record, solve

TOKENS, PHOTOS, PROMPT = 32, 4, "Describe the image."

vlm = SpeculativeVLM.from_pretrained("reference", "msd")
photos = sample_photos()[:PHOTOS]

# %% [markdown]
# The gain of a token is KL(p with the image ‖ p without it), from two passes over the target's own answer.

# %%
gains = []
for photo in photos:
    answer = vlm.generate(photo, PROMPT, max_new_tokens=TOKENS, do_sample=False)
    inputs = prepare(vlm.processor, [[photo]], [PROMPT])
    gains += [(answer.tokens, image_gain(vlm.target, inputs, [answer.tokens])[0])]

thresholds = ModalityThresholds.fit([gain for _, gain in gains], fingerprint(vlm.model))
print(f"language ≤ {thresholds.language_max:.3f} nats < fusion < {thresholds.vision_min:.3f} ≤ vision")

# %%
names = {kind.id: kind.name for kind in modality.known()}
tokens, gain = gains[0]
for token, nats, kind in zip(tokens, gain.tolist(), thresholds.labels(gain).tolist(), strict=True):
    print(f"{vlm.processor.tokenizer.decode([token])!r:>14}  {nats:6.3f} nats  {names[kind]}")

# %% [markdown]
# θ: the smallest per modality whose mean total variation stays within ε on recorded positions of sampled answers.

# %%
recorded = record(vlm.model, vlm.processor, vlm.drafter, [([photo], PROMPT) for photo in photos])
learned = solve(recorded, [0.05])["0.05"]
print("θ for ε = 0.05:", {name: round(theta, 2) for name, theta in learned.items()})

# %%
config = SpeculativeConfig(verifier="budget", epsilon=0.05, thresholds=learned)
lossy = SpeculativeVLM(vlm.model, vlm.processor, config, "msd")
answer = lossy.generate(photos[0], PROMPT, do_sample=True, temperature=1.0, seed=0, max_new_tokens=TOKENS)
report = answer.as_dict()["divergence"]
print("divergence from the target's distribution:", report)
assert "budget" in verify.policies() and report is not None
