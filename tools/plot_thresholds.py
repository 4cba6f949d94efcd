"""Plots of docs/modality_verification.md: total variation and acceptance against θ. Writes docs/images/*.png.

The distributions are synthetic: random logits of 64 tokens for the target, and the same plus noise for the draft
(standard deviation 0.5 for language, 0.8 for fusion, 1.2 for vision, whose drafts are worse). Both policies use the
same 2,000 positions per modality. The values at each position are exact (`msd.verify.divergence`).
"""

from __future__ import annotations

import io
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from torch import Tensor

from msd.core import modality
from msd.system.files import write_whole
from msd.verify import calibrate
from msd.verify.divergence import budget_distribution, sampled_distribution, threshold_distribution, total_variation
from msd.verify.rejection import hard, soft

OUT = Path(__file__).parents[1] / "docs" / "images"
NOISE = {"language": 0.5, "fusion": 0.8, "vision": 1.2}
COLOURS = {"language": "tab:blue", "fusion": "tab:green", "vision": "tab:red"}
THRESHOLDS = [i / 50 for i in range(51)]
POSITIONS, VOCABULARY, CHILDREN = 2000, 64, 3


def distributions(name: str, temperature: float) -> tuple[Tensor, Tensor]:
    """(p, q) [n, V] float64 at a temperature."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(POSITIONS, VOCABULARY, generator=generator, dtype=torch.float64) * 2.5
    noise = torch.randn(POSITIONS, VOCABULARY, generator=generator, dtype=torch.float64) * NOISE[name]
    return (logits / temperature).softmax(-1), ((logits + noise) / temperature).softmax(-1)


def curves(temperature: float, path: Path) -> None:
    """TV and acceptance rate of one sampled candidate, `threshold` next to `budget`."""
    figure, axes = plt.subplots(2, 2, figsize=(8, 5.6), sharex=True, sharey="row", layout="constrained")
    for column, (policy, rule) in enumerate((("threshold", hard), ("budget", soft))):
        for name, colour in COLOURS.items():
            p, q = distributions(name, temperature)
            tv = [float(total_variation(sampled_distribution(p, q[:, None], at, rule), p).mean()) for at in THRESHOLDS]
            rate = [float((q * rule(p, q, at)).sum(-1).mean()) for at in THRESHOLDS]
            axes[0, column].plot(THRESHOLDS, tv, colour, label=name)
            axes[1, column].plot(THRESHOLDS, rate, colour)
            lossless = float(torch.minimum(p, q).sum(-1).mean())
            axes[1, column].axhline(lossless, color=colour, linestyle=":", linewidth=1)
            if policy == "threshold":
                axes[0, column].axvline(modality.get(name).threshold, color=colour, linestyle="--", linewidth=0.8)
        axes[0, column].set_title(f"{policy}, T = {temperature}")
        axes[1, column].set_xlabel("θ")
    axes[0, 0].set_ylabel("mean total variation from p")
    axes[1, 0].set_ylabel("acceptance rate (dotted: lossless)")
    axes[0, 0].legend()
    save(figure, path)


def candidates(path: Path) -> None:
    """TV by kind of candidate, vision distributions at T = 1."""
    p, q = distributions("vision", 1.0)
    drafted = torch.zeros_like(p, dtype=torch.bool).scatter(1, q.topk(CHILDREN).indices, True)
    kinds = {"1 sampled": 1, f"{CHILDREN} sampled": CHILDREN}
    figure, axes = plt.subplots(1, 2, figsize=(8, 3), sharey=True, layout="constrained")
    for column, policy in enumerate(("threshold", "budget")):
        for label, k in kinds.items():
            rule = hard if policy == "threshold" else soft
            repeated = q[:, None].expand(-1, k, -1)
            axes[column].plot(
                THRESHOLDS,
                [float(total_variation(sampled_distribution(p, repeated, at, rule), p).mean()) for at in THRESHOLDS],
                label=label,
            )
        outputs = [
            threshold_distribution(p, at, drafted, q) if policy == "threshold" else budget_distribution(p, at, drafted)
            for at in THRESHOLDS
        ]
        axes[column].plot(
            THRESHOLDS,
            [float(total_variation(out, p).mean()) for out in outputs],
            label=f"best {CHILDREN}, deterministic",
        )
        axes[column].set_title(f"{policy}, by kind of candidate")
        axes[column].set_xlabel("θ")
    axes[0].set_ylabel("mean total variation from p")
    axes[0].legend()
    save(figure, path)


def save(figure: plt.Figure, path: Path) -> None:
    """Writes a figure as a small PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=80, metadata={"Software": None})
    write_whole(path, buffer.getvalue())
    plt.close(figure)


def main() -> None:
    """Writes all plots and prints the table of the page."""
    OUT.mkdir(parents=True, exist_ok=True)
    curves(1.0, OUT / "thresholds_t1.png")
    curves(0.7, OUT / "thresholds_t07.png")
    candidates(OUT / "thresholds_candidates.png")
    for temperature in (1.0, 0.7):
        for name in NOISE:
            p, q = distributions(name, temperature)
            threshold = modality.get(name).threshold
            tv = total_variation(sampled_distribution(p, q[:, None], threshold, hard), p).mean()
            rate, lossless = (q * hard(p, q, threshold)).sum(-1).mean(), torch.minimum(p, q).sum(-1).mean()
            solved = [calibrate({name: (p, q)}, e)[name] for e in (0.01, 0.05)]
            print(
                f"| {temperature} | {name} | {threshold} | {tv:.3f} | {rate:.3f} | {lossless:.3f} | "
                f"{solved[0]:.3f} | {solved[1]:.3f} |"
            )


if __name__ == "__main__":
    main()
