"""The environment variables and certificates of Docker containers: credentials of S3 (``AWS_*``), MLflow's settings."""

from __future__ import annotations

import os
from pathlib import Path

from pipelines.local.containers import existing
from scop.environment import StepEnvironment, name_of
from scop.storage.s3 import s3_variables

_PREFIXES = ("AWS_", "MLFLOW_", "OMP_", "REQUESTS_CA_BUNDLE", "SSL_CERT_FILE")
"""The user's environment variables that are passed on to steps if set."""
_OF_THIS_MACHINE = {
    "AWS_CONFIG_FILE",
    "AWS_PROFILE",
    "AWS_SHARED_CREDENTIALS_FILE",
    name_of(StepEnvironment, "tracking_uri"),
}
CERTIFICATES = ("AWS_CA_BUNDLE", "REQUESTS_CA_BUNDLE", "SSL_CERT_FILE")
"""Variables that name a file of trusted certificates."""


def passed_on_variables(prefixes: tuple[str, ...] = _PREFIXES, with_s3: bool = False) -> dict[str, str]:
    """Return the user's variables that steps in containers may need.

    Args:
        prefixes: prefixes of the variables' names.
        with_s3: also return settings that boto3 finds in files and roles of this machine, which a container lacks.
    """
    found = {k: v for k, v in os.environ.items() if k.startswith(prefixes) and k not in _OF_THIS_MACHINE}
    return (s3_variables() if with_s3 else {}) | found


def certificates() -> tuple[Path, ...]:
    """Return the certificate files that this process uses; a container needs them at the same paths."""
    return existing(os.environ.get(name) for name in CERTIFICATES)
