"""The parts of the composition root: detaching, who has the cache, the runtime record, the service manager."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
import trio
import trio.testing

from weightfs.app import notify, registry
from weightfs.app.groups import most_telling
from weightfs.app.interrupts import run_until_signal
from weightfs.app.local import find_operations, open_cache, take_over
from weightfs.app.settings import with_header_origins
from weightfs.cli.progress import SilentProgress
from weightfs.cli.pulling import Pull, pull
from weightfs.config import load
from weightfs.control.operations import ProcessInfo
from weightfs.control.server import serve
from weightfs.core.ref import parse_ref
from weightfs.engine.settings import EngineSettings
from weightfs.errors import CacheBusyError, CacheError, MountError
from weightfs.sources.base import FetchSettings
from weightfs.testing.fake_control import fake_operations

SETTINGS = EngineSettings(workers=0)


# ---- who has the cache


async def test_an_idle_cache_is_worked_on_here(tmp_path: Path) -> None:
    root = tmp_path / "cache"
    async with find_operations(root, "pull", SETTINGS, create=True) as (operations, is_daemon):
        assert not is_daemon
        assert await operations.refs() == []
        assert (await operations.health())["role"] == "pull"
    async with find_operations(root, "ls", SETTINGS) as (operations, is_daemon):
        assert not is_daemon


async def test_a_command_at_work_can_be_asked(tmp_path: Path) -> None:
    async with (
        find_operations(tmp_path / "c", "pull", SETTINGS, create=True, serve_control=True),
        find_operations(tmp_path / "c", "status", SETTINGS) as (operations, is_daemon),
    ):
        assert is_daemon
        status = await operations.status()
        assert status["role"] == "pull"
        assert status["refs"] == []
        assert status["jobs"] == []


async def test_a_busy_cache_whose_owner_does_not_answer(tmp_path: Path) -> None:
    async with open_cache(tmp_path, create=True):
        with pytest.raises(CacheBusyError, match=str(os.getpid())):
            async with find_operations(tmp_path, "ls", SETTINGS, patience=0):
                pass  # pragma: no cover


async def test_a_cache_that_becomes_free_is_taken(
    tmp_path: Path, mock_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries: list[int] = []
    async with trio.open_nursery() as nursery:
        release = trio.Event()
        holding = trio.Event()

        async def hold() -> None:
            async with open_cache(tmp_path, create=True):
                holding.set()
                await release.wait()

        async def pause(_: float) -> None:
            tries.append(1)
            release.set()
            await trio.testing.wait_all_tasks_blocked(0.01)

        nursery.start_soon(hold)
        await holding.wait()
        monkeypatch.setattr("weightfs.app.local.trio.sleep", pause)
        async with find_operations(tmp_path, "ls", SETTINGS) as (_, is_daemon):
            assert not is_daemon
    assert tries


async def test_a_second_mount_is_refused_at_once(tmp_path: Path) -> None:
    async with (
        open_cache(tmp_path, create=True),
        fake_operations(tmp_path) as (_, operations),
        trio.open_nursery() as nursery,
    ):
        await nursery.start(serve, operations, tmp_path)
        with pytest.raises(CacheBusyError, match=r"is mounted at /mnt/models .*weightfs pull"):
            async with take_over(ProcessInfo("mount", tmp_path, tmp_path, 0), SETTINGS):
                pass  # pragma: no cover
        nursery.cancel_scope.cancel()


async def test_the_cache_is_free_again_after_an_error(tmp_path: Path) -> None:
    with pytest.RaisesGroup(ZeroDivisionError, flatten_subgroups=True, allow_unwrapped=True):
        async with find_operations(tmp_path, "x", SETTINGS, create=True, serve_control=True):
            raise ZeroDivisionError
    async with open_cache(tmp_path, create=False) as cache:
        assert cache.was_clean


async def test_no_cache_is_made_to_look_into_it(tmp_path: Path) -> None:
    with pytest.raises(CacheError, match="there is no cache at"):
        async with find_operations(tmp_path / "none", "ls", SETTINGS):
            pass  # pragma: no cover
    assert not (tmp_path / "none").exists()


def test_headers_go_to_the_refs_own_hosts() -> None:
    settings = EngineSettings(fetch=FetchSettings(headers=(("A", "b"),)))
    refs = ["https://h/m.gguf#sha256=" + "0" * 64, "file:///m.gguf", "https://g/m.gguf"]
    assert with_header_origins(settings, refs).fetch.header_origins == (
        "https://g/m.gguf",
        "https://h/m.gguf",
    )
    assert with_header_origins(EngineSettings(), refs) == EngineSettings()


async def test_a_pull_goes_on_by_itself_when_the_one_it_asked_ends(tmp_path: Path) -> None:
    model, cache = tmp_path / "m.gguf", tmp_path / "cache"
    model.write_bytes(b"x" * 1_500_000)
    cache.mkdir()
    ref = parse_ref(str(model))
    config = load({"cache": str(cache)}, env={"HOME": str(tmp_path)})
    work = Pull(click.Context(pull), config, SETTINGS, [ref], False, SilentProgress())
    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            owner = trio.CancelScope()

            async def own(task_status: trio.TaskStatus[None]) -> None:
                with owner:
                    async with fake_operations(cache) as (_, operations):
                        await serve(operations, cache, task_status=task_status)

            await nursery.start(own)
            nursery.start_soon(work.run)
            while not any(work.present.values()):
                await trio.testing.wait_all_tasks_blocked(0.01)
            assert work.present == {str(ref): 500}, "the fake's word: half of its 1000 bytes"
            owner.cancel()
    assert work.present == {str(ref): 1_500_000}
    assert work.done[str(ref)]["complete"]


# ---- groups and signals


def test_the_most_telling_failure() -> None:
    ours, other = MountError("x"), ValueError("y")
    assert most_telling(ExceptionGroup("", [other, ExceptionGroup("", [ours])])) is ours
    assert most_telling(BaseExceptionGroup("", [KeyboardInterrupt(), other])) is other
    assert most_telling(other) is other


async def test_a_signal_ends_the_work_in_order() -> None:
    closed = []

    async def work() -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            await trio.sleep_forever()
        finally:
            closed.append(True)

    with trio.fail_after(10):
        assert await run_until_signal(work) == signal.SIGTERM
    assert closed


async def test_work_that_ends_by_itself() -> None:
    assert await run_until_signal(trio.lowlevel.checkpoint) is None


def test_a_second_signal_ends_it_at_once() -> None:
    code = (
        "import os, signal, trio\nfrom weightfs.app.interrupts import run_until_signal\n"
        "async def work():\n"
        "    try:\n        os.kill(os.getpid(), signal.SIGTERM); await trio.sleep_forever()\n"
        "    finally:\n"
        "        with trio.CancelScope(shield=True):\n"
        "            os.kill(os.getpid(), signal.SIGINT); await trio.sleep_forever()\n"
        "trio.run(lambda: run_until_signal(work, last_resort=lambda: print('detached', flush=True)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 130
    assert done.stdout == "detached\n"


# ---- detaching: forks, so in a process of its own


def detached(tmp_path: Path, work: str, pass_fds: tuple[int, ...] = ()) -> subprocess.CompletedProcess[str]:
    code = (
        "import json, os, sys, time\nfrom pathlib import Path\nfrom weightfs import errors\n"
        "from weightfs.app.detach import detach\n"
        f"def work(ready):\n    {work}\n"
        "try:\n    print(json.dumps(detach(work, Path(sys.argv[1]), lambda: None)))\n"
        "except errors.WeightfsError as error:\n"
        "    print(type(error).__name__, error, file=sys.stderr); sys.exit(error.exit_code)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "logs" / "log")]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, pass_fds=pass_fds)


def test_the_caller_returns_when_the_child_serves(tmp_path: Path) -> None:
    # It would wait for ever, but the end of the pipe that the test holds tells it to go.
    reading, writing = os.pipe()
    with os.fdopen(writing, "wb"):
        work = f"ready(['a word']); os.read({reading}, 1); return 0"
        done = detached(tmp_path, work, pass_fds=(reading,))
    os.close(reading)
    assert (done.returncode, json.loads(done.stdout)) == (0, ["a word"])


def test_what_the_child_prints_goes_to_the_log(tmp_path: Path) -> None:
    detached(
        tmp_path,
        "print('hello'); assert os.getcwd() == '/'; assert sys.stdin.read() == ''; raise errors.MountError('m')",
    )
    assert (tmp_path / "logs" / "log").read_text() == "hello\nweightfs: m\n"


def test_the_childs_error_is_the_callers(tmp_path: Path) -> None:
    done = detached(tmp_path, "raise errors.MountError('the mount point is busy')")
    assert (done.returncode, done.stderr) == (6, "MountError the mount point is busy\n")


def test_a_child_that_fails_by_our_fault(tmp_path: Path) -> None:
    done = detached(tmp_path, "raise ZeroDivisionError")
    assert done.returncode == 7
    assert "ZeroDivisionError" in done.stderr
    assert "Traceback" in (tmp_path / "logs" / "log").read_text()


@pytest.mark.parametrize("kind", ["errors.MountError", "RuntimeError"])
def test_the_log_of_a_child_that_failed_has_no_secret(tmp_path: Path, kind: str) -> None:
    """Regression: its last word went there as it was."""
    detached(tmp_path, f"raise {kind}('https://h/f?sig=hunter2')")
    log = (tmp_path / "logs" / "log").read_text()
    assert "https://h/f?…" in log
    assert "hunter2" not in log


def test_a_child_that_ends_without_a_word(tmp_path: Path) -> None:
    done = detached(tmp_path, "os.kill(os.getpid(), 9)")
    assert done.returncode == 7
    assert "code -9" in done.stderr
    assert str(tmp_path / "logs" / "log") in done.stderr


def test_a_log_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "logs").write_text("a file")
    done = detached(tmp_path, "return 0")
    assert done.returncode == 5
    assert "--log-file" in done.stderr


# ---- the runtime record


def test_a_mount_is_recorded_while_it_lives(tmp_path: Path) -> None:
    env = {"XDG_RUNTIME_DIR": str(tmp_path)}
    mountpoint = Path("/mnt/x")
    assert registry.daemon_of(mountpoint, env) is None
    with registry.registered(mountpoint, tmp_path, env):
        assert registry.daemon_of(mountpoint, env) == os.getpid()
        assert registry.daemon_of(Path("/mnt/y"), env) is None
    assert registry.daemon_of(mountpoint, env) is None
    assert list((tmp_path / "weightfs").iterdir()) == []


def test_a_service_has_a_runtime_directory_of_its_own(tmp_path: Path) -> None:
    env = {"RUNTIME_DIRECTORY": f"{tmp_path}/first:{tmp_path}/second", "XDG_RUNTIME_DIR": "/elsewhere"}
    assert registry.runtime_directory(env) == tmp_path / "first"
    assert registry.runtime_directory({**env, "RUNTIME_DIRECTORY": "here"}) == Path("/elsewhere/weightfs")


def test_a_record_of_somebody_else_is_not_believed_nor_removed(tmp_path: Path) -> None:
    env = {"XDG_RUNTIME_DIR": str(tmp_path)}
    with registry.registered(Path("/mnt/x"), tmp_path, env):
        (file,) = (tmp_path / "weightfs").iterdir()
        file.write_text(json.dumps({"pid": 4_000_000}))
    assert file.exists(), "another mount has taken the place"
    for text in ("", "[]", '{"pid": "1"}', '{"pid": 1}', '{"pid": -5}'):
        file.write_text(text)
        assert registry.daemon_of(Path("/mnt/x"), env) is None
    file.write_text('{"pid": 77}')
    (tmp_path / "weightfs").chmod(0o777)
    assert registry.daemon_of(Path("/mnt/x"), env) is None, "others could have written it"


def test_a_directory_that_cannot_be_had_is_no_error(tmp_path: Path) -> None:
    with registry.registered(Path("/mnt/x"), tmp_path, {"XDG_RUNTIME_DIR": str(tmp_path / "none" / "deep")}):
        pass


def test_waiting_for_an_end() -> None:
    with (
        subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process,
        registry.watching(process.pid) as pidfd,
    ):
        assert pidfd is not None
        assert not registry.wait_for_end(pidfd, 0)
        process.kill()
        assert registry.wait_for_end(pidfd, 20)
    with registry.watching(process.pid) as none, registry.watching(None) as nothing:
        assert (none, nothing) == (None, None)


# ---- the service manager


@contextlib.contextmanager
def manager(address: str) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(address)
        sock.settimeout(10)
        yield sock


@pytest.mark.parametrize("abstract", [False, True])
def test_the_service_manager_is_told(tmp_path: Path, abstract: bool) -> None:
    name = f"weightfs-test-{os.getpid()}"
    address = f"\0{name}" if abstract else str(tmp_path / "notify")
    with manager(address) as sock:
        assert notify.notify("READY=1", {"NOTIFY_SOCKET": f"@{name}" if abstract else address})
        assert sock.recv(100) == b"READY=1"


def test_without_a_service_manager() -> None:
    assert not notify.notify("READY=1", {})
    assert not notify.notify("READY=1", {"NOTIFY_SOCKET": "vsock:2:1"})
    assert not notify.has_manager({"NOTIFY_SOCKET": "vsock:2:1"})
    assert notify.has_manager({"NOTIFY_SOCKET": "@abstract"})
    assert not notify.notify("READY=1", {"NOTIFY_SOCKET": "/no/such/socket"})


def test_the_watchdog() -> None:
    assert notify.watchdog_interval({}) is None
    assert notify.watchdog_interval({"WATCHDOG_USEC": "30000000"}) == 15
    assert notify.watchdog_interval({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "1"}) is None
    assert notify.watchdog_interval({"WATCHDOG_USEC": "often"}) is None
