"""Canaries in whatever a daemon is asked for, or says unasked: every route, metrics, bundle, its manager and files.

A ref with a query is what somebody typed, and how it is named from then on: it stands where a ref is named, in the
cache and in argv, and nowhere else, not within another text either.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import tarfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest

from weightfs.control.address import socket_path
from weightfs.control.openapi import describe
from weightfs.core.metalink import write_metalink
from weightfs.sources.publish import describe as list_of
from weightfs.testing.daemon import Daemon
from weightfs.testing.mounts import can_mount
from weightfs.testing.origin import Fault, FaultKind, Origin, OriginFile, origin_in_thread
from weightfs.testing.waiting import until

pytestmark = [
    pytest.mark.mount,
    pytest.mark.skipif(not can_mount(), reason="needs /dev/fuse and CAP_SYS_ADMIN"),
]

QUERY = "canary-of-a-query-51d0"
LISTED = "canary-of-a-listed-mirror-9e77"
KEY = "canary-of-a-header-0b2c"
PASSWORD = "canary-of-a-proxy-66fe"
HUB_TOKEN = "hf_canaryOfACredential3a"
LOGIN = "Y2FuYXJ5Om9mLWRvY2tlcg=="  # base64, as docker keeps it
NEVER = (LISTED, KEY, PASSWORD, HUB_TOKEN, LOGIN, "of-docker")
CANARIES = (QUERY, *NEVER)
MODEL = bytes(range(256)) * 8192
HUNG = "/slow.gguf"
NOTICED = 30.0
# The end, since the beginning was fetched for its header when the ref was added.
READ = """
file = cold()
try: os.pread(file, 9, os.fstat(file).st_size - 9)
except OSError: print('no')
"""


class Manager:
    """A service manager with an FD store: what it is told, and what it is given to keep."""

    def __init__(self, place: Path) -> None:
        self.messages: list[bytes] = []
        self.kept: list[int] = []
        self._inbox = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        self._inbox.bind(str(place))
        self._thread = threading.Thread(target=self._listen)
        self._thread.start()

    def _listen(self) -> None:
        while (received := socket.recv_fds(self._inbox, 65_536, 4))[0] != b"end":
            self.messages.append(received[0])
            self.kept += received[1]

    def close(self) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as last:
            last.sendto(b"end", self._inbox.getsockname())
        self._thread.join(NOTICED)
        self._inbox.close()
        for fd in self.kept:
            os.close(fd)


@dataclass
class Stage:
    daemon: Daemon
    home: Origin
    manager: Manager
    refs: tuple[str, ...]
    http: httpx.Client
    log: Path
    answers: dict[str, httpx.Response] = field(default_factory=dict)

    def ask(self, method: str, path: str, **what: Any) -> httpx.Response:
        """A request whose answer is looked through."""
        response = self.http.request(method, path, **what)
        self.answers[f"{method} {path} {what}"] = response
        return response


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    """Everything was fetched, but for one file that is refused and one that hangs, with a reader each."""
    place = tmp_path_factory.mktemp("answers")
    credentials = place / "credentials"
    credentials.mkdir()
    (credentials / "hf-token").write_text(HUB_TOKEN)
    (credentials / "registry-auth").write_text(json.dumps({"auths": {"registry.example": {"auth": LOGIN}}}))
    (place / "config.toml").write_text(
        f'proxy = "http://me:{PASSWORD}@127.0.0.1:9"\nlog-level = "debug"\nworkers = 1\nread-timeout = "1s"\n'
        f'fill = "never"\ncommit-interval = "50ms"\nlog-file = "{place / "log"}"\n'
        '[[header]]\nname = "X-Own"\nvalue-env = "OWN_KEY"\n'
    )
    (place / "listed.gguf").write_bytes(MODEL[1:])
    env = {
        "WEIGHTFS_CONFIG": str(place / "config.toml"),
        "OWN_KEY": KEY,
        "https_proxy": f"http://me:{PASSWORD}@127.0.0.1:9",
        "no_proxy": "127.0.0.1",
        "CREDENTIALS_DIRECTORY": str(credentials),
        "NOTIFY_SOCKET": str(place / "notify"),
        "FDSTORE": "4",
    }
    files = {"/m.gguf": MODEL, "/late.gguf": MODEL[2:], HUNG: MODEL[3:], "/listed.gguf": MODEL[1:]}
    with contextlib.ExitStack() as stack:
        home = stack.enter_context(origin_in_thread(files))
        link = list_of(place / "listed.gguf", [home.url("/none.gguf") + f"?sig={LISTED}"])
        home.files["/listed.gguf.meta4"] = OriginFile(write_metalink(link))
        refs = tuple(f"{home.url(path)}?sig={QUERY}" for path in files)
        manager = Manager(place / "notify")
        stack.callback(manager.close)
        daemon = stack.enter_context(Daemon(tmp_path_factory.mktemp("daemon"), *refs, env=env)).start()
        daemon.complete(refs[0])
        daemon.complete(refs[3])
        home.always["/late.gguf"] = Fault(FaultKind.STATUS, status=403)
        home.always[HUNG] = Fault(FaultKind.STALL_BEFORE_HEAD)
        daemon.run(READ, refs[1])
        transport = httpx.HTTPTransport(uds=str(socket_path(daemon.cache)))
        http = stack.enter_context(
            httpx.Client(transport=transport, base_url="http://weightfs", timeout=NOTICED)
        )
        yield Stage(daemon, home, manager, refs, http, place / "log")


def found_in(place: str, text: str | bytes, canaries: tuple[str, ...] = CANARIES) -> list[tuple[str, str]]:
    data = text if isinstance(text, bytes) else text.encode()
    assert data, f"{place} says nothing"
    return [(place, canary) for canary in canaries if canary.encode() in data]


def without_names(document: Any, refs: tuple[str, ...], key: str = "") -> Any:
    """The same without the refs that stand, whole, where a ref is named."""
    match document:
        case dict():
            return {name: without_names(value, refs, name) for name, value in document.items()}
        case list():
            return [without_names(value, refs, key) for value in document]
        case str() if key in ("ref", "refs") and document in refs:
            return "named"
    return document


# What each route is asked, so that it has something to say. A route that is not here fails the test.
REFUSED, HANGS, LIST, DONE = 1, 2, 3, 0
ROUTES: dict[tuple[str, str], list[dict[str, Any]]] = {
    ("get", "/v1/openapi.json"): [{}],
    ("get", "/v1/health"): [{}],
    ("get", "/v1/status"): [{}],
    ("get", "/v1/inflight"): [{}],
    ("get", "/v1/stacks"): [{}],
    ("get", "/v1/refs"): [{}],
    ("get", "/metrics"): [{}, {"headers": {"Accept": "application/openmetrics-text"}}],
    ("post", "/v1/refs"): [
        {"ref": REFUSED, "refresh": True},
        {"ref": f"http://me:{PASSWORD}@h/x"},
        {"ref": f"http://h/x?{QUERY}%zz"},
    ],
    ("delete", "/v1/refs"): [{"ref": "unknown"}],
    ("post", "/v1/update"): [{"ref": REFUSED}, {"ref": "unknown"}],
    ("post", "/v1/pin"): [{"ref": DONE, "pinned": True}, {"ref": "unknown", "pinned": True}],
    ("post", "/v1/mode"): [{"ref": DONE, "mode": "never"}, {"ref": DONE, "mode": QUERY}],
    ("post", "/v1/pause"): [{"ref": DONE, "paused": False}, {"ref": "unknown", "paused": False}],
    ("post", "/v1/gc"): [{"dry_run": True}],
    ("post", "/v1/reload"): [{}],
    ("post", "/v1/fill"): [{"ref": REFUSED}],
    ("post", "/v1/verify"): [{"refs": [DONE, LIST], "repair": True}],
    ("post", "/v1/repair"): [{"refs": [REFUSED]}],
    ("get", "/v1/headers"): [{"ref": DONE}, {"ref": "unknown"}],
    ("get", "/v1/details"): [{"ref": REFUSED, "fetch": "true"}],
    ("get", "/v1/map"): [{"ref": DONE}, {"ref": REFUSED, "fetch": "true"}],
    ("get", "/v1/chunks"): [{"ref": DONE}],
    ("get", "/v1/jobs/{job}"): [{"job": "none"}],
    ("delete", "/v1/jobs/{job}"): [{"job": "none"}],
}


def test_every_answer_names_refs_and_tells_no_secret(stage: Stage) -> None:
    """Regression: errors had the query of the ref that they are about."""
    assert {(method, path) for path, ways in describe()["paths"].items() for method in ways} == set(ROUTES)
    unknown = stage.home.url("/unknown.gguf") + f"?sig={QUERY}"

    def filled(value: Any) -> Any:
        match value:
            case list():
                return [filled(one) for one in value]
            case int() if not isinstance(value, bool):
                return stage.refs[value]
            case "unknown":
                return unknown
        return value

    jobs = []
    hung = stage.daemon.client(READ, stage.refs[HANGS])
    until(lambda: stage.ask("GET", "/v1/inflight").json()["requests"], "a reader waits")
    (waiting,) = stage.http.get("/v1/inflight").json()["requests"]
    assert waiting["wait"]["chunks"][-1]["mirror"] == stage.home.url(HUNG)
    for (method, path), asked in ROUTES.items():
        for given in asked:
            what = {name: filled(value) for name, value in given.items() if name not in ("headers", "job")}
            place = path.replace("{job}", given.get("job", ""))
            if method == "get":
                answer = stage.ask("GET", place, params=what, headers=given.get("headers", {}))
            else:
                answer = stage.ask(method.upper(), place, content=json.dumps(what))
            if answer.is_success and "json" in answer.headers["content-type"] and "job" in answer.json():
                jobs.append(answer.json()["job"])
    for job in jobs:
        until(partial(_has_ended, stage, job), "a job ends")
    stage.ask("GET", "/v1/status")
    stage.daemon.finish(hung)
    refs = (*stage.refs, unknown)
    leaks = []
    for asked_for, answer in stage.answers.items():
        text = answer.text
        if "json" in answer.headers["content-type"]:
            text = json.dumps(without_names(answer.json(), refs))
        leaks += found_in(f"{answer.status_code} {asked_for}", text)
    assert not leaks
    codes = {answer.status_code for answer in stage.answers.values()}
    assert {200, 400, 502} <= codes, "errors were among them"
    assert any("refuses access" in answer.text for answer in stage.answers.values())


def _has_ended(stage: Stage, job: str) -> bool:
    return bool(stage.ask("GET", f"/v1/jobs/{job}").json()["state"] != "running")


def test_the_bundle_the_logs_and_the_manager_are_told_no_secret(stage: Stage, tmp_path: Path) -> None:
    archive = tmp_path / "bundle.tar.gz"
    made = stage.daemon.cli("debug", "bundle", "-o", str(archive))
    assert made.returncode == 0, made.stderr
    leaks = found_in("what it printed", made.stdout + made.stderr)
    with tarfile.open(archive) as bundle:
        for entry in bundle:
            part = bundle.extractfile(entry)
            assert part is not None
            leaks += found_in(entry.name, part.read())
        assert {"weightfs-debug/status.json", "weightfs-debug/log.txt"} <= set(bundle.getnames())
    leaks += found_in("the log", stage.log.read_bytes())
    leaks += found_in("standard error", stage.daemon.log or "-")
    until(lambda: any(b"STATUS=" in message for message in stage.manager.messages), "the manager is told")
    leaks += found_in("the manager", b"\n".join(stage.manager.messages))
    assert not leaks


def test_what_is_handed_to_the_next_daemon_holds_no_secret(stage: Stage) -> None:
    """The ledger is memory that outlives the process, and the next one may be another version."""
    found = [os.readlink(f"/proc/self/fd/{fd}") for fd in stage.manager.kept]
    (ledger,) = (fd for fd, name in zip(stage.manager.kept, found, strict=True) if "memfd" in name)
    assert not found_in("the ledger", os.pread(ledger, os.fstat(ledger).st_size, 0))


def test_processes_and_files_have_what_was_typed_and_no_more(stage: Stage) -> None:
    status = stage.daemon.status()
    leaks = []
    for pid in (status["pid"], *status["worker_pids"]):
        canaries = NEVER if pid == status["pid"] else CANARIES  # it was given the refs
        proc = Path(f"/proc/{pid}")
        leaks += found_in(f"argv of {pid}", (proc / "cmdline").read_bytes(), canaries)
        leaks += found_in(f"titles of {pid}", b"".join(p.read_bytes() for p in proc.glob("task/*/comm")))
        assert (proc / "environ").read_bytes(), "root may look; see test_processes for others"
    leaks += found_in("mounts", Path("/proc/self/mountinfo").read_bytes())
    runtime = [path for path in stage.daemon.config.parent.rglob("*.json") if path.is_file()]
    assert runtime, "it is registered"
    for path in runtime:
        leaks += found_in(str(path), path.read_bytes())
    for path in stage.daemon.cache.rglob("*"):
        if path.is_file():
            # Refs are recorded, and so are the mirrors of published lists, each as it is.
            leaks += found_in(str(path), path.read_bytes() or b"-", tuple(c for c in NEVER if c != LISTED))
    assert not leaks
