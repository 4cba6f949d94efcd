# %% [markdown]
# # Train a drafter in five minutes
#
# The target answers prompts about the bundled photos; a small `eagle3` drafter learns to predict these answers. With
# the settings below this takes about five minutes on two cores. So little data makes a weak drafter: the point is the
# way.

# %%
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from msd import SpeculativeVLM
from msd.formats import register_folder
from msd.reference import sample_photos

TARGET = "reference"  # or a checkpoint folder, or a hub id
STEPS, TOKENS, PHOTOS = 300, 64, 15
PROMPTS = ("Describe the image in detail.", "Describe the image.", "What is happening here?")
FOLDER = Path(tempfile.mkdtemp())


def msd(*arguments: object) -> None:
    """Runs a command of the command line."""
    subprocess.run([sys.executable, "-m", "msd", *map(str, arguments)], check=True)


# %% [markdown]
# Data lines name a photo and a prompt. The last photos are held out.

# %%
photos = sample_photos()[:PHOTOS]
lines = [
    {"image": photo.name, "prompt": prompt, "split": "val" if i >= len(photos) - 2 else "train"}
    for i, photo in enumerate(photos)
    for prompt in PROMPTS
]
data, captured, run = FOLDER / "data.jsonl", FOLDER / "captured.jsonl", FOLDER / "run"
data.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")

# %%
images = ("--target", TARGET, "--images", photos[0].parent)
msd("capture", "--data", data, *images, "--out", captured, "--max-new-tokens", TOKENS)
msd("train", "--method", "eagle3", "--captured", captured, *images, "--out", run, "--steps", STEPS)

# %% [markdown]
# The folder of the drafter names its method. Its answers are the target's, as with any drafter.

# %%
vlm = SpeculativeVLM.from_pretrained(TARGET, register_folder(run / "drafter"))
plain = vlm.with_method("ar")
for photo in photos[-2:]:
    drafted = vlm.generate(photo, PROMPTS[0], max_new_tokens=TOKENS, do_sample=False)
    alone = plain.generate(photo, PROMPTS[0], max_new_tokens=TOKENS, do_sample=False)
    assert drafted.tokens == alone.tokens
    print(f"{photo.name}: τ = {drafted.statistics.mean_acceptance_length:.2f}, the same {len(alone.tokens)} tokens")
print("drafter:", run / "drafter")
