"""The exception that means "the input is wrong", as opposed to "the program is wrong"; and that of a broken-off run."""


class UserError(Exception):
    """Bad input or a missing piece the user can mend.

    The message is one line: what was wrong, with which value, and what to do. Command-line entry points print it
    and exit with code 2; library users catch it as an ordinary exception.
    """

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


class InterruptedRunError(UserError):
    """The user broke off a run, which kept what it had. The message says what that is, and how to go on."""
