"""The supervisor with children of all kinds, and the FD store as a service manager hands it over: real processes."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from weightfs.app import fdstore, supervisor
from weightfs.app.fdstore import FUSE, LEDGER, FdStore
from weightfs.testing.waiting import until

# In the supervisor's process: run(CHILD, argv), where `say` notifies, and a line in `log` is one life.
PARENT = """
import sys
from pathlib import Path
from weightfs.app import supervisor
supervisor.PAUSE = 0.01
supervisor.STOP_SECONDS = float(sys.argv[3])
started = lambda: print("started", flush=True)
one = supervisor.Supervisor([sys.executable, "-c", sys.argv[1], sys.argv[2]], Path("/"), on_started=started)
sys.exit(one.run())
"""
CHILD = """
import os, signal, sys, time
from pathlib import Path
from weightfs.app.fdstore import FdStore
from weightfs.app.notify import notify
log = Path(sys.argv[1])
life = len(log.read_text().splitlines()) if log.exists() else 0
store = FdStore.from_environment(os.environ)
inherited = store.inherited()
def line(text):
    with log.open("a") as file: file.write(text + "\\n")
"""


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "log"


@contextmanager
def supervised(log: Path, code: str, *, stop_seconds: float = 20.0) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-c", PARENT, CHILD + code, str(log), str(stop_seconds)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        try:
            yield process
        finally:
            process.kill()


def end(process: subprocess.Popen[str]) -> tuple[int, str]:
    _, err = process.communicate(timeout=30)
    return process.returncode, err


def test_descriptors_go_from_one_child_to_the_next(log: Path) -> None:
    code = """
if inherited:
    line(os.pread(inherited[1], 9, 0).decode() + " " + str(os.get_inheritable(inherited[0])))
    sys.exit(0) if life > 1 else os.kill(os.getpid(), signal.SIGKILL)
memory = os.memfd_create("x"); os.write(memory, b"kept")
assert store.available and store.keep(os.open("/dev/null", os.O_RDONLY), memory)
notify("READY=1"); notify("X_WEIGHTFS_STARTED=1")
line("first")
os.kill(os.getpid(), signal.SIGKILL)
"""
    with supervised(log, code) as process:
        returned, err = end(process)
    assert (returned, log.read_text()) == (0, "first\nkept False\nkept False\n")
    assert "the daemon ended (exit code 137), and is started again; what is open waits for it" in err


def test_who_drops_them_leaves_nothing(log: Path) -> None:
    code = """
line(str(inherited))
memory = os.memfd_create("x")
if life: sys.exit(0)
store.keep(memory, memory); store.drop(); notify("READY=1"); sys.exit(75)
"""
    with supervised(log, code) as process:
        returned, err = end(process)
    assert (returned, err, log.read_text()) == (0, "", "None\nNone\n")


def test_it_gives_up_on_what_never_starts(log: Path) -> None:
    with supervised(log, "line('begun'); sys.exit(7)") as process:
        returned, err = end(process)
    assert (returned, log.read_text().count("begun")) == (7, supervisor.FAILED_STARTS)
    assert "the daemon failed to start 5 times in a row; the last exit code was 7" in err


@pytest.mark.parametrize("code", sorted(supervisor.FINAL))
def test_what_does_not_mend_is_not_tried_again(log: Path, code: int) -> None:
    with supervised(log, f"line('begun'); sys.exit({code})") as process:
        assert end(process)[0] == code
    assert log.read_text() == "begun\n"


SERVES = """
def leave(*_): line("leave"); os._exit(75)
def stop(*_): line("stop"); os._exit(0)
signal.signal(signal.SIGUSR1, leave); signal.signal(signal.SIGTERM, stop)
notify("READY=1"); line(f"serves {os.getpgrp() == os.getpid()}"); notify("X_WEIGHTFS_STARTED=1")
while True: time.sleep(60)
"""


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signals_reach_the_child(log: Path, how: int) -> None:
    with supervised(log, SERVES) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "started\n"
        process.send_signal(signal.SIGUSR1)
        until(lambda: log.exists() and log.read_text().count("serves") == 2, "the next one")
        process.send_signal(how)
        returned, err = end(process)
    assert (returned, err) == (0, "")
    assert log.read_text().splitlines() == ["serves True", "leave", "serves True", "stop"]


def test_who_does_not_end_is_killed(log: Path) -> None:
    code = "signal.signal(signal.SIGTERM, signal.SIG_IGN); notify('READY=1'); line('serves')\n"
    with supervised(log, code + "while True: time.sleep(60)", stop_seconds=0.2) as process:
        until(lambda: log.exists() and log.read_text(), "it serves")
        process.terminate()
        returned, err = end(process)
    assert returned == 137
    assert "the daemon did not end within 0 s, and is killed" in err


def test_nobody_else_is_believed(log: Path) -> None:
    code = """
