"""Options that several commands share, and the quiet that `--json` needs."""

from __future__ import annotations

import logging
import os
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer

from msd.errors import UserError

Target = Annotated[
    str, typer.Option("--target", help="'reference', 'reference-video' (of clips), a checkpoint folder, or a hub id.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
Data = Annotated[Path | None, typer.Option("--data", help="Data lines (jsonl); the bundled photos by default.")]
Images = Annotated[
    Path | None, typer.Option("--images", help="Folder of the data's images; the data's own by default.")
]
MaxNewTokens = Annotated[int, typer.Option("--max-new-tokens", min=1, help="Most tokens of an answer.")]
Limit = Annotated[int | None, typer.Option("--limit", min=1, help="Use only the first N data lines.")]
Drafter = Annotated[
    Path | None,
    typer.Option(
        "--drafter", help="Folder of a trained drafter, used as the method it is of: 'msd', a rival or 'eventgpt'."
    ),
]
Verifier = Annotated[
    str,
    typer.Option(
        "--verifier", help="'lossless', or the lossy 'threshold' or 'budget' (docs/modality_verification.md)."
    ),
]
Epsilon = Annotated[
    float, typer.Option("--epsilon", min=0.0, max=1.0, help="Mean total variation per token that 'budget' may spend.")
]
Thresholds = Annotated[
    list[str] | None,
    typer.Option("--threshold", help="NAME=θ of a modality, for 'threshold' and 'budget'; repeatable."),
]
Backend = Annotated[
    str,
    typer.Option(
        "--backend",
        help="Target passes: 'plain', by the model's own code; 'fused'; 'measure': the faster; 'bf16': rounded, lossy.",
    ),
]
Device = Annotated[
    str | None,
    typer.Option("--device", help="Where the model runs, as torch calls it: 'cpu' (default), 'cuda', 'cuda:1'."),
]
Method = Annotated[
    str | None,
    typer.Option("--method", help="How to draft: a method's name; by default what was trained for the target."),
]
Methods = Annotated[str, typer.Option("--method", help="Method names, separated by commas, or 'all'.")]


def use_drafter(folder: Path | None) -> str | None:
    """Makes the drafter of a `--drafter` folder a method and names it; UserError when there is none."""
    if folder is None:
        return None
    from msd import drafters

    return drafters.register_folder(folder)


def policy(verifier: str, thresholds: list[str] | None, epsilon: float) -> dict[str, Any]:
    """The verification fields of a `SpeculativeConfig`; UserError for what no policy takes."""
    from msd import verify

    table: dict[str, float] = {}
    for entry in thresholds or ():
        name, _, number = entry.partition("=")
        if name in table:
            raise UserError(f"--threshold '{name}' is given twice; give it once")
        try:
            table[name] = float(number)
        except ValueError as error:
            raise UserError(f"--threshold '{entry}' is not NAME=NUMBER, as in vision=0.6") from error
    verify.create(verifier, table, epsilon)
    return {"verifier": verifier, "thresholds": table, "epsilon": epsilon}


def quiet() -> None:
    """Silences the libraries' progress bars and warnings, which are not for users of a command line."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers.utils import logging as library

    library.set_verbosity_error()
    library.disable_progress_bar()
    logging.getLogger("torch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")


def share_cores() -> None:
    """Passes use fewer threads while other processes keep the cores busy; not for commands that time anything."""
    from msd import threads

    threads.share_cores()


def chosen_methods(names: str, target: str, greedy: bool = False) -> list[str]:
    """Method names of a `--method` value, "all" being all for that target; UserError for an unknown one.

    greedy: all but those that sample their drafts, since without sampling they draft as their other form does.
    """
    from msd import drafters

    if names == "all":
        return [name for name in drafters.methods(target) if not (greedy and name.endswith(":sampled"))]
    listed = [name.strip() for name in names.split(",") if name.strip()]
    unknown = [name for name in listed if name not in drafters.known()]
    if unknown or not listed:
        raise UserError(f"unknown method '{', '.join(unknown)}'; known: {', '.join(drafters.known())}")
    return listed
