"""Trains methods for the same time and on the same number of answers, and measures them in one run each.

`--contest race` (the default) compares methods; `--contest parts` compares `msd` with other parts of its own, and
`--contest events` with and without event recordings (recipes/events).

python -m recipes.race train --only "msd seed 0"   # one run, on one core; without --only all of them
python -m recipes.race bench --state equal-time     # speed of all trained drafters; then --state equal-answers
python -m recipes.race tell                         # both tables: recipes/race/results/race.md
python -m recipes.race ship                         # copies the drafters of equal time to weights/

An interrupted command is resumed when it is run again. `python -m recipes.race measure` measures the seconds of a step
again, on an idle machine.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from recipes.race.measuring import bench_runs, ship_runs
from recipes.race.plan import ANSWERS, CONTESTS, RACE, TIME
from recipes.race.tables import tell_runs
from recipes.race.training import measure_steps, train_runs

COMMANDS = {"train": train_runs, "bench": bench_runs, "tell": tell_runs, "ship": ship_runs, "measure": measure_steps}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=tuple(COMMANDS))
    parser.add_argument("--contest", choices=tuple(CONTESTS), default=RACE.name)
    parser.add_argument("--captured", type=Path, help="answers to train on")
    parser.add_argument("--held-out", type=Path, help="answers that calibrate the trained drafters")
    parser.add_argument("--held-out-limit", type=int, default=60)
    parser.add_argument("--images", type=Path)
    parser.add_argument("--root", type=Path, help="the target's stored outputs")
    parser.add_argument("--out", type=Path, help="by default runs/race/runs, of another contest runs/race/NAME")
    parser.add_argument("--target")
    parser.add_argument("--minutes", type=float, help="of one core, for each run; by default the contest's")
    parser.add_argument("--threads", type=int, help="by default one to train, all to `bench`")
    parser.add_argument(
        "--only",
        nargs="*",
        default=(),
        help="names of runs, in the order in which to train them; of methods to `measure`",
    )
    parser.add_argument("--state", choices=(TIME, ANSWERS), default=TIME, help="which drafters `bench` measures")
    parser.add_argument("--prompts", type=Path, help="of the benchmark; those of the race are written if missing")
    parser.add_argument("--lookups", action="store_true", help="`bench` also measures seed 0 with lookups of repeats")
    parser.add_argument("--limit", type=int, help="of the prompts")
    parser.add_argument("--max-new-tokens", type=int)
    parser.add_argument(
        "--results", type=Path, help="by default recipes/race/results, of another contest its NAME there"
    )
    parser.add_argument("--weights", type=Path, default=Path("weights"), help="destination of `ship`")
    parser.add_argument("--eight-bit", action="store_true", help="shipped weights in 8 bits instead of 16")
    parser.set_defaults(**vars(CONTESTS[parser.parse_known_args()[0].contest].data))
    args = parser.parse_args()
    race = args.contest == RACE.name
    args.out = args.out or Path("runs/race") / ("runs" if race else args.contest)
    args.results = args.results or Path("recipes/race/results") / ("" if race else args.contest)
    COMMANDS[args.what](args)


if __name__ == "__main__":
    main()
