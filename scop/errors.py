"""The error that means "the user can mend this": one clear line and exit code 2."""


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
