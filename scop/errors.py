"""Errors, and how their messages are shown."""

from __future__ import annotations

import re

_EXTRAS = {
    "boto3": "s3",
    "botocore": "s3",
    "docker": "pipeline",
    "kfp": "pipeline",
    "kubeflow_trainer_api": "pipeline",
    "kubernetes": "pipeline",
    "matplotlib": "report",
    "mlflow": "tracking",
    "onnx": "export",
    "onnxruntime": "export",
    "onnxscript": "export",
    "pandas": "report",
    "plotly": "report",
    "psutil": "pipeline",
    "rich": "pipeline",
    "scipy": "report",
    "sklearn": "pipeline",
    "yaml": "pipeline",
}
"""The extra of pyproject.toml that installs each optional module."""
_ESCAPE = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")


class UserError(Exception):
    """A mistake that the user can correct. The message is one line: what is wrong, where, and the remedy."""


class DamagedError(UserError):
    """Stored data that does not match its checksum, even when read again."""


class Stopped(Exception):  # noqa: N818 - not an error
    """A signal stopped the training, after it wrote a checkpoint if checkpoints are enabled.

    Attributes:
        code: the process's exit code: 128 plus the signal's number.
    """

    def __init__(self, message: str, code: int = 143) -> None:
        super().__init__(message)
        self.code = code


def missing_extra(error: BaseException) -> UserError | None:
    """Return the error to report if an optional package is not installed, else None."""
    if not isinstance(error, ModuleNotFoundError) or error.name is None:
        return None
    if (extra := _EXTRAS.get(error.name.partition(".")[0])) is None:
        return None
    return UserError(f"module {error.name} is not installed; run: pip install 'scop[{extra}]'")


def redact(text: str) -> str:
    """Return a URI, or a message that contains one, without user and password."""
    return re.sub(r"(?<=://)[^/?#\s]+@", "", text)


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, without credentials; or the error's type, if it has no message.

    A connection error of the HTTP client is reduced to its cause.
    """
    lines = _ESCAPE.sub("", redact(str(error))).strip().splitlines()
    if not lines:
        return type(error).__name__
    if "Max retries exceeded" in lines[0]:
        if found := re.search(r"\[Errno -?\d+\] ([^'\")]+)", lines[0]):
            return found[1].lower()
        if "timed out" in lines[0]:
            return "no answer in time"
    return lines[0][:300]
