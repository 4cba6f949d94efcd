"""The `msd` command. Bad input is one line on stderr and exit code 2; results go to stdout, the rest to stderr."""

from __future__ import annotations

import sys
import tempfile
import traceback
from pathlib import Path

import typer
from typer.exceptions import TyperException

from msd.cli import bench, capture, demo, estimate, events, generate, inspect, reference, targets, train, verify
from msd.errors import UserError
from msd.heap import use_huge_pages
from msd.version import __version__

OUT_OF_MEMORY = ("can't allocate memory", "not enough memory", "out of memory")  # as torch says it

app = typer.Typer(
    help="Modality-aware speculative decoding for vision-language models: the same output, sooner.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command("generate")(generate.generate)
app.command("verify")(verify.verify)
app.command("bench")(bench.bench)
app.command("capture")(capture.capture)
app.command("train")(train.train)
app.command("targets")(targets.targets)
app.command("estimate")(estimate.estimate)
app.command("events")(events.events)
app.command("inspect")(inspect.inspect)
app.command("demo")(demo.demo)
app.add_typer(reference.app, name="reference")


def _version(wanted: bool) -> None:
    if wanted:
        print(f"msd {__version__}")
        raise typer.Exit()


@app.callback()
def _root(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version."),
) -> None:
    pass


def main(arguments: list[str] | None = None) -> None:
    """Runs `msd` with `arguments` (the process's own by default) and exits."""
    arguments = sys.argv[1:] if arguments is None else arguments
    use_huge_pages()
    try:
        sys.exit(app(args=arguments or ["--help"], standalone_mode=False) or 0)
    except UserError as error:
        _fail(str(error), 2)
    except TyperException as error:  # wrong options and the like
        _fail(f"{error.format_message().rstrip('.')}; see 'msd --help'", 2)
    except (KeyboardInterrupt, typer.Abort):
        _fail("interrupted", 130)
    except Exception as error:
        if told := _of_the_user(error):
            _fail(told, 2)
        # a bug of ours: one line for the user, the traceback in a file for the report
        with tempfile.NamedTemporaryFile("w", prefix="msd-", suffix=".log", delete=False) as log:
            traceback.print_exc(file=log)
        _fail(f"internal error: {type(error).__name__}: {error}; please report it with {Path(log.name)}", 1)


def _of_the_user(error: Exception) -> str | None:
    """What to say of errors that a library raises for the user's options or machine; None for all else."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    raised_in = trace.tb_frame.f_globals.get("__name__", "") if trace is not None else ""
    if isinstance(error, ValueError | TypeError) and raised_in.startswith("transformers.generation."):
        return f"transformers does not take an option of the command line or of the model's generation config: {error}"
    if isinstance(error, RuntimeError) and "probability tensor contains" in str(error):
        return f"the sampling options leave no probabilities to draw from ({error}); raise the temperature"
    if isinstance(error, MemoryError) or any(said in str(error) for said in OUT_OF_MEMORY):
        return f"not enough memory: {error}; use a smaller target, fewer or smaller images, or a smaller batch"
    return None


def _fail(message: str, code: int) -> None:
    """One line on stderr, then exit."""
    print(f"msd: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(code)
