"""The `msd` command.

Results go to stdout, everything else to stderr. Bad input gives one line on stderr and exit code 2.
"""

from __future__ import annotations

import signal
import sys
import tempfile
import threading
import traceback
from contextlib import suppress
from typing import Any

import typer
from typer.exceptions import TyperException

from msd import __version__
from msd.cli import (
    bench,
    calibrate,
    capture,
    check,
    demo,
    doctor,
    estimate,
    events,
    export,
    generate,
    inspect,
    push,
    reference,
    serve,
    targets,
    train,
    verify,
)
from msd.cli.terminal import any_encoding, flush, give_up_output
from msd.errors import InterruptedRunError, UserError
from msd.system.files import FULL

OUT_OF_MEMORY = ("can't allocate memory", "not enough memory", "out of memory")  # in torch's messages

app = typer.Typer(
    help="Modality-aware speculative decoding for vision-language models: the same output, sooner.",
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command("generate", short_help="Answer a prompt about images, videos, sounds or events.")(generate.generate)
app.command("serve", short_help="Serve a model over OpenAI's HTTP interface.")(serve.serve)
app.command("verify", short_help="Certify that answers are those of transformers' generate().")(verify.verify)
app.command("bench", short_help="Time methods against transformers' generate().")(bench.bench)
app.command("capture", short_help="Let the target answer prompts, to train drafters on.")(capture.capture)
app.command("train", short_help="Train a drafter for a target; resumable.")(train.train)
app.command("calibrate", short_help="Fit the chances by which a drafter chooses drafts.")(calibrate.calibrate)
app.command("check", short_help="Check a draft head, ours or published.")(check.check)
app.command("export", short_help="Write a drafter in the format of another project.")(export.export)
app.command("push", short_help="Upload a drafter with a model card to the hub.")(push.push)
app.command("targets", short_help="List the supported architectures.")(targets.targets)
app.command("estimate", short_help="Estimate the speedup on a GPU, without GPU or weights.")(estimate.estimate)
app.command("events", short_help="Describe and draw an event camera's recording.")(events.events)
app.command("inspect", short_help="Show the draft trees of one answer, as a page or as text.")(inspect.inspect)
app.command("demo", short_help="Describe a bundled photo, and compare with plain decoding.")(demo.demo)
app.command("doctor", short_help="Say what is installed, what is missing, and how to mend it.")(doctor.doctor)
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
    """Runs `msd` with `arguments` (by default those of the process) and exits."""
    arguments = sys.argv[1:] if arguments is None else arguments
    any_encoding()
    _stop_on_sigterm()
    try:
        code = app(args=arguments or ["--help"], standalone_mode=False) or 0
        flush()
        sys.exit(code)
    except InterruptedRunError as error:
        _fail(str(error), 130)
    except UserError as error:
        _fail(str(error), 2)
    except TyperException as error:  # such as an unknown option
        _fail(f"{error.format_message().rstrip('.')}; see '{_command(getattr(error, 'ctx', None))} --help'", 2)
    except (KeyboardInterrupt, typer.Abort):
        _fail("interrupted", 130)
    except BrokenPipeError:  # the reader of the output has left
        give_up_output()
        sys.exit(1)  # the code that typer uses if it notices first
    except OSError as error:
        if error.errno not in FULL:
            _report(error)
        give_up_output()
        _fail(f"cannot write {error.filename or 'the output'}: {error.strerror}; free some space", 2, error)
    except Exception as error:
        if message := _user_message(error):
            _fail(message, 2, error)
        _report(error)


def _command(context: Any) -> str:
    """Returns the command that a context of typer belongs to, such as "msd export"; "msd" without one."""
    names: list[str] = []
    while context is not None and context.parent is not None:
        names.insert(0, context.info_name)
        context = context.parent
    return " ".join(["msd", *names])


def _stop_on_sigterm() -> None:
    """Treats SIGTERM, which `kill` and `timeout` send, as Ctrl-C, so that a command saves or reports its work."""
    main_thread = threading.current_thread() is threading.main_thread()
    if main_thread and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, signal.default_int_handler)


def _report(error: Exception) -> None:
    """Reports an internal error: one line on stderr, and the traceback in a file."""
    message = "; ".join(
        [f"internal error: {type(error).__name__}: {error}", *getattr(error, "__notes__", []), "please report it"]
    )
    try:
        with tempfile.NamedTemporaryFile(
            "w", prefix="msd-", suffix=".log", delete=False, encoding="utf-8", errors="backslashreplace"
        ) as log:
            traceback.print_exception(error, file=log)
    except OSError:  # the disk is full
        _fail(message, 1)
    _fail(f"{message} with {log.name}", 1)


def _user_message(error: Exception) -> str | None:
    """Returns a message for errors of libraries that the user's options or machine cause; None for all others."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    raised_in = frames[-1].f_globals.get("__name__", "") if frames else ""
    if isinstance(error, ValueError | TypeError) and raised_in.startswith("transformers.generation."):
        return f"transformers refuses an option of the command line or of the model's generation config: {error}"
    if isinstance(error, RuntimeError) and "probability tensor contains" in str(error):
        return f"the sampling options leave no token to sample from ({error}); raise the temperature"
    if isinstance(error, MemoryError) or any(part in str(error) for part in OUT_OF_MEMORY):
        return f"not enough memory: {error}; use a smaller target, fewer or smaller images, or a smaller batch"
    return None


def _fail(message: str, code: int, error: Exception | None = None) -> None:
    """Prints the message and the error's notes as one line on stderr, and exits."""
    message = "; ".join([message, *getattr(error, "__notes__", [])])  # notes: which work is saved
    with suppress(OSError):  # if nothing can be written, the exit code remains
        flush()
    if sys.stderr is not None:
        with suppress(OSError):
            print(f"msd: {' '.join(message.split())}", file=sys.stderr, flush=True)
    sys.exit(code)
