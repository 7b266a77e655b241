"""Real servers for tests: S3 by rclone, S3 that can be made to fail by moto, each a process on a free port."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

KEY, SECRET = "scop-test-key-id", "scop-test-secret"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def process(command: list[str], port: int, log: Path) -> Iterator[str]:
    """A server on a port, from when it listens until the end of the block; gives its address."""
    with log.open("wb") as output, subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT) as server:
        try:
            deadline = time.monotonic() + 60
            while True:
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                    break
                assert server.poll() is None and time.monotonic() < deadline, log.read_text()
                time.sleep(0.05)
            yield f"http://127.0.0.1:{port}"
        finally:
            server.terminate()


def rclone() -> str:
    return str(Path(sys.executable).with_name("rclone"))


def s3_server(folder: Path) -> contextlib.AbstractContextManager[str]:
    """rclone's S3 server over a folder, whose subfolders are the buckets; it checks signatures."""
    port = free_port()
    (folder / "store").mkdir(parents=True, exist_ok=True)
    command = [rclone(), "serve", "s3", "--config", "/dev/null", "--auth-key", f"{KEY},{SECRET}"]
    return process([*command, "--addr", f"127.0.0.1:{port}", str(folder / "store")], port, folder / "rclone.log")


def environment(address: str) -> dict[str, str]:
    """What boto3 needs to find a server."""
    return {
        "AWS_ENDPOINT_URL_S3": address,
        "AWS_ACCESS_KEY_ID": KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
