"""Client and server over a real Unix socket; only the engine behind them is made up."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import trio
import trio.testing

from weightfs import errors
from weightfs.control import listener, server
from weightfs.control.address import socket_path, usable_address
from weightfs.control.client import ControlClient, DaemonGoneError, find_daemon
from weightfs.control.server import MAX_BODY, serve
from weightfs.errors import (
    DaemonError,
    FailureKind,
    ReadError,
    RefError,
    SourceError,
    UsageError,
    WeightfsError,
)
from weightfs.testing.fake_control import FakeControlEngine, FakeReport, fake_operations

REF = "https://models.example.com/dir/m.gguf"
BOUND = 20.0  # seconds; a hang becomes a failure


@dataclass
class Daemon:
    engine: FakeControlEngine
    cache: Path
    scope: trio.CancelScope
    ended: trio.Event


@contextlib.asynccontextmanager
async def daemon(cache: Path) -> AsyncIterator[Daemon]:
    cache.mkdir(parents=True, exist_ok=True)
    with trio.fail_after(BOUND):
        async with fake_operations(cache) as (engine, operations), trio.open_nursery() as nursery:
            one = Daemon(engine, cache, trio.CancelScope(), trio.Event())

            async def run(task_status: trio.TaskStatus[None]) -> None:
                with one.scope:
                    await serve(operations, cache, task_status=task_status)
                one.ended.set()

            await nursery.start(run)
            yield one
            one.scope.cancel()


@contextlib.asynccontextmanager
async def connected(cache: Path) -> AsyncIterator[tuple[Daemon, ControlClient]]:
    async with daemon(cache) as one, find_daemon(cache) as client:
        assert client is not None
        yield one, client


@contextlib.asynccontextmanager
async def raw_client(cache: Path) -> AsyncIterator[httpx.AsyncClient]:
    with usable_address(socket_path(cache)) as address:
        transport = httpx.AsyncHTTPTransport(uds=address)
        async with httpx.AsyncClient(transport=transport, base_url="http://weightfs", timeout=BOUND) as http:
            yield http


async def test_add_list_remove(tmp_path: Path) -> None:
    async with connected(tmp_path) as (_, client):
        added = await client.add(REF)
        assert added["ref"] == REF
        assert added["size_bytes"] == 1000
        assert added["trust"] == "provisional"
        assert added["blobs"][0]["path"] == "models/https/models.example.com/dir/m.gguf"
        assert [ref["ref"] for ref in await client.refs()] == [REF]
        assert await client.remove(REF) == {"ref": REF, "freed_bytes": 1000}
        assert await client.refs() == []


async def test_a_ref_is_named_in_any_spelling(tmp_path: Path) -> None:
    async with connected(tmp_path) as (_, client):
        await client.add(REF)
        assert (await client.remove("HTTPS://Models.Example.com:443/dir/m.gguf"))["ref"] == REF


async def test_refresh_is_passed_on(tmp_path: Path) -> None:
    async with connected(tmp_path) as (one, client):
        await client.add(REF)
        await client.add(REF, refresh=True)
        assert one.engine.refreshed == [False, True]


@pytest.mark.parametrize("outcome", ["unchanged", "updated", "rolled back"])
async def test_a_tag_is_followed(tmp_path: Path, outcome: str) -> None:
    async with connected(tmp_path) as (one, client):
        await client.add(REF)
        one.engine.outcome = outcome
        assert await client.update(REF) == {
            "ref": REF,
            "old_revision": "1",
            "new_revision": "2",
            "outcome": outcome,
            "rolled_back": outcome == "rolled back",
        }
        with pytest.raises(RefError, match="weightfs ls"):
            await client.update("https://models.example.com/other.gguf")


async def test_a_ref_is_pinned_and_unpinned(tmp_path: Path) -> None:
    async with connected(tmp_path) as (_, client):
        assert (await client.add(REF))["pinned"] is False
        assert (await client.pin(REF, pinned=True))["pinned"] is True
        assert (await client.refs())[0]["pinned"] is True
        assert (await client.pin(REF, pinned=False))["pinned"] is False
        with pytest.raises(RefError, match="weightfs ls"):
            await client.pin("https://models.example.com/other.gguf", pinned=True)


async def test_an_ollama_ref_is_named_in_any_case(tmp_path: Path) -> None:
    async with connected(tmp_path) as (_, client):
        await client.add("ollama://aya:8b")
        for name in ("ollama://Aya:8b", "OLLAMA://registry.ollama.ai/Library/AYA:8B"):
            assert (await client.pin(name, pinned=True))["ref"] == "ollama://aya:8b"
            assert (await client.update(name))["ref"] == "ollama://aya:8b"
        assert (await client.remove("ollama://Aya:8B"))["ref"] == "ollama://aya:8b"


async def test_an_origin_that_never_says_is_given_up(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    async with fake_operations(tmp_path) as (engine, operations):
        await operations.add(REF)
        engine.forget_to_answer = True
        for ask in (operations.add(REF, refresh=True), operations.update(REF)):
            with pytest.raises(SourceError, match="did not say within 300 s"):
                await ask


async def test_status_says_who_and_what(tmp_path: Path) -> None:
    async with connected(tmp_path) as (_, client):
        await client.add(REF)
        status = await client.status()
        assert status["pid"] == os.getpid()
        assert status["mountpoint"] == "/mnt/models"
        assert status["uptime"] is None, "JSON has no infinity"
        assert status["refs"][0]["size_bytes"] == 1000
        assert status["refs"][0]["files"] == []
        assert client.process["role"] == "mount"


async def test_no_query_leaves_the_daemon_but_in_the_ref(tmp_path: Path) -> None:
    ref = "https://models.example.com/m.gguf?token=hunter2"
    async with connected(tmp_path) as (_, client):
        added = await client.add(ref)
        assert added["ref"] == ref, "the ref is what `rm` must be given"
        assert "hunter2" not in json.dumps(added["blobs"])


@pytest.mark.parametrize(
    "error",
    [
        SourceError("no such file", kind=FailureKind.NOT_FOUND),
        errors.SignatureError("bad signature"),
        errors.ChunkListError("bad list"),
        errors.NoSpaceError("full"),
        errors.CacheCorruptError("broken"),
        RefError("bad ref"),
    ],
    ids=lambda error: type(error).__name__,
)
async def test_an_error_of_the_daemon_is_raised_in_the_command(tmp_path: Path, error: WeightfsError) -> None:
    async with connected(tmp_path) as (one, client):
        one.engine.error = error
        with pytest.raises(type(error), match=str(error)) as caught:
            await client.add(REF)
        assert caught.value.exit_code == error.exit_code
        if isinstance(caught.value, SourceError):
            assert caught.value.kind is FailureKind.NOT_FOUND
        await client.health()


async def test_an_unknown_ref_is_named(tmp_path: Path) -> None:
    async with connected(tmp_path) as (_, client):
        with pytest.raises(RefError, match=r"models\.example\.com.*weightfs ls"):
            await client.remove(REF)
        with pytest.raises(RefError, match="ftp"):
            await client.add("ftp://host/m.gguf")


async def test_a_fault_of_ours_ends_one_answer_and_not_the_daemon(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with connected(tmp_path) as (one, client):
        one.engine.error = ZeroDivisionError("oops")
        with pytest.raises(DaemonError, match=r"ZeroDivisionError.*log"):
            await client.status()
        assert "oops" in caplog.text
        await client.status()


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "says"),
    [
        ("POST", "/v1/refs", b"{", 400, "not JSON"),
        ("POST", "/v1/refs", b"[]", 400, "object"),
        ("POST", "/v1/refs", b"{}", 400, "'ref'"),
        ("POST", "/v1/refs", b'{"ref": 7}', 400, "'ref'"),
        ("POST", "/v1/refs", b'{"ref": "https://h/m", "refresh": "yes"}', 400, "'refresh'"),
        ("POST", "/v1/refs", b"[" * 60_000, 400, "not JSON"),
        ("POST", "/v1/refs", b"x" * (MAX_BODY + 1), 400, "fewer"),
        ("POST", "/v1/update", b"{}", 400, "'ref'"),
        ("POST", "/v1/pin", b'{"ref": "https://h/m"}', 400, "'pinned'"),
        ("POST", "/v1/pin", b'{"ref": "https://h/m", "pinned": "yes"}', 400, "'pinned'"),
        ("POST", "/v1/verify", b'{"refs": "all"}', 400, "'refs'"),
        ("POST", "/v1/verify", b'{"repair": 1}', 400, "'repair'"),
        ("GET", "/v1/jobs/nope", b"", 400, "no job"),
        ("GET", "/v1/jobs/nope?wait=soon", b"", 400, "'wait'"),
        ("GET", "/v1/headers?wait=1", b"", 400, "'ref'"),
        ("GET", "/v1/headers?ref=https://h/m&wait=soon", b"", 400, "'wait'"),
        ("GET", "/v1/details", b"", 400, "'ref'"),
        ("GET", "/v1/details?ref=https://h/m&fetch=1", b"", 400, "'fetch'"),
        ("GET", "/v1/map?by=layer", b"", 400, "'ref'"),
        ("GET", "/v1/map?ref=https://h/m&by=colour", b"", 400, "'by'"),
        ("GET", "/v1/map?ref=https://h/m", b"", 400, "not in the cache"),
        ("GET", "/v2/status", b"", 404, "/v2/status"),
        ("PUT", "/v1/refs", b"", 404, "PUT"),
    ],
)
async def test_bad_requests(
    tmp_path: Path, method: str, path: str, body: bytes, status: int, says: str
) -> None:
    async with daemon(tmp_path) as one, raw_client(one.cache) as http:
        answer = await http.request(method, path, content=body)
        assert answer.status_code == status
        assert says in answer.json()["error"]
        assert answer.json()["exit_code"] == UsageError.exit_code


async def test_what_is_known_of_a_ref_and_where_its_tensors_lie(tmp_path: Path) -> None:
    ref = "https://models.example.com/m.gguf?a=b&c=ü#sha256=" + "0" * 64
    async with connected(tmp_path) as (one, client):
        name = (await client.add(ref))["ref"]
        for fetch in (False, True):
            (model,) = (await client.details(ref, fetch=fetch))["models"]
            assert model == {"name": "m.gguf", "format": "gguf", "tensor_count": int(fetch), "files": []}
            document = await client.tensor_map(ref, layers=fetch, fetch=fetch)
            by = "layer" if fetch else "tensor"
            files = [{"path": "models/m", "problem": "https://h/m?… is gone"}]
            assert document == {"ref": name, "by": by, "files": files, "fetch": fetch}
        one.engine.error = KeyError(name)
        with pytest.raises(RefError, match="removed meanwhile"):
            await client.details(ref)


async def test_headers_are_waited_for(tmp_path: Path) -> None:
    async with connected(tmp_path) as (one, client):
        await client.add(REF)
        assert await client.headers(REF, wait=0) == {"ref": REF, "ready": False}
        one.engine.gate.set()
        assert await client.headers(REF, wait=BOUND) == {"ref": REF, "ready": True}


async def test_headers_that_do_not_come_are_not_waited_for_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    monkeypatch.setattr(FakeControlEngine, "details", lambda *_, **__: trio.sleep_forever())
    async with fake_operations(tmp_path) as (_, operations):
        await operations.add(REF)
        with pytest.raises(SourceError, match="try again") as caught:
            await operations.details(REF)
        assert caught.value.kind is FailureKind.TIMEOUT


async def test_a_time_that_is_no_number_is_the_askers_fault(tmp_path: Path) -> None:
    """Regression: of a job that runs, `wait=nan` was a fault of the daemon (500)."""
    async with connected(tmp_path) as (one, client), raw_client(one.cache) as http:
        await client.add(REF)
        job = (await client.start_fill(REF))["job"]
        for path in (f"/v1/jobs/{job}", "/v1/headers"):
            answer = await http.get(path, params={"wait": "nan", "ref": REF})
            assert answer.status_code == 400
            assert "'wait'" in answer.json()["error"]
        one.engine.gate.set()


async def test_a_fill_is_a_job(tmp_path: Path) -> None:
    async with connected(tmp_path) as (one, client):
        await client.add(REF)
        job = await client.start_fill(REF)
        job = await client.job(job["job"], wait=0)
        assert job["state"] == "running"
        assert job["progress"] == {"size_bytes": 1000, "present_bytes": 500}
        one.engine.gate.set()
        job = await client.job(job["job"], wait=BOUND)
        assert job["state"] == "done"
        assert job["result"]["trust"] == "verified"
        assert job["result"]["complete"]


async def test_a_job_that_fails_says_how(tmp_path: Path) -> None:
    async with connected(tmp_path) as (one, client):
        await client.add(REF)
        one.engine.error = ReadError("chunk 3 does not match", kind=FailureKind.MISMATCH)
        one.engine.gate.set()
        job = await client.job((await client.start_fill(REF))["job"], wait=BOUND)
        assert job["state"] == "failed"
        assert job["error"]["failure"] == "mismatch"
        assert job["error"]["exit_code"] == errors.IntegrityError.exit_code


async def test_a_job_that_fails_by_our_fault(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with connected(tmp_path) as (one, client):
        await client.add(REF)
        one.engine.error = KeyError("oops")
        job = await client.job((await client.start_fill(REF))["job"], wait=BOUND)
        assert job["error"]["kind"] == "DaemonError"
        assert "oops" in caplog.text


async def test_a_job_can_be_cancelled(tmp_path: Path) -> None:
    async with connected(tmp_path) as (_, client):
        await client.add(REF)
        job = await client.start_fill(REF)
        await client.cancel_job(job["job"])
        assert (await client.job(job["job"], wait=BOUND))["state"] == "cancelled"


async def test_verify_reports_every_ref(tmp_path: Path) -> None:
    async with connected(tmp_path) as (one, client):
        other = "https://models.example.com/other.gguf"
        await client.add(REF)
        await client.add(other)
        one.engine.report = FakeReport(bad=(("models/m.gguf", 3),))
        job = await client.start_verify([], repair=False)
        job = await client.job(job["job"], wait=0)
        assert job["progress"] == {"ref": REF, "done": 1, "total": 2}
        one.engine.gate.set()
        job = await client.job(job["job"], wait=BOUND)
        assert not job["result"]["ok"]
        assert [report["ref"] for report in job["result"]["reports"]] == [REF, other]
        assert job["result"]["reports"][0]["bad"] == [["models/m.gguf", 3]]


async def test_jobs_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("weightfs.control.jobs.MAX_RUNNING", 2)
    monkeypatch.setattr("weightfs.control.jobs.MAX_KEPT", 1)
    async with connected(tmp_path) as (one, client):
        await client.add(REF)
        jobs = [await client.start_fill(REF) for _ in range(2)]
        with pytest.raises(DaemonError, match="2 jobs"):
            await client.start_fill(REF)
        one.engine.gate.set()
        last = ""
        for job in jobs:
            with contextlib.suppress(UsageError):
                last = (await client.job(job["job"], wait=BOUND))["job"]
        states = []
        for job in jobs:
            try:
                states.append((await client.job(job["job"], wait=0))["state"])
            except UsageError:
                states.append("forgotten")
        assert sorted(states) == ["done", "forgotten"]
        assert last


async def test_nobody_there(tmp_path: Path) -> None:
    async with find_daemon(tmp_path) as none:
        assert none is None
    async with find_daemon(tmp_path / "no" / ("directory" * 20)) as none:
        assert none is None


async def test_a_leftover_socket_is_nobody_and_is_replaced(tmp_path: Path) -> None:
    left = socket.socket(socket.AF_UNIX)
    left.bind(str(socket_path(tmp_path)))
    left.close()
    async with find_daemon(tmp_path) as none:
        assert none is None
    async with connected(tmp_path) as (_, client):
        await client.health()


async def test_a_silent_daemon_is_told(tmp_path: Path, autojump_clock: trio.testing.MockClock) -> None:
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(str(socket_path(tmp_path)))
        silent.listen()
        with pytest.raises(DaemonError, match="does not answer"):
            async with find_daemon(tmp_path):
                pass  # pragma: no cover


async def test_a_daemon_that_ends_amid_an_answer(tmp_path: Path) -> None:
    async with connected(tmp_path) as (one, client):
        await client.add(REF)
        job = await client.start_fill(REF)
        async with trio.open_nursery() as nursery:

            async def follow() -> None:
                with pytest.raises(DaemonGoneError, match="run the command again"):
                    await client.job(job["job"], wait=BOUND)

            nursery.start_soon(follow)
            await trio.testing.wait_all_tasks_blocked(0.05)
            one.scope.cancel()


async def test_only_the_owner_may_open_it_and_it_goes_at_the_end(tmp_path: Path) -> None:
    async with daemon(tmp_path) as one:
        path = socket_path(one.cache)
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        one.scope.cancel()
        await one.ended.wait()
        assert not path.exists()


async def test_a_path_longer_than_a_socket_address(tmp_path: Path) -> None:
    cache = tmp_path / ("c" * 120)
    async with connected(cache) as (_, client):
        assert (await client.health())["cache"] == str(cache)
    assert not socket_path(cache).exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
async def test_another_user_is_refused_even_if_the_modes_let_him(caplog: pytest.LogCaptureFixture) -> None:
    script = (
        "import os, socket, sys\nos.setgid(65534); os.setuid(65534)\n"
        "s = socket.socket(socket.AF_UNIX); s.settimeout(10); s.connect(sys.argv[1])\n"
        "try:\n    s.sendall(b'GET /v1/status HTTP/1.1\\r\\nHost: w\\r\\n\\r\\n'); print(len(s.recv(1)))\n"
        "except (ConnectionResetError, BrokenPipeError):\n    print(0)\n"
    )
    with tempfile.TemporaryDirectory() as cache:  # tmp_path is closed to others
        async with daemon(Path(cache)) as one:
            path = socket_path(one.cache)
            path.chmod(0o666)
            Path(cache).chmod(0o755)
            result = await trio.run_process([sys.executable, "-c", script, str(path)], capture_stdout=True)
        assert result.stdout == b"0\n"
        assert "65534" in caplog.text


async def test_too_many_connections_are_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listener, "MAX_CONNECTIONS", 2)
    monkeypatch.setattr(server, "IDLE", 0.01)
    async with daemon(tmp_path) as one, contextlib.AsyncExitStack() as stack:

        async def connect() -> trio.SocketStream:
            return await stack.enter_async_context(await trio.open_unix_socket(str(socket_path(one.cache))))

        first = [await connect() for _ in range(2)]
        assert await (await connect()).receive_some(1) == b""
        await first[0].aclose()
        while True:  # until the daemon has seen it go
            stream = await connect()
            with contextlib.suppress(trio.BrokenResourceError):
                await stream.send_all(b"GET /v1/health HTTP/1.1\r\nHost: w\r\n\r\n")
                if await stream.receive_some(12) == b"HTTP/1.1 200":
                    break


async def test_it_ends_although_a_client_does_not_read(tmp_path: Path) -> None:
    async with daemon(tmp_path) as one:
        one.engine.padding = "x" * (8 * 1024 * 1024)
        async with await trio.open_unix_socket(str(socket_path(one.cache))) as stream:
            await stream.send_all(b"GET /v1/status HTTP/1.1\r\nHost: w\r\n\r\n")
            assert await stream.receive_some(1) == b"H"
            one.scope.cancel()
            await one.ended.wait()


async def test_it_is_quiet(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    async with connected(tmp_path) as (_, client):
        await client.health()
    out, err = capfd.readouterr()
    assert (out, err) == ("", "")
    assert "Running on" not in caplog.text


async def test_a_socket_that_cannot_be_made(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    async with fake_operations(file) as (_, operations):
        with pytest.raises(DaemonError, match="cannot be made"):
            await serve(operations, file)


def test_the_server_needs_no_network_library_of_sources() -> None:
    code = "import sys, weightfs.control.server; sys.exit('lmdb' in sys.modules or 'pyfuse3' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0
