"""Sending data to MLflow without depending on it.

A failing tracking server must not cost hours of training. After the first failure, a warning is logged, nothing more is
sent, and all data goes to a local file. Data that the server rejects as invalid also goes to that file.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from scop.errors import UserError, first_line, redact

logger = logging.getLogger(__name__)
T = TypeVar("T")


class Outbox:
    """Sends data to an MLflow server, or stores it if that fails.

    Args:
        tracking_uri: URI of the server, for messages.
        unsent: the file for data that could not be sent, one JSON object per line.
    """

    def __init__(self, tracking_uri: str, unsent: Path) -> None:
        self._tracking_uri, self._unsent = tracking_uri, unsent
        self._reachable, self._reported = True, False

    @property
    def reachable(self) -> bool:
        """Whether the server has answered so far."""
        return self._reachable

    def retry(self) -> None:
        """Try the server again, even if it has failed before."""
        self._reachable = True

    def send(self, what: str, content: Any, function: Callable[[], T], at_start: bool = False) -> T | None:
        """Send data by calling a function; return its result, or None if it failed and the content was stored.

        Args:
            what: kind of content, for the message and the file.
            content: content to store if it cannot be sent.
            function: sends the content.
            at_start: whether this is the first request; if it is refused, that is an error.

        Raises:
            UserError: the server refuses the credentials at the start.
        """
        if self._reachable:
            try:
                return function()
            except Exception as error:  # servers and networks can fail in any way
                if at_start and is_refusal(error):
                    raise UserError(
                        f"MLflow at {redact(self._tracking_uri)} refuses access ({first_line(error)}); "
                        "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"
                    ) from error
                if getattr(error, "error_code", "") == "INVALID_PARAMETER_VALUE" and not at_start:
                    self._report(f"MLflow rejected {what}", error)
                else:
                    self._reachable = False
                    if not self._reported:
                        self._report("MLflow failed", error)
                    self._reported = True
        self._unsent.parent.mkdir(parents=True, exist_ok=True)
        with self._unsent.open("a") as file:
            file.write(json.dumps({"what": what, "content": content}, default=str) + "\n")
        return None

    def _report(self, what: str, error: Exception) -> None:
        logger.warning("tracking: %s (%s); the step continues, see %s", what, first_line(error), self._unsent)


def is_refusal(error: Exception) -> bool:
    """Whether a server has refused the credentials."""
    code = str(getattr(error, "error_code", ""))
    text = str(error)
    return code in ("UNAUTHENTICATED", "PERMISSION_DENIED") or "error code 401" in text or "error code 403" in text
