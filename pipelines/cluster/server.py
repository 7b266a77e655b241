"""A KFP server: how it is found, asked within limits of time, and what its errors are called."""

from __future__ import annotations

import contextlib
import io
import json
import os
import warnings
from collections.abc import Iterator
from typing import Any

import kfp
import kfp_server_api
import urllib3

from pipelines.cluster.profile import ClusterProfile
from scop.errors import UserError, first_line

HOST_VARIABLE, TOKEN_VARIABLE = "KF_PIPELINES_ENDPOINT", "KF_PIPELINES_TOKEN"
NAMESPACE_VARIABLE = "KF_PIPELINES_NAMESPACE"
# To connect and to answer; a pair, since the generated client heeds no float.
_SECONDS = (10.0, 30.0)


class UnavailableError(UserError):
    """The server does not answer, or fails: it may be there again in a while."""


class Server:
    """A KFP server.

    Args:
        profile: of the cluster; its host comes before that of KF_PIPELINES_ENDPOINT, and that before what KFP's client
            finds by itself (inside a cluster, or by kubectl's context). A token comes from KF_PIPELINES_TOKEN.

    Attributes:
        client: KFP's own.
        host: its address.
        namespace: of the runs, or None where the server knows none.

    Raises:
        UserError: no server can be found.
    """

    def __init__(self, profile: ClusterProfile) -> None:
        host, said = profile.host or os.environ.get(HOST_VARIABLE), io.StringIO()
        self.host = host or "the address that KFP's client finds"
        self.namespace: str | None = None
        try:
            with self.errors("find the server"), warnings.catch_warnings(), contextlib.redirect_stdout(said):
                warnings.simplefilter("ignore")
                token = os.environ.get(TOKEN_VARIABLE)
                self.client = _Client(host=host, existing_token=token)
        finally:
            if "Failed to load kube config" in said.getvalue():  # it says so, and goes on to localhost
                raise UserError(
                    f"there is no KFP server to submit to; set `host` in the cluster profile, or {HOST_VARIABLE}, or "
                    "point kubectl to the cluster"
                )
        self.host = host or self.client._existing_config.host
        # Of the runs; KFP's own context is what `kfp` commands were told last.
        told = profile.namespace or os.environ.get(NAMESPACE_VARIABLE) or self.client.get_user_namespace()
        self.namespace = told or None

    def check(self) -> None:
        """Ask for something that needs credentials; raises UserError where it is refused."""
        with self.errors("list experiments"), quiet():
            self.client.list_experiments(page_size=1, namespace=self.namespace)

    @contextlib.contextmanager
    def errors(self, doing: str, let_pass: int | None = None) -> Iterator[None]:
        """Within, whatever the client raises is a UserError of one line, but for answers of the status `let_pass`."""
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
                return f"{where} refuses to {doing} (403 {message}); ask for the right to it, {remedy}"
            case 404:
                return f"{where} cannot {doing}: not found (404 {message}); is this address KFP's API, version 2?"
            case status if status and status >= 500:
                return f"{where} fails to {doing} ({status} {message}); try again later, or look at its log"
        return f"{where} refuses to {doing} ({error.status} {message})"


class _Client(kfp.Client):  # type: ignore[misc]
    """KFP's client with limits: by itself it would wait without end for a server that does not answer."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        rest = self._run_api.api_client.rest_client
        ask = rest.request

        def ask_in_time(method: str, url: str, _request_timeout: Any = None, **more: Any) -> Any:
            return ask(method, url, _request_timeout=_request_timeout or _SECONDS, **more)

        rest.request = ask_in_time

    def get_kfp_healthz(self, sleep_duration: int = 0) -> Any:
        """Ask once: KFP's own asks five times, with a traceback and a wait after each."""
        return self._healthz_api.healthz_service_get_healthz(_request_timeout=_SECONDS)


def _message(error: kfp_server_api.ApiException) -> str:
    with contextlib.suppress(ValueError, TypeError, AttributeError):
        said = json.loads(error.body).get("message") or json.loads(error.body).get("error")
        if said:
            return " ".join(str(said).split())[:300]
    return str(error.reason or "no answer")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Within, KFP's client does not print its links and warnings."""
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
