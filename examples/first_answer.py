# %% [markdown]
# # A first answer
#
# The reference model describes a photo, with its default drafter. The tokens are those of `transformers`
# `generate()`.

# %%
from msd import SpeculativeVLM
from msd.inputs.prompts import prepare
from msd.reference import sample_photos

TOKENS = 96
PHOTO = next(photo for photo in sample_photos() if photo.name == "surfer.jpg")  # or a path of your own
PROMPT = "Describe the image in detail."

vlm = SpeculativeVLM.from_pretrained("reference")
for piece in vlm.stream(PHOTO, PROMPT, max_new_tokens=TOKENS):
    print(piece, end="", flush=True)
print()

# %%
answer = vlm.generate(PHOTO, PROMPT, max_new_tokens=TOKENS, do_sample=False)
statistics = answer.statistics
print(f"{len(answer.tokens)} tokens, method {answer.method} ({vlm.reason})")
print(f"{statistics.num_spec_steps} target passes, τ = {statistics.mean_acceptance_length:.2f} tokens per pass")

# %% [markdown]
# The same prompt, answered by the library alone:

# %%
inputs = prepare(vlm.processor, [[PHOTO]], [PROMPT])
output = vlm.model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)
same = output[0, inputs["input_ids"].shape[1] :].tolist() == answer.tokens
print("identical to generate():", same)
assert same
