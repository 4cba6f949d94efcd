# %% [markdown]
# # Events beside video
#
# An event camera's recording of a scene, read by the drafter; the target sees four frames of it. The recording is
# simulated from a photo under a moving camera. Events change the drafts, never the answer.

# %%
from PIL import Image

from msd import SpeculativeVLM
from msd.events import Camera, SimulatorSettings, events_of_photo, frames
from msd.inputs.media import CLIP_FRAMES
from msd.reference import sample_photos

TOKENS, DURATION = 64, 2_000_000  # microseconds
PHOTO = next(photo for photo in sample_photos() if photo.name == "surfer.jpg")

picture = Image.open(PHOTO)
camera = Camera(picture, (256, 256))
clip = [camera.picture((2 * i + 1) * DURATION // (2 * CLIP_FRAMES)) for i in range(CLIP_FRAMES)]
settings = SimulatorSettings(threshold_on=0.25, threshold_off=0.25)
recording = events_of_photo(picture, (96, 96), DURATION, 80, settings=settings)
print(
    f"{len(recording):,} events in {DURATION / 1e6:.0f} s, {len(frames(recording, 5))} frames of them for the drafter"
)

# %%
vlm = SpeculativeVLM.from_pretrained("reference-video")
with_events = vlm.generate(clip, "Describe the video in detail.", events=recording, max_new_tokens=TOKENS)
without = vlm.generate(clip, "Describe the video in detail.", max_new_tokens=TOKENS)
print(with_events.text.strip())

# %%
for name, answer in (("with events", with_events), ("without", without)):
    print(f"{name:<12} τ = {answer.statistics.mean_acceptance_length:.2f}")
assert with_events.tokens == without.tokens
