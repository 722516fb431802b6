"""The kernel handshake is ours: libfuse is given a connection that is already set up.

The kernel's half: we obtain the /dev/fuse descriptor (mount(2), or fusermount3 for an ordinary user), read
FUSE_INIT and answer it, with what pyfuse3 cannot ask for: 512 background requests (with the default of 12,
twelve blocked reads stall those of every other file) and reads of 1 MiB. libfuse's half: it gets one end of a
SEQPACKET socket pair through the mount point `/dev/fd/N`, and finds a FUSE_INIT there that we wrote. Inside
pyfuse3's `init` operation the real descriptor takes the place N (`dup2`); libfuse's own INIT reply then goes
to the kernel under an unknown id, which answers ENOENT, and libfuse takes that for an interrupted request.

Numbers and structures are those of <linux/fuse.h>, protocol 7.38.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import logging
import os
import select
import signal
import socket
import stat
import struct
import subprocess
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pyfuse3

from weightfs.errors import MountError
from weightfs.mount import mounttable
from weightfs.mount.mounttable import FSTYPE, HELPER_TIMEOUT, SUBTYPE

MAX_BACKGROUND = 512
CONGESTION_THRESHOLD = 384
MAX_WRITE = (
    1 << 20
)  # the buffers of libfuse 3.14 hold 256 pages and a header; they read requests, and we take no writes
MAX_PAGES = 256  # reads of up to 1 MiB
INIT_TIMEOUT = 10.0

_DEVICE = "/dev/fuse"
_MS_RDONLY, _MS_NOSUID, _MS_NODEV = 1, 2, 4
_FUSE_INIT = 26
_MAJOR, _MINOR = 7, 38
_OLDEST_MINOR = 31  # Linux 5.4
_ASYNC_READ = 1 << 0
_BIG_WRITES = 1 << 5
_DO_READDIRPLUS = 1 << 13
_ASYNC_DIO = 1 << 15
_PARALLEL_DIROPS = 1 << 18
_MAX_PAGES_FLAG = 1 << 22
_CACHE_SYMLINKS = 1 << 23
_INIT_EXT = 1 << 30
_PASSTHROUGH2 = 1 << 5  # of flags2: bit 37
_HAS_RESEND2 = 1 << 7  # bit 39
_NOTIFY_RESEND = 7  # where a reply has its error: FUSE_NOTIFY_RESEND; such a message has the unique id 0
_STACK_DEPTH = 1  # the cache's filesystem may not be stacked itself (overlayfs)
# Not AUTO_INVAL_DATA: a new mtime would throw pages away. Not READDIRPLUS_AUTO: pyfuse3 has no plain readdir.
_WANTED = (
    _ASYNC_READ
    | _BIG_WRITES
    | _DO_READDIRPLUS
    | _ASYNC_DIO
    | _PARALLEL_DIROPS
    | _MAX_PAGES_FLAG
    | _CACHE_SYMLINKS
    | _INIT_EXT
)
_IN_HEADER = struct.Struct("<IIQQIIII")  # len, opcode, unique, nodeid, uid, gid, pid, extlen+padding
_OUT_HEADER = struct.Struct("<IiQ")  # len, error, unique
_INIT_IN = struct.Struct("<IIIII44x")  # major, minor, max_readahead, flags, flags2
_INIT_OUT = struct.Struct(
    "<IIIIHHIIHHII24x"
)  # … max_background, congestion_threshold, max_write, time_gran, max_pages,
# map_alignment, flags2, max_stack_depth

_log = logging.getLogger(__name__)
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True)
class MountOptions:
    """How to mount. `read_ahead_kib` is the kernel's window around each fault; only root can set it."""

    allow_other: bool = False
    read_ahead_kib: int = 4096  # measured: 8 requests of 1 MiB in flight; no gain above
    max_tasks: int = 2048  # requests that may wait at once; pyfuse3's own 99 let blocked reads stall stat
    unmount_timeout: float = 2.0  # seconds to wait for a busy mount at the end, before it is detached
    passthrough: bool = True  # where it can be had: see `passthrough`
    browse: bool = False  # naming a path below `models/` pins what it names: see `browsing`
    browse_ttl: float = 60.0  # seconds for which an answer holds
    browse_timeout: float = 10.0  # seconds that a lookup may wait


