"""`weightfs mount --supervise`: a small parent that keeps a mount alive from one daemon to the next, without systemd.

It is a service manager of one service, and speaks systemd's protocol to it: the daemon hands over its descriptors by
sd_notify(3), and a later one gets them by sd_listen_fds(3). Rules. The standard library alone, one thread, and no work:
what does nothing has nothing to die of. Only the child itself is believed (the kernel adds its pid to each message).
The next child is started when the last one has been reaped, so that two never serve one mount. A child that ends with 0
was unmounted, and the supervisor ends; `FINAL` codes do not mend by trying again; SIGTERM, SIGINT and SIGHUP unmount;
SIGUSR1 starts the child anew, with the code that is installed then; SIGUSR2 is the child's alone.
"""

from __future__ import annotations

import array
import contextlib
import os
import secrets
import selectors
import signal
import socket
import struct
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final, Never

from weightfs.app import notify

FAILED_STARTS: Final = 5  # in a row, before it is given up
PAUSE: Final = 0.1  # seconds before a start after a child that served; doubled after each that did not
MAX_PAUSE: Final = 5.0
STOP_SECONDS: Final = 30.0  # for a child to end that was told to; then it is killed. As TimeoutStopSec=
AGAIN: Final = 75  # the child's exit code after SIGUSR1 (EX_TEMPFAIL of sysexits.h); our units know it
FINAL: Final = frozenset({2, 3})  # wrong settings; a new ref that its origin does not know
MAX_KEPT: Final = 4  # descriptors, as FileDescriptorStoreMax= of our units
MAX_MESSAGE: Final = 4096
NAME: Final = "weightfs-supervise-"
_FIRST_FD: Final = 3
_CREDENTIALS: Final = struct.Struct("iII")  # struct ucred: pid, uid, gid
_SIGNALS: Final = (
    signal.SIGTERM,
    signal.SIGINT,
    signal.SIGHUP,
    signal.SIGUSR1,
    signal.SIGUSR2,
    signal.SIGCHLD,
)


def is_child(env: Mapping[str, str]) -> bool:
    """Whether this process was started by a supervisor."""
    return env.get("NOTIFY_SOCKET", "").startswith(f"@{NAME}")