if os.fork() == 0:
    memory = os.memfd_create("x"); store.keep(memory, memory); notify("READY=1"); os._exit(0)
os.wait(); line(str(inherited)); sys.exit(0 if life == 1 else 9)
"""
    with supervised(log, code) as process:
        returned, err = end(process)
    assert (returned, log.read_text()) == (0, "None\nNone\n")
    assert "ended before it served (exit code 9)" in err


def environment(**variables: object) -> dict[str, str]:
    return {"LISTEN_PID": str(os.getpid())} | {name: str(value) for name, value in variables.items()}


def test_what_was_handed_over_is_claimed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    ends = [os.open("/dev/null", os.O_RDONLY) for _ in range(3)]
    try:
        first = min(ends)
        if ends != [first, first + 1, first + 2]:
            pytest.skip("the numbers are not in a row")
        monkeypatch.setattr(fdstore, "FIRST_FD", first)
        for fd in ends:
            os.set_inheritable(fd, True)
        env = environment(LISTEN_FDS=3, LISTEN_FDNAMES=f"{LEDGER}:other:{FUSE}")
        store = FdStore.from_environment(env)
        assert store.inherited() == (first + 2, first)
        assert store.inherited() is None
        assert not env, "no child is to take them for its own"
        assert not any(os.get_inheritable(fd) for fd in ends)
    finally:
        for fd in ends:
            os.close(fd)


@pytest.mark.parametrize(
    "env",
    [
        {},
        {"LISTEN_PID": "1", "LISTEN_FDS": "2", "LISTEN_FDNAMES": f"{FUSE}:{LEDGER}"},
        {"LISTEN_PID": "x", "LISTEN_FDS": "y"},
        {"NOTIFY_SOCKET": "@none", "FDSTORE": "many"},
    ],
)
def test_what_is_not_for_us_is_left_alone(env: dict[str, str]) -> None:
    store = FdStore.from_environment(env)
    assert (store.inherited(), store.available) == (None, False)


def test_the_manager_is_told_as_systemd_wants_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as inbox:
        inbox.bind(str(place))
        monkeypatch.setenv("NOTIFY_SOCKET", str(place))
        monkeypatch.setenv("FDSTORE", "4")
        store = FdStore.from_environment(os.environ)
        assert store.available
        memory = os.memfd_create("x")
        try:
            assert store.keep(memory, memory)
        finally:
            os.close(memory)
        for name in (LEDGER, FUSE):
            data, fds, _, _ = socket.recv_fds(inbox, 4096, 4)
            assert (data.decode(), len(fds)) == (f"FDSTORE=1\nFDNAME={name}\nFDPOLL=0", 1)
            os.close(fds[0])
        store.drop()
        assert {inbox.recv(4096).decode() for _ in range(2)} == {
            f"FDSTOREREMOVE=1\nFDNAME={name}" for name in (LEDGER, FUSE)
        }


def test_a_service_manager_needs_no_second_one(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "weightfs", "mount", "--supervise", str(tmp_path)],
        env={**os.environ, "NOTIFY_SOCKET": "/run/none", "WEIGHTFS_CONFIG": "/dev/null"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    assert "a service manager runs this already" in done.stderr