@dataclass(frozen=True, slots=True)
class Connection:
    """A mount whose kernel half is done. `fd` is the caller's to close; `device` as in mountinfo."""

    fd: int
    path: Path
    device: str
    kernel_minor: int
    flags: int
    passthrough: bool = False  # the kernel has agreed to it
    resend: bool = False  # it can send again what was read and not answered


def connect(mountpoint: Path, options: MountOptions) -> Connection:
    """Mount at `mountpoint` and do the kernel's half of the handshake. Blocking, bounded; MountError."""
    path = mounttable.bounded(lambda: _prepare(mountpoint), 4 * HELPER_TIMEOUT, str(mountpoint))
    privileged = mounttable.has_mount_privilege()
    fd = _mount_directly(path, options) if privileged else _mount_by_helper(path, options)
    try:
        agreed = _answer_init(fd, path, passthrough=options.passthrough and privileged)
        device = mounttable.mounts_at(path)[-1].device
    except BaseException:
        os.close(fd)  # ends the connection; then the dead mount can go
        with contextlib.suppress(OSError, MountError):
            mounttable.take_away(path, lazy=True)
        raise
    _raise_read_ahead(device, options.read_ahead_kib)
    return Connection(fd, path, device, *agreed)


def _prepare(mountpoint: Path) -> Path:
    """Check the mount point, clearing it of dead mounts; its canonical path."""
    path = mounttable.canonical(mountpoint)
    mounttable.detach_stale(path)
    try:
        mode = path.lstat().st_mode
        if not stat.S_ISDIR(mode):
            raise MountError(f"The mount point {path} is not a directory; name an empty directory.")
        if any(path.iterdir()):
            raise MountError(f"The mount point {path} is not empty; name an empty directory.")
    except FileNotFoundError:
        raise MountError(f"The mount point {path} does not exist; make it with: mkdir -p {path}") from None
    except PermissionError:
        raise MountError(
            f"There is no permission to read the mount point {path}; name a directory of your own."
        ) from None
    except OSError as error:
        raise MountError(f"The mount point {path} cannot be used: {error.strerror}.") from None
    return path


