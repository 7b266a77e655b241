"""Servers for tests: MLflow, S3 by rclone, and S3 by moto behind a proxy that injects faults."""

from __future__ import annotations

import contextlib
import http.client
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

KEY, SECRET = "scop-test-key-id", "scop-test-secret"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def process(command: list[str], port: int, log: Path, environment: Mapping[str, str] | None = None) -> Iterator[str]:
    """Run a server, wait until it listens on the port, and yield its URL."""
    with (
        log.open("wb") as output,
        subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True, env=environment
        ) as server,
    ):
        try:
            deadline = time.monotonic() + 60
            while True:
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                    break
                assert server.poll() is None and time.monotonic() < deadline, log.read_text()
                time.sleep(0.05)
            yield f"http://127.0.0.1:{port}"
        finally:
            os.killpg(server.pid, signal.SIGKILL)  # including its workers


def mlflow_server(
    folder: Path, artifacts: str, environment: Mapping[str, str], workers: int = 1
) -> contextlib.AbstractContextManager[str]:
    """Run an MLflow server with a SQLite database."""
    port = free_port()
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--workers", str(workers)]
    command += ["--backend-store-uri", f"sqlite:///{folder / 'server.db'}", "--artifacts-destination", artifacts]
    # Disable the job queues: seven more processes that the tests do not need.
    quiet = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    return process(command, port, folder / "mlflow.log", {**environment, **quiet})


def rclone() -> str:
    return str(Path(sys.executable).with_name("rclone"))


def s3_server(folder: Path) -> contextlib.AbstractContextManager[str]:
    """Run rclone's S3 server, which checks signatures; each subfolder of FOLDER/store is a bucket."""
    port = free_port()
    (folder / "store").mkdir(parents=True, exist_ok=True)
    command = [rclone(), "serve", "s3", "--config", "/dev/null", "--auth-key", f"{KEY},{SECRET}"]
    return process([*command, "--addr", f"127.0.0.1:{port}", str(folder / "store")], port, folder / "rclone.log")


def environment(address: str) -> dict[str, str]:
    """Return the environment variables with which boto3 uses a server."""
    return {
        "AWS_ENDPOINT_URL_S3": address,
        "AWS_ACCESS_KEY_ID": KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }


# -- faults ------------------------------------------------------------------------------------------------------------


@dataclass
class Faults:
    """A proxy in front of a server that injects faults.

    Attributes:
        address: URL of the proxy.
        plan: called with the method and path of each request; returns the fault to inject, or None. Faults are the keys
            of _ANSWERS, "drop" (close the connection within the request's body), "truncate" (cut the response's body)
            and "flip" (change a byte of it).
        seen: requests received, as (method, path).
    """

    address: str = ""
    plan: Callable[[str, str], str | None] = lambda method, path: None
    seen: list[tuple[str, str]] = field(default_factory=list)


@contextlib.contextmanager
def faulty_s3() -> Iterator[Faults]:
    """Run moto's S3 server behind a proxy that injects faults."""
    from moto.server import ThreadedMotoServer

    moto = ThreadedMotoServer(ip_address="127.0.0.1", port=free_port(), verbose=False)
    moto.start()
    try:
        with faulty(moto.get_host_and_port()[1]) as faults:
            yield faults
    finally:
        moto.stop()


@contextlib.contextmanager
def faulty(port: int) -> Iterator[Faults]:
    """Run a proxy that injects faults in front of the server on a local port."""
    faults = Faults()
    proxy = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Proxy,), {"faults": faults, "upstream": port}))
    proxy.daemon_threads = True
    threading.Thread(target=proxy.serve_forever, daemon=True).start()
    faults.address = f"http://127.0.0.1:{proxy.server_address[1]}"
    try:
        yield faults
    finally:
        proxy.shutdown()
        proxy.server_close()


_ANSWERS = {
    "503": (503, "SlowDown", ""),
    "expired": (400, "ExpiredToken", ""),
    "denied": (403, "AccessDenied", ""),
    **{str(status): (status, "Refused", "") for status in (401, 403, 500)},
    "elsewhere": (400, "AuthorizationHeaderMalformed", "<Region>eu-west-1</Region>"),
}


class _Proxy(BaseHTTPRequestHandler):
    faults: Faults
    upstream: int
    protocol_version = "HTTP/1.1"

    def _serve(self) -> None:
        self.faults.seen.append((self.command, self.path))
        fault = self.faults.plan(self.command, self.path)
        length = int(self.headers.get("Content-Length", 0))
        if fault == "drop":
            self.rfile.read(length // 2)
            self._end()
            return
        body = self.rfile.read(length)
        if fault in _ANSWERS:
            status, code, more = _ANSWERS[fault]
            answer = f"<Error><Code>{code}</Code><Message>injected by the test</Message>{more}</Error>".encode()
            self._reply(status, [("Content-Type", "application/xml")], answer, len(answer))
            return
        connection = http.client.HTTPConnection("127.0.0.1", self.upstream, timeout=30)
        connection.request(self.command, self.path, body, dict(self.headers))
        response = connection.getresponse()
        content = response.read()
        announced = int(response.headers.get("Content-Length") or len(content))
        if fault == "flip" and content:
            content = bytes([content[0] ^ 1]) + content[1:]
        if fault == "truncate":
            content = content[: len(content) // 2]
        skipped = ("content-length", "transfer-encoding", "connection", "server", "date")
        headers = [(k, v) for k, v in response.getheaders() if k.lower() not in skipped]
        self._reply(response.status, headers, content, announced)
        connection.close()

    def _reply(self, status: int, headers: list[tuple[str, str]], content: bytes, announced: int) -> None:
        self.send_response(status)
        for key, value in headers:
            self.send_header(key, value)
        self.send_header("Content-Length", str(announced))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)
            if len(content) < announced:
                self._end()

    def _end(self) -> None:
        self.wfile.flush()
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _serve  # noqa: N815 - the standard library's names

    def log_message(self, *_: object) -> None:
        pass
