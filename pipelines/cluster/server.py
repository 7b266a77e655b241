"""Connection to a KFP server, with timeouts and clear errors."""

from __future__ import annotations

import contextlib
import io
import json
import warnings
from collections.abc import Iterator
from typing import Any

import kfp
import kfp_server_api
import urllib3

from pipelines.cluster.profile import ClusterProfile
from scop.environment import ClusterEnvironment, name_of
from scop.errors import UserError, first_line

HOST_VARIABLE, TOKEN_VARIABLE = (name_of(ClusterEnvironment, field) for field in ("host", "token"))
_TIMEOUT = (10.0, 30.0)
"""Timeouts for connecting and for the response, in seconds. The generated client ignores a single number."""


class UnavailableError(UserError):
    """The server does not answer or fails; it may recover."""


class Server:
    """A KFP server.

    Args:
        profile: cluster profile; its host and namespace take precedence.
        access: host, namespace and token set by the user. Without a host, KFP's client finds one inside a cluster or
            from kubectl's context.

    Attributes:
        client: KFP's client.
        host: URL of the server.
        namespace: namespace of the runs, or None if the server has none.

    Raises:
        UserError: no server can be found.
    """

    def __init__(self, profile: ClusterProfile, access: ClusterEnvironment) -> None:
        host, printed = profile.host or access.host, io.StringIO()
        self.host = host or "the address that KFP's client finds"
        self.namespace: str | None = None
        try:
            with self.errors("find the server"), warnings.catch_warnings(), contextlib.redirect_stdout(printed):
                warnings.simplefilter("ignore")
                self.client = _Client(host=host, existing_token=access.token)
        finally:
            if "Failed to load kube config" in printed.getvalue():  # KFP's client then tries localhost
                raise UserError(
                    f"no KFP server is known; set `host` in the cluster profile, or {HOST_VARIABLE}, or select the "
                    "cluster in kubectl's context"
                )
        self.host = host or self.client._existing_config.host
        # KFP's client remembers the namespace that the last `kfp` command used.
        self.namespace = profile.namespace or access.namespace or self.client.get_user_namespace() or None

    def check(self) -> None:
        """Send a request that needs credentials; raise UserError if it is refused."""
        with self.errors("list experiments"), quiet():
            self.client.list_experiments(page_size=1, namespace=self.namespace)

    @contextlib.contextmanager
    def errors(self, doing: str, let_pass: int | None = None) -> Iterator[None]:
        """Convert exceptions of the client to a UserError of one line, except responses with the status `let_pass`."""
        try:
            yield
        except kfp_server_api.ApiException as error:
            if let_pass is not None and error.status == let_pass:
                raise
            kind = UnavailableError if (error.status or 500) >= 500 else UserError
            raise kind(self._explain(error, doing)) from error
        except (urllib3.exceptions.HTTPError, OSError, TimeoutError) as error:
            reason = getattr(error, "reason", None) or error
            raise UnavailableError(
                f"KFP at {self.host} cannot be reached ({first_line(reason)}); check `host` in the cluster profile or "
                f"{HOST_VARIABLE}, and the network (kubectl port-forward -n kubeflow svc/ml-pipeline-ui 8080:80)"
            ) from error

    def _explain(self, error: kfp_server_api.ApiException, doing: str) -> str:
        where = f"KFP at {self.host}"
        message = _message(error)
        match error.status:
            case 401:
                return f"{where} refuses the credentials (401 {message}); set {TOKEN_VARIABLE}, or log in again"
            case 403:
                namespace = self.namespace
                remedy = f"in namespace {namespace!r}" if namespace else "set `namespace` in the cluster profile"
                return f"{where} refuses to {doing} (403 {message}); ask for permission, {remedy}"
            case 404:
                return (
                    f"{where} cannot {doing}: not found (404 {message}); is this the address of KFP's API, version 2?"
                )
            case status if status and status >= 500:
                return f"{where} fails to {doing} ({status} {message}); try again later, or look at its log"
        return f"{where} refuses to {doing} ({error.status} {message})"


class _Client(kfp.Client):  # type: ignore[misc]
    """KFP's client with timeouts: without them it waits forever for a server that does not answer."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        rest = self._run_api.api_client.rest_client
        send = rest.request

        def send_with_timeout(method: str, url: str, _request_timeout: Any = None, **more: Any) -> Any:
            return send(method, url, _request_timeout=_request_timeout or _TIMEOUT, **more)

        rest.request = send_with_timeout

    def get_kfp_healthz(self, sleep_duration: int = 0) -> Any:
        """Send one request: KFP's client sends five, with a traceback and a pause after each."""
        return self._healthz_api.healthz_service_get_healthz(_request_timeout=_TIMEOUT)


def _message(error: kfp_server_api.ApiException) -> str:
    with contextlib.suppress(ValueError, TypeError, AttributeError):
        message = json.loads(error.body).get("message") or json.loads(error.body).get("error")
        if message:
            return " ".join(str(message).split())[:300]
    return str(error.reason or "no answer")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Suppress the links and warnings that KFP's client prints."""
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