def _mount_directly(path: Path, options: MountOptions) -> int:
    try:
        fd = os.open(_DEVICE, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise _device_error(error) from None
    data = f"fd={fd},rootmode=40000,user_id={os.geteuid()},group_id={os.getegid()},default_permissions"
    if options.allow_other:
        data += ",allow_other"
    flags = _MS_RDONLY | _MS_NOSUID | _MS_NODEV
    if (
        _libc.mount(
            SUBTYPE.encode(), os.fsencode(path), FSTYPE.encode(), ctypes.c_ulong(flags), data.encode()
        )
        != 0
    ):
        code = ctypes.get_errno()
        os.close(fd)
        if code in (errno.EPERM, errno.EACCES):
            raise MountError(
                f"There is no permission to mount at {path}; a container needs CAP_SYS_ADMIN for it."
            )
        if code == errno.ENODEV:
            raise MountError("The kernel has no FUSE; load it with: modprobe fuse")
        raise MountError(f"The kernel refused to mount at {path}: {os.strerror(code)}.")
    return fd


def _device_error(error: OSError) -> MountError:
    match error.errno:
        case errno.ENOENT | errno.ENODEV | errno.ENXIO:
            return MountError(
                f"There is no {_DEVICE}; load it with `modprobe fuse`, or start the container with it."
            )
        case errno.EACCES | errno.EPERM:
            return MountError(
                f"There is no permission to open {_DEVICE}; its mode should be 0666, or run as root."
            )
        case _:
            return MountError(f"{_DEVICE} cannot be opened: {error.strerror}.")


def _mount_by_helper(path: Path, options: MountOptions) -> int:
    """fusermount3 mounts, and sends the descriptor through the socket named by _FUSE_COMMFD (SCM_RIGHTS)."""
    helper = mounttable.fusermount()
    wanted = f"ro,nosuid,nodev,fsname={SUBTYPE},subtype={SUBTYPE},default_permissions"
    if options.allow_other:
        wanted += ",allow_other"
    ours, theirs = socket.socketpair()
    with ours, theirs:
        try:
            done = subprocess.run(  # noqa: S603 - found in PATH by its fixed name
                [helper, "-o", wanted, "--", str(path)],
                env={**os.environ, "_FUSE_COMMFD": str(theirs.fileno())},
                pass_fds=[theirs.fileno()],
                capture_output=True,
                text=True,
                errors="replace",
                timeout=HELPER_TIMEOUT,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise MountError(
                f"{helper} did not end within {HELPER_TIMEOUT:g} s while mounting at {path}."
            ) from None
        if done.returncode != 0:
            raise _helper_error(path, done.stderr.strip())
        theirs.close()
        ours.settimeout(HELPER_TIMEOUT)
        fds = socket.recv_fds(ours, 1, 1, socket.MSG_CMSG_CLOEXEC)[1]
    if len(fds) != 1:
        raise MountError(f"{helper} mounted at {path} but sent no descriptor; unmount it and try again.")
    return fds[0]


def _helper_error(path: Path, said: str) -> MountError:
    if "user_allow_other" in said:
        return MountError(
            "allow_other needs the line `user_allow_other` in /etc/fuse.conf; add it, or do without."
        )
    if _DEVICE in said and "ermission" in said:
        return _device_error(PermissionError(errno.EACCES, said))
    if "device not found" in said or f"{_DEVICE}: No such" in said:
        return _device_error(FileNotFoundError(errno.ENOENT, said))
    if "not owned by user" in said or "write access" in said or "ermission" in said:
        return MountError(
            f"There is no permission to mount at {path}; name a directory of your own ({said})."
        )
    return MountError(f"fusermount3 could not mount at {path}: {said or 'it gave no reason'}.")


def _answer_init(fd: int, path: Path, *, passthrough: bool) -> tuple[int, int, bool, bool]:
    """Read the kernel's FUSE_INIT and answer it; its minor version, the flags of both sides, passthrough, resend."""
    ready = select.poll()
    ready.register(fd, select.POLLIN)
    if not ready.poll(INIT_TIMEOUT * 1000):
        raise MountError(f"The kernel sent no FUSE_INIT for {path} within {INIT_TIMEOUT:g} s.")
    request = os.read(fd, 1 << 16)  # the kernel wants room for at least 8 KiB
    length, opcode, unique, *_ = _IN_HEADER.unpack_from(request)
    body = request[_IN_HEADER.size : length].ljust(_INIT_IN.size, b"\0")
    major, minor, max_readahead, flags, flags2 = _INIT_IN.unpack_from(body)
    if opcode != _FUSE_INIT or major != _MAJOR or minor < _OLDEST_MINOR or not flags & _DO_READDIRPLUS:
        raise MountError(
            f"The kernel's FUSE {major}.{minor} is too old; {_MAJOR}.{_OLDEST_MINOR} (Linux 5.4) is needed."
        )
    agreed = flags & _WANTED
    pages = MAX_PAGES if agreed & _MAX_PAGES_FLAG else 0
    passthrough = bool(passthrough and agreed & _INIT_EXT and flags2 & _PASSTHROUGH2)
    answer = _INIT_OUT.pack(
        _MAJOR,
        min(minor, _MINOR),
        max_readahead,
        agreed,
        MAX_BACKGROUND,
        CONGESTION_THRESHOLD,
        MAX_WRITE,
        1,
        pages,
        0,
        _PASSTHROUGH2 if passthrough else 0,
        _STACK_DEPTH if passthrough else 0,
    )
    os.write(fd, _OUT_HEADER.pack(_OUT_HEADER.size + len(answer), 0, unique) + answer)
    return minor, agreed, passthrough, bool(flags2 & _HAS_RESEND2)


def _raise_read_ahead(device: str, kib: int) -> None:
    """INIT clamps read-ahead to 128 KiB; what a fault reads at once is that. Root can raise it afterwards."""
    try:
        Path(f"/sys/class/bdi/{device}/read_ahead_kb").write_text(f"{kib}\n")
    except OSError as error:
        _log.debug("The read-ahead of %s stays as it is: %s", device, error.strerror)


class Handover:
    """libfuse's half: `attach` calls `pyfuse3.init`, `takeover` belongs into its `init` operation.

    One at a time in a process: pyfuse3 has one session. With `resumed` the connection was another daemon's: what that
    one had read and not answered is asked for again.
    """

    _busy = threading.Lock()

    def __init__(self, connection: Connection, *, resumed: bool = False) -> None:
        self._device = connection.fd
        self._resumed = resumed
        self._ours: socket.socket | None = None
        self._attached = False
        self.fd = -1
        self.failure: OSError | None = None

    def attach(self, operations: pyfuse3.Operations) -> None:
        """Give libfuse its end and the FUSE_INIT that it expects to find."""
        if not self._busy.acquire(blocking=False):
            raise MountError("This process already serves a mount; pyfuse3 has one session in a process.")
        self._attached = True
        self._ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.fd = theirs.detach()
        body = _INIT_IN.pack(_MAJOR, _MINOR, 128 << 10, 0xFFFFFFFF & ~_INIT_EXT, 0)
        size = _IN_HEADER.size + len(body)
        self._ours.send(
            _IN_HEADER.pack(size, _FUSE_INIT, 1, 0, os.geteuid(), os.getegid(), os.getpid(), 0) + body
        )
        try:
            pyfuse3.init(operations, f"/dev/fd/{self.fd}", set())
        except BaseException:
            self._detach()  # there is no session that could be closed
            os.close(self.fd)
            raise

    def takeover(self) -> None:
        """The kernel's descriptor takes libfuse's place. Never raises: `init` cannot carry an exception."""
        try:
            os.dup2(self._device, self.fd, inheritable=False)
            if self._resumed:
                os.write(self.fd, _OUT_HEADER.pack(_OUT_HEADER.size, _NOTIFY_RESEND, 0))
        except OSError as error:
            self.failure = error
            return
        os.close(self._device)
        self._device = -1
        if self._ours is not None:
            self._ours.close()
            self._ours = None

    def close(self) -> None:
        """Close every descriptor; the kernel then ends the connection, and every waiting request with it."""
        if self._attached:
            pyfuse3.close(unmount=False)  # closes `fd`
            self._detach()
        if self._ours is not None:
            self._ours.close()
            self._ours = None
        if self._device >= 0:
            os.close(self._device)
            self._device = -1

    def _detach(self) -> None:
        self._attached = False
        self._busy.release()


@contextlib.contextmanager
def guarded_reads(fd: int, lost: Callable[[], None]) -> Iterator[None]:
    """Keep pyfuse3's blocking read of /dev/fuse, for which it holds the GIL, from freezing the process.

    A request that its caller withdraws (a killed reader) between epoll's word and the read leaves the read
    waiting for the next request. First guard: ask poll(2) once more, right before; nothing awaits between
    that and the read. Second: a signal every second, so that a read that lost even that race ends with EINTR,
    and pyfuse3 waits again. Signals need the main thread; elsewhere, or where somebody else uses SIGALRM,
    there is the first guard alone.

    `lost` is called when the kernel has ended the connection: pyfuse3 tells that only when every handler is done.
    """
    names = vars(pyfuse3)
    wait = names["_wait_fuse_readable"]
    ready = select.poll()
    ready.register(fd, select.POLLIN)

    async def wait_fuse_readable() -> bool:
        while await wait():
            events = ready.poll(0)
            if events and events[0][1] & select.POLLERR:
                lost()  # the read that follows gets ENODEV
            if events:
                return True
        return False

    names["_wait_fuse_readable"] = wait_fuse_readable  # pyfuse3's loop looks the name up each time
    try:
        with _ticking():
            yield
    finally:
        names["_wait_fuse_readable"] = wait


@contextlib.contextmanager
def _ticking() -> Iterator[None]:
    free = (
        signal.getsignal(signal.SIGALRM) in (signal.SIG_DFL, signal.SIG_IGN)
        and signal.getitimer(signal.ITIMER_REAL)[0] == 0
    )
    if not free or threading.current_thread() is not threading.main_thread():
        _log.debug("SIGALRM is not ours: a stuck read of %s is not ended by a signal", _DEVICE)
        yield
        return
    previous = signal.signal(signal.SIGALRM, lambda _number, _frame: None)
    signal.setitimer(signal.ITIMER_REAL, 1.0, 1.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, previous)
