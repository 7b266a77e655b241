"""The error that means "the user can mend this": one clear line and exit code 2."""

import re


class UserError(Exception):
    """Bad input. The message is one line that says what is wrong, where, and how to mend it."""


class Stopped(Exception):  # noqa: N818 - it is no error
    """Training stopped because it was asked to, with a checkpoint written where there is a place for one.

    Attributes:
        code: that the process exits with, by custom 128 and the signal's number.
    """

    def __init__(self, message: str, code: int = 143) -> None:
        super().__init__(message)
        self.code = code


class DamagedError(UserError):
    """What was stored is not what comes back, however often it is asked for."""


_ESCAPE = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")


def shown(text: str) -> str:
    """A tracking URI, or a message that has it, as it may be printed: without user and password."""
    return re.sub(r"(?<=://)[^/?#\s]+@", "", text)


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type where it has none; no user and password in it.

    What the HTTP client says of a connection that failed is cut down to its cause.
    """
    lines = _ESCAPE.sub("", shown(str(error))).strip().splitlines()
    if not lines:
        return type(error).__name__
    if "Max retries exceeded" in lines[0]:
        if found := re.search(r"\[Errno -?\d+\] ([^'\")]+)", lines[0]):
            return found[1].lower()
        if "timed out" in lines[0]:
            return "no answer in time"
    return lines[0][:300]
