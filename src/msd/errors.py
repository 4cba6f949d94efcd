"""The exceptions for wrong input and for interrupted runs. Any other exception is an error of the program."""

from collections.abc import Iterator
from contextlib import contextmanager


class UserError(Exception):
    """Wrong input, or a missing file or package, which the user can correct.

    The message is one line: what is wrong, with which value, and what to do. Commands print it and exit with code 2.
    """

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


class InterruptedRunError(UserError):
    """The user interrupted a run. The message names the partial results that were saved and how to continue."""


@contextmanager
def named(subject: str) -> Iterator[None]:
    """Puts what the block is about in front of the message of its UserErrors."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{subject}: {error}") from error
