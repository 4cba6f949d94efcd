"""Compares features of node chances: the log loss of candidates on answers that a fit has not seen.

python -m recipes.msd.chances --drafter weights/msd-30min --out results/node_chances.json

Half of the held-out answers fit the logistic model, the other half measures it, and the other way round. All features
but those of siblings are tried in addition to log odds and confidence.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from msd.drafters import registry
from msd.drafters.toolkit.chance import log_odds
from msd.drafters.toolkit.training import all_roots, drafted, read
from msd.labels.label_thresholds import ModalityThresholds
from msd.loading import load_target
from msd.system import machine
from msd.system.files import write_whole
from msd.targets import adapt
from msd.targets.taps import output_layer
from msd.train.capture import label_thresholds_path, mixed, read_captured
from msd.train.teacher_batches import TeacherBatches, TeacherCache

SETS: dict[str, tuple[str, ...]] = {
    "log odds and confidence": (),
    "+ depth": ("depth",),
    "+ the router's probabilities": ("vision", "fusion"),
    "+ the target's entropy before the root": ("target entropy",),
    "+ the draft distribution's entropy": ("draft entropy",),
    "+ the likeliest sibling's log odds": ("best",),
    "+ whether it is the likeliest": ("first",),
    "+ both of these": ("best", "first"),
    "+ both, depth, router and target's entropy": ("best", "first", "depth", "vision", "fusion", "target entropy"),
}
CANDIDATES = 4  # of each position


@torch.no_grad()
def collect(args: argparse.Namespace) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Returns (features by name [n], whether a candidate is correct [n], whether it is of the first half [n])."""
    model, processor = load_target(args.target)
    answers = [a for a in read_captured(args.captured, args.images) if len(a.ids) > 1 and a.images]
    answers = mixed(answers, args.limit)
    network = registry.load(args.drafter).attach(model).eval()
    cache = TeacherCache(output_layer(model), network.ids, network.config.taps, 0.0)
    thresholds = ModalityThresholds.load(label_thresholds_path(args.captured))
    batches = TeacherBatches(adapt(model, network.config.taps), processor, answers, thresholds, cache, 4)
    objective, parts, halves = network.objective(), list[list[Tensor]](), list[Tensor]()
    for number, (batch, _) in enumerate(batches.in_order(answers)):
        roots = all_roots(batch)
        index, valid = drafted(batch, roots, network.config.depth)
        before = -(batch.logits.exp() * batch.logits).sum(-1).gather(1, roots)  # over the draft vocabulary
        drafts, states = objective.all_states(batch)
        routes = objective.routes(batch, drafts, states).exp()
        levels = zip(*(x.unbind(2) for x in objective.logits(batch, drafts, states, routes)), strict=True)
        for d, (logits, confidence) in enumerate(levels):
            log_q = logits.float().log_softmax(-1)
            top, chosen = log_q.topk(CANDIDATES, -1)
            correct = network.ids[chosen] == read(batch.answers, index[..., d : d + 1])
            entropy = -(log_q.exp() * log_q).sum(-1)
            odds = log_odds(top)
            first = torch.zeros_like(top)
            first[..., 0] = 1
            shared = [confidence.float(), before, entropy, routes[:, :, d, 1], routes[:, :, d, 2]]
            each = [odds, odds[..., :1].expand_as(odds), first, torch.full_like(odds, d + 1)]
            each += [x[..., None].expand_as(odds) for x in shared]
            kept = valid[..., d : d + 1].expand_as(correct)
            parts.append([x[kept].double() for x in (*each, correct)])
            halves.append(torch.full((int(kept.sum()),), number % 2 == 0))
        print(f"batch {number + 1}", end="\r", flush=True)
    names = ("log_odds", "best", "first", "depth", "confidence", "target entropy", "draft entropy", "vision", "fusion")
    *columns, correct = (torch.cat(column) for column in zip(*parts, strict=True))
    return dict(zip(names, columns, strict=True)), correct, torch.cat(halves)


def held_out_loss(columns: list[Tensor], correct: Tensor, half: Tensor) -> float:
    """Returns the mean log loss (nats) of candidates under the model that was fitted on the other half."""
    total, features = 0.0, torch.stack(columns, -1)
    for fit in (half, ~half):
        scaled = (features - features[fit].mean(0)) / features[fit].std(0)
        scaled = F.pad(scaled, (0, 1), value=1.0)
        weights = torch.zeros(scaled.shape[1], dtype=torch.float64, requires_grad=True)
        solver = torch.optim.LBFGS([weights], max_iter=200, line_search_fn="strong_wolfe")

        def loss(scaled: Tensor = scaled, fit: Tensor = fit, weights: Tensor = weights) -> Tensor:
            weights.grad = None
            value = F.binary_cross_entropy_with_logits(scaled[fit] @ weights, correct[fit])
            value.backward()
            return value

        solver.step(loss)
        logits = scaled[~fit] @ weights.detach()
        total += float(F.binary_cross_entropy_with_logits(logits, correct[~fit], reduction="sum"))
    return total / len(correct)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--drafter", type=Path, default=Path("weights/msd-30min"), help="folder of an msd drafter")
    parser.add_argument("--captured", type=Path, default=Path("runs/msd/val_captured.jsonl"))
    parser.add_argument("--images", type=Path, default=Path("../shared/data"))
    parser.add_argument("--limit", type=int, default=120, help="answers, of all tasks in turn")
    parser.add_argument("--target", default="reference")
    parser.add_argument("--out", type=Path, default=Path("results/node_chances.json"))
    args = parser.parse_args()
    features, correct, half = collect(args)
    own = [features["log_odds"], features["confidence"]]
    losses = {
        name: round(held_out_loss([*own, *(features[f] for f in more)], correct, half), 5)
        for name, more in SETS.items()
    }
    found = {
        "cpu": machine.processor(),
        "drafter": args.drafter.name,
        "answers": args.limit,
        "candidates": len(correct),
    }
    write_whole(args.out, json.dumps(found | {"log_loss": losses}, indent=1, ensure_ascii=False) + "\n")
    print("\n".join(f"| {name} | {loss:.4f} |" for name, loss in losses.items()))


if __name__ == "__main__":
    main()
