"""The description of the control socket is complete and true: schemathesis asks a real daemon all that it says.

`make soak` asks more often.
"""

from __future__ import annotations

import copy
import os
import socket
from collections.abc import Iterator
from http import HTTPStatus
from pathlib import Path
from typing import Any

import pytest
import requests
import schemathesis
import urllib3
from hypothesis import HealthCheck, given, settings
from requests.adapters import HTTPAdapter
from schemathesis import Case, GenerationMode
from schemathesis.checks import CHECKS, load_all_checks

from weightfs.control.address import socket_path
from weightfs.control.metrics import Scraper
from weightfs.control.openapi import describe, schema_of
from weightfs.control.server import make_app
from weightfs.core.ref import parse_ref
from weightfs.testing.daemon import Daemon

SOAK = os.environ.get("WEIGHTFS_SOAK") == "1"
EXAMPLES = 1000 if SOAK else 6
BASE = "http://weightfs"


class SocketConnection(urllib3.connection.HTTPConnection):
    """To the Unix socket that `path` names."""

    path = ""

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(60)
        self.sock.connect(self.path)


class SocketAdapter(HTTPAdapter):
    """Sends everything to one Unix socket."""

    def __init__(self, path: Path) -> None:
        self._connection = type("Connection", (SocketConnection,), {"path": str(path)})
        super().__init__()

    def get_connection_with_tls_context(self, *_: object, **__: object) -> Any:
        pool = urllib3.HTTPConnectionPool("weightfs")
        pool.ConnectionCls = self._connection
        return pool


@pytest.fixture(scope="module")
def origin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("origin") / "m.gguf"
    file.write_bytes(bytes(range(256)) * 4 * 1024 * 3)
    return file


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory, origin: Path) -> Iterator[Daemon]:
    with Daemon(tmp_path_factory.mktemp("daemon"), f"file://{origin}", options=("--workers", "0")) as one:
        yield one.start()
        assert one.stop() == 0


@pytest.fixture(scope="module")
def session(daemon: Daemon) -> Iterator[requests.Session]:
    with requests.Session() as one:
        one.trust_env = False
        one.mount(BASE, SocketAdapter(socket_path(daemon.cache)))
        one.headers["Connection"] = "close"
        yield one


def described(ref: str) -> dict[str, Any]:
    """The description, in which a ref is often the one that is known."""
    document: dict[str, Any] = copy.deepcopy(describe())
    known = {"anyOf": [{"const": ref}, {"type": "string", "minLength": 1}]}
    for path in document["paths"].values():
        for operation in path.values():
            for parameter in operation.get("parameters", ()):
                if parameter["name"] == "ref":
                    parameter["schema"] = known
            if body := operation.get("requestBody"):
                properties = body["content"]["application/json"]["schema"]["properties"]
                if "ref" in properties:
                    properties["ref"] = known
    return document


load_all_checks()
# A text is a ref or a job by more than a schema can say, so what it allows may be refused (400); and an origin that is
# out of reach is 502. A fault of our own is 500, and looked for below.
EXCLUDED: list[Any] = [CHECKS.get_one(name) for name in ("positive_data_acceptance", "not_a_server_error")]
# What takes nothing, or a path alone, cannot be asked wrongly: another path is another operation.
OPERATIONS = [
    pytest.param(path, method, mode, id=f"{method} {path} {mode.value}")
    for path, methods in describe()["paths"].items()
    for method, operation in methods.items()
    for mode in GenerationMode
    if mode is GenerationMode.POSITIVE
    or "requestBody" in operation
    or any(one["in"] == "query" for one in operation.get("parameters", ()))
]


@pytest.mark.parametrize(("path", "method", "mode"), OPERATIONS)
def test_everything_is_as_described(
    path: str, method: str, mode: GenerationMode, session: requests.Session, origin: Path
) -> None:
    ref = f"file://{origin}"
    operation = schemathesis.openapi.from_dict(described(str(parse_ref(ref))))[path][method]

    @settings(
        max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), derandomize=not SOAK
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def ask(case: Case[Any]) -> None:
        added = session.post(f"{BASE}/v1/refs", json={"ref": ref}, timeout=60)
        assert added.status_code == HTTPStatus.OK, "a case before may have removed it"
        answer = case.call(session=session, base_url=BASE, timeout=60)
        assert answer.status_code != HTTPStatus.INTERNAL_SERVER_ERROR, answer.text
        case.validate_response(answer, excluded_checks=EXCLUDED)

    ask()


def test_every_route_is_described_and_nothing_else() -> None:
    nobody: Any = None  # nothing is asked
    app = make_app(nobody, Scraper(nobody, None))
    routes = {
        (route.path, method.lower())  # type: ignore[attr-defined]
        for route in app.routes
        for method in route.methods  # type: ignore[attr-defined]
        if method != "HEAD"
    }
    described = {(path, method) for path, methods in describe()["paths"].items() for method in methods}
    assert routes == described


def test_a_daemon_describes_itself(session: requests.Session) -> None:
    answer = session.get(f"{BASE}/v1/openapi.json", timeout=60)
    assert answer.json() == describe()


def test_a_method_that_a_path_does_not_have_is_named_with_those_it_has(session: requests.Session) -> None:
    """Regression: it was 404, as if there were no such path."""
    answer = session.put(f"{BASE}/v1/refs", timeout=60)
    assert answer.status_code == HTTPStatus.METHOD_NOT_ALLOWED
    assert {"GET", "POST", "DELETE"} <= set(answer.headers["Allow"].split(", "))
    assert "PUT" in answer.json()["error"]


def test_what_has_no_schema_is_refused() -> None:
    with pytest.raises(TypeError, match="no schema"):
        schema_of(complex)