class Supervisor:
    """Runs `command` again and again.

    Args:
        command: The daemon's, as for execve(2).
        directory: Where it is run.
        on_started: Called once, when a child serves and has asked for its new refs.
        own_group: Give the child a process group, so that Ctrl-C in a terminal reaches the supervisor alone.
    """

    def __init__(
        self,
        command: Sequence[str],
        directory: Path,
        *,
        on_started: Callable[[], None] = lambda: None,
        own_group: bool = True,
    ) -> None:
        self._command = list(command)
        self._directory = directory
        self._on_started = on_started
        self._own_group = own_group
        self._address = f"{NAME}{os.getpid()}-{secrets.token_hex(8)}"
        self._kept: dict[str, int] = {}
        self._pid = 0
        self._failed = 0  # starts in a row that came to nothing
        self._stopping = False
        self._deadline = float("inf")

    def run(self) -> int:
        """Until the end; the exit code of the last child, or 128 and the signal that it died of."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as inbox:
            inbox.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
            inbox.setblocking(False)
            inbox.bind(f"\0{self._address}")
            with _signals() as signals, selectors.DefaultSelector() as selector:
                selector.register(signals, selectors.EVENT_READ)
                selector.register(inbox, selectors.EVENT_READ)
                try:
                    return self._live(selector, signals, inbox)
                finally:
                    for fd in self._kept.values():
                        os.close(fd)  # ends the connection of a mount that nobody serves any more

    def _live(self, selector: selectors.BaseSelector, signals: socket.socket, inbox: socket.socket) -> int:
        while True:
            self._pid, served = self._spawn(), False
            code: int | None = None
            while code is None:
                selector.select(self._patience())
                # Whatever it said before it ended is heard before it is buried.
                code = self._ended()
                served = self._listen(inbox) or served
                self._obey(signals)
            self._pid = 0
            self._deadline = float("inf")
            self._failed = 0 if served else self._failed + 1
            if self._stopping or code == 0 or code in FINAL:
                return code
            if self._failed >= FAILED_STARTS:
                _say(
                    f"the daemon failed to start {FAILED_STARTS} times in a row; the last exit code was {code}"
                )
                return code
            if not served:
                _say(f"the daemon ended before it served (exit code {code}), and is started again")
            elif code != AGAIN:
                _say(f"the daemon ended (exit code {code}), and is started again; what is open waits for it")
            if self._told_to_stop(selector, signals):
                return code

    def _patience(self) -> float | None:
        if self._deadline == float("inf"):
            return None
        left = self._deadline - time.monotonic()
        if left <= 0:
            _say(f"the daemon did not end within {STOP_SECONDS:.0f} s, and is killed")
            self._signal(signal.SIGKILL)
            self._deadline = float("inf")
            return None
        return left

    def _told_to_stop(self, selector: selectors.BaseSelector, signals: socket.socket) -> bool:
        """In the pause before the next start."""
        until = time.monotonic() + min(PAUSE * 2**self._failed, MAX_PAUSE)
        while not self._stopping and (left := until - time.monotonic()) > 0:
            selector.select(left)
            self._obey(signals)
        return self._stopping

    # --- the child

    def _spawn(self) -> int:
        sys.stdout.flush()
        sys.stderr.flush()
        pid = os.fork()
        if pid == 0:
            self._become_child()
        return pid

    def _become_child(self) -> Never:
        try:
            for number in _SIGNALS:
                signal.signal(number, signal.SIG_DFL)
            if self._own_group:
                os.setpgid(0, 0)
            with contextlib.suppress(OSError):  # it may be gone since
                os.chdir(self._directory)
            # Above all targets first, so that none of them is overwritten before it is copied.
            copies = [os.dup(fd) for fd in self._kept.values()]
            high = [_above(fd, _FIRST_FD + MAX_KEPT) for fd in copies]
            for index, fd in enumerate(high):
                os.dup2(fd, _FIRST_FD + index, inheritable=True)
            env = {
                **os.environ,
                "NOTIFY_SOCKET": f"@{self._address}",
                "FDSTORE": str(MAX_KEPT),
                "LISTEN_PID": str(os.getpid()),
                "LISTEN_FDS": str(len(high)),
                "LISTEN_FDNAMES": ":".join(self._kept),
            }
            os.execve(self._command[0], self._command, env)  # noqa: S606 - that is what we are for
        except OSError as error:
            print(f"weightfs: {self._command[0]} cannot be started: {error.strerror}", file=sys.stderr)  # noqa: T201
        finally:
            os._exit(127)

    def _ended(self) -> int | None:
        pid, status = os.waitpid(self._pid, os.WNOHANG)
        if not pid:
            return None
        code = os.waitstatus_to_exitcode(status)
        return code if code >= 0 else 128 - code

    def _signal(self, number: int) -> None:
        if self._pid:
            os.kill(self._pid, number)  # not reaped yet, so it is still the child

    def _obey(self, signals: socket.socket) -> None:
        with contextlib.suppress(BlockingIOError):
            for number in signals.recv(256):
                match number:
                    case signal.SIGTERM | signal.SIGINT | signal.SIGHUP:
                        self._stopping = True
                        self._deadline = time.monotonic() + STOP_SECONDS
                        self._signal(signal.SIGTERM)
                    case signal.SIGUSR1 | signal.SIGUSR2:
                        self._signal(number)

    # --- what it says

    def _listen(self, inbox: socket.socket) -> bool:
        """Take every message that has come; whether one of them said READY."""
        ready = False
        while True:
            space = socket.CMSG_SPACE(_CREDENTIALS.size) + socket.CMSG_SPACE(MAX_KEPT * 4)
            try:
                data, ancillary, _, _ = inbox.recvmsg(MAX_MESSAGE, space, socket.MSG_CMSG_CLOEXEC)
            except BlockingIOError:
                return ready
            fds, sender = _unpack(ancillary)
            words = dict(line.partition("=")[::2] for line in data.decode(errors="replace").splitlines())
            if sender == self._pid:
                ready |= words.get("READY") == "1"
                fds = self._take(words, fds)
            for fd in fds:
                os.close(fd)

    def _take(self, words: Mapping[str, str], fds: list[int]) -> list[int]:
        """Do as the message says; the descriptors that were not kept."""
        name = words.get("FDNAME", "")
        if words.get(notify.STARTED) == "1":
            started, self._on_started = self._on_started, lambda: None
            started()
        if words.get("FDSTOREREMOVE") == "1" and name in self._kept:
            os.close(self._kept.pop(name))
        if words.get("FDSTORE") == "1" and name and len(fds) == 1:
            if name in self._kept:
                os.close(self._kept.pop(name))
            if len(self._kept) < MAX_KEPT:
                self._kept[name] = fds[0]
                return []
        return fds


def _above(fd: int, lowest: int) -> int:
    return fd if fd >= lowest else _above(os.dup(fd), lowest)


def _unpack(ancillary: Sequence[tuple[int, int, bytes]]) -> tuple[list[int], int]:
    """The descriptors that came with a message, and the pid of who sent it."""
    fds: list[int] = []
    sender = -1
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds += array.array("i", data[: len(data) - len(data) % 4])
        elif level == socket.SOL_SOCKET and kind == socket.SCM_CREDENTIALS:
            sender = _CREDENTIALS.unpack_from(data)[0]
    return fds, sender


@contextlib.contextmanager
def _signals() -> Iterator[socket.socket]:
    """A socket that has a byte for each signal that came."""
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    theirs.setblocking(False)
    previous = signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
    handlers = {number: signal.signal(number, lambda _number, _frame: None) for number in _SIGNALS}
    try:
        yield ours
    finally:
        signal.set_wakeup_fd(previous)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        ours.close()
        theirs.close()


def _say(sentence: str) -> None:
    print(f"weightfs: {sentence}", file=sys.stderr, flush=True)  # noqa: T201 - the terminal, or the log file
