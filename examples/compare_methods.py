# %% [markdown]
# # Compare methods
#
# Several drafters answer the same prompts in one interleaved run, as `msd bench` does. Speeds are ratios within this
# run; a busy machine makes all of them worse. `msd.drafters.methods()` lists the methods whose weights are here.

# %%
from msd import drafters
from msd.bench import measure
from msd.bench.data import load_data
from msd.loading import load_target

TOKENS, PROMPTS = 48, 6
METHODS = ["prompt-lookup", "msd"]

print("available:", ", ".join(drafters.methods()))
model, processor = load_target("reference")
samples = [sample for sample in load_data(None) if sample.images][:PROMPTS]

# %%
results = measure.run(
    model, processor, samples, METHODS, TOKENS, 0.0, report=lambda message: None, baselines=[measure.TRANSFORMERS]
)

# %%
print(f"{'method':<16}{'tokens/s':>10}{'vs generate()':>16}{'τ':>8}{'identical':>12}")
for row in results["rows"]:
    if row["task"] == "all":
        speedup, length = row["speedup_vs_transformers"], row["mean_acceptance_length"]
        shown = f"{row['tokens_per_second']:>10.1f}{speedup:>15.2f}x{length:>8.2f}{row['identical']:>12.0%}"
        print(f"{row['method']:<16}{shown}")
        assert row["identical"] == 1.0
