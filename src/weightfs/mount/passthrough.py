"""FUSE passthrough: the kernel reads a complete blob's cache file itself, and asks us for nothing but the open.

Rules. An inode is read either way (through us, "cached" for the kernel, or passed through) for as long as it is open:
the kernel answers EIO to whoever mixes. So the first handle decides, and every later one follows. One backing file is
registered per open inode, and given back with its last handle. Any doubt means: without passthrough, and one line says
so.

pyfuse3 cannot answer an OPEN in this way, but looks its handler up by name at each request, so ours takes its place.
It lets pyfuse3 do everything but the reply: `answer` gives that to libfuse's `fuse_reply_buf`, and raises `Answered`,
which leaves pyfuse3's handler before it could reply a second time. What that takes is the request's pointer, which
lies somewhere in a Cython object. It is found, never assumed: at start a process opens a private file, and the pointer
is the one word whose `fuse_req_ctx` holds that process's number. (`fuse_req_ctx` only adds to its argument, and what
is at the sum is read by process_vm_readv(2), which fails where a wrong guess would crash.) A second open must find it
at the same place, be answered through it, and give the private file's bytes without a READ. Another process opens the
file: one that waits for its own mount cannot be killed.

Numbers and structures are those of <linux/fuse.h>, protocol 7.40 (Linux 6.9).
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import logging
import os
import secrets
import stat
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Coroutine, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import pyfuse3
import trio

from weightfs.interpreter import not_started
from weightfs.mount.inodes import DIRECT

TESTED = frozenset({"3.5.0"})  # versions of pyfuse3 whose handler of OPEN was read, and is what is said above
SELF_TEST_TIMEOUT = 5.0  # seconds
LEND_TIMEOUT = 1.0  # seconds to open a cache file; `open` waits for no sick disk

_BACKING_OPEN = 0x4010E501  # _IOW(229, 1, struct fuse_backing_map)
_BACKING_CLOSE = 0x4004E502  # _IOW(229, 2, uint32_t)
_BACKING_MAP = struct.Struct("=iIQ")  # fd, flags, padding
_OPEN_OUT = struct.Struct("=QIi")  # fh, open_flags, backing_id
_FOPEN_PASSTHROUGH = 1 << 7
_CTX = struct.Struct("=IIi")  # struct fuse_ctx of libfuse: uid, gid, pid
_WORD = 8
_HEADER_WORDS = 2  # of every Python object
_PASSING = frozenset({errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.ENODEV, errno.ENOTCONN, errno.EINTR})
_NOT_YET = errno.ECANCELED  # the answer to the self-test's first open
_CLIENT = """
import os, sys
sys.stdin.readline()
try:
    os.open(sys.argv[1], os.O_RDONLY)
    sys.exit("the first open was answered")
except OSError:
    pass
try:
    os.write(1, os.pread(os.open(sys.argv[1], os.O_RDONLY), int(sys.argv[2]), 0))
except OSError as error:
    sys.exit(error.strerror)
"""

_log = logging.getLogger(__name__)
_libc = ctypes.CDLL(None, use_errno=True)
_libc.process_vm_readv.restype = ctypes.c_ssize_t
_request: ContextVar[object] = ContextVar("request")  # the container of the OPEN that this task handles


class Answered(Exception):  # noqa: N818 - it is no error: the request has had its answer
    """Leaves pyfuse3's handler. Not `delivered`: the kernel did not take the handle, and will not release it."""

    def __init__(self, *, delivered: bool) -> None:
        super().__init__()
        self.delivered = delivered


@dataclass(frozen=True, slots=True)
class Private:
    """The self-test's file: there for the one who knows its name, while the test runs. `fd` has `content`."""

    name: str
    ino: int
    content: bytes
    fd: int


class _IoVec(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


class _Requests:
    """libfuse as pyfuse3 uses it, and where pyfuse3 keeps a request's pointer. OSError, AttributeError: not here."""

    def __init__(self) -> None:
        library = ctypes.CDLL(pyfuse3.__file__)  # symbols are looked for in what it was linked with
        self._reply = library.fuse_reply_buf
        self._reply.argtypes = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_size_t)
        self._reply.restype = ctypes.c_int
        self._ctx = library.fuse_req_ctx
        self._ctx.argtypes = (ctypes.c_void_p,)
        self._ctx.restype = ctypes.c_void_p
        self.word = -1

    def find(self, container: object, wanted: tuple[int, int, int]) -> int:
        """The only word of `container` that points to a request of `wanted` (uid, gid, thread); -1: there is none."""
        words = type(container).__basicsize__ // _WORD
        found = [
            word
            for word in range(_HEADER_WORDS, words)
            if (pointer := self._at(container, word))
            and pointer % _WORD == 0
            and self._who(pointer) == wanted
        ]
        return found[0] if len(found) == 1 else -1

    def reply(self, container: object, answer: bytes) -> int:
        """Send the answer; 0, or a negative errno. Either way the request is no more."""
        code: int = self._reply(self._at(container, self.word), answer, len(answer))
        return code

    @staticmethod
    def _at(container: object, word: int) -> int:
        return ctypes.c_uint64.from_address(id(container) + word * _WORD).value

    def _who(self, pointer: int) -> tuple[int, ...] | None:
        """What a request's context would say if `pointer` were one; None if there is no memory."""
        buffer = ctypes.create_string_buffer(_CTX.size)
        here = _IoVec(ctypes.addressof(buffer), _CTX.size)
        there = _IoVec(self._ctx(pointer), _CTX.size)
        got = _libc.process_vm_readv(os.getpid(), ctypes.byref(here), 1, ctypes.byref(there), 1, 0)
        return _CTX.unpack(buffer.raw) if got == _CTX.size else None


class Passthrough:
    """One per mount. Without passthrough (`on` is False) nothing else of it is called.

    `fd()` is the connection's descriptor. `on` becomes True by the self-test, and False for good when the kernel
    refuses a cache file: it will refuse them all. What is passed through by then stays so.
    """

    def __init__(self, fd: Callable[[], int] = lambda: -1) -> None:
        self.on = False
        self.private: Private | None = None
        self.lent = 0  # backing files that are registered now
        self.opens = 0  # handles passed through since the start
        self._fd = fd
        self._requests: _Requests | None = None
        self._tester = -1
        self._tested: int | None = None

    @property
    def able(self) -> bool:
        """Whether an OPEN can be answered: the self-test has found out how."""
        return self._requests is not None and self._requests.word >= 0

    # --- starting

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Stand in for pyfuse3's handler of OPEN."""
        names = vars(pyfuse3)
        original: Callable[[object], Coroutine[Any, Any, None]] = names["fuse_open_async"]

        async def fuse_open_async(container: object) -> None:
            token = _request.set(container)
            try:
                await original(container)
            except Answered:
                pass
            finally:
                _request.reset(token)

        names["fuse_open_async"] = fuse_open_async
        try:
            yield
        finally:
            names["fuse_open_async"] = original
            self.on = False

    async def start(self, mounted: Path, *, agreed: bool) -> None:
        """Turn it on if everything is as it must be, and say which. `agreed`: the kernel has it."""
        reason = await self._why_not(mounted, agreed=agreed)
        self.on = not reason
        if reason:
            _log.info("Complete files are read through weightfs, not passed through: %s", reason)
        else:
            _log.info("Complete files are passed through: the kernel reads them from the cache itself")

    async def _why_not(self, mounted: Path, *, agreed: bool) -> str:
        if not agreed:
            return "the kernel does not offer it (Linux 6.9), or there is no CAP_SYS_ADMIN"
        if pyfuse3.__version__ not in TESTED:
            return f"pyfuse3 {pyfuse3.__version__} was not tested with it ({', '.join(sorted(TESTED))})"
        try:
            self._requests = _Requests()
            with _private_file() as self.private:
                outcome = await self._self_test(mounted, self.private)
        except Exception as error:  # noqa: BLE001 - whatever it is, the mount does without
            return f"its self-test failed ({error})"
        finally:
            self.private = None
            if self._tested is not None:
                # Not before: the opener looks the id up in its own time, after it was woken by the answer.
                self.take_back(self._tested)
        return outcome

    async def _self_test(self, mounted: Path, private: Private) -> str:
        client = partial(self._run_client, mounted / private.name, len(private.content) + 1)
        read, said = await trio.to_thread.run_sync(client, abandon_on_cancel=True)
        if said:
            return f"its self-test failed ({said})"
        return "" if read == private.content else "its self-test read other bytes than there are"

    def _run_client(self, place: Path, count: int) -> tuple[bytes, str]:
        """What another process reads there, and what it says of a failure."""
        try:
            process = subprocess.Popen(  # noqa: S603 - our own interpreter
                [sys.executable, "-I", "-S", "-c", _CLIENT, str(place), str(count)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )
        except OSError as error:
            return b"", not_started(error)
        self._tester = process.pid  # it waits until we know
        try:
            read, said = process.communicate(b"\n", SELF_TEST_TIMEOUT)
        except subprocess.TimeoutExpired:
            process.kill()
            # It may be in an unkillable wait: it is reaped whenever that ends, and nobody waits for it here.
            threading.Thread(target=process.communicate, daemon=True, name="weightfs-self-test").start()
            return b"", f"no end within {SELF_TEST_TIMEOUT:g} s"
        return read, said.decode(errors="replace").strip()

    def open_private(self, private: Private, ctx: pyfuse3.RequestContext) -> NoReturn:
        """Answer an open of the self-test's file. FUSEError: this was the first, or something is not as it must be."""
        if self._requests is None or ctx.pid != self._tester:
            raise pyfuse3.FUSEError(errno.EACCES)
        word = self._requests.find(_request.get(), (ctx.uid, ctx.gid, ctx.pid))
        if word < 0:
            raise pyfuse3.FUSEError(errno.ENXIO)
        if self._requests.word != word:
            self._requests.word = word
            raise pyfuse3.FUSEError(_NOT_YET)
        self._tested = self._register(private.fd)
        self.answer(private.ino, self._tested)

    # --- lending

    async def lend(self, path: Path, size: int) -> int | None:
        """Register a cache file; its backing id, or None, with the reason in the log. Never waits long, never fails."""
        opening = _Opening(path, size)
        try:
            with trio.move_on_after(LEND_TIMEOUT):
                await trio.to_thread.run_sync(opening.run, abandon_on_cancel=True)
            # The thread may have ended just before nobody waited any more: then nobody would give the file back.
            await trio.lowlevel.checkpoint_if_cancelled()
        except trio.Cancelled:  # nobody waits: the request was answered, or has gone
            if (late := opening.take()) >= 0:
                os.close(late)
            raise
        fd = opening.take()
        if fd < 0:
            _log.warning("%s is not passed through: %s", path, opening.reason)
            return None
        try:
            return self._register(fd)
        except OSError as error:
            if error.errno in _PASSING:
                _log.warning("%s is not passed through: %s", path, error.strerror)
                return None
            self.on = False
            _log.info(
                "Complete files are read through weightfs, not passed through: the kernel does not take "
                "files of the cache's filesystem (%s: %s)", path, error.strerror,
            )  # fmt: skip
            return None
        finally:
            os.close(fd)  # the kernel has its own

    def _register(self, fd: int) -> int:
        request = bytearray(_BACKING_MAP.pack(fd, 0, 0))
        backing: int = fcntl.ioctl(
            self._fd(), _BACKING_OPEN, request
        )  # a bytearray: the result is ioctl's own
        self.lent += 1
        return backing

    def take_back(self, backing: int) -> None:
        """No handle is left: the kernel forgets the file, once nobody maps it any more."""
        self.lent -= 1
        try:
            fcntl.ioctl(self._fd(), _BACKING_CLOSE, bytearray(struct.pack("=I", backing)))
        except OSError as error:  # the connection has ended, and with it all of its files
            _log.debug("Backing file %d was not closed: %s", backing, error.strerror)

    def answer(self, fh: int, backing: int) -> NoReturn:
        """Answer the OPEN that this task handles: `fh` is passed through. Raises Answered."""
        if self._requests is None:
            raise RuntimeError("passthrough was not started")
        code = self._requests.reply(_request.get(), _OPEN_OUT.pack(fh, _FOPEN_PASSTHROUGH, backing))
        if code:
            _log.debug("An OPEN could not be answered: %s", os.strerror(-code))
        self.opens += not code
        raise Answered(delivered=not code)


class _Opening:
    """Opening a cache file, in a thread that may be left behind: what it opens after that, it closes."""

    def __init__(self, path: Path, size: int) -> None:
        self.reason = f"the cache's disk did not open it within {LEND_TIMEOUT:g} s"
        self._path = path
        self._size = size
        self._lock = threading.Lock()
        self._fd = -1
        self._taken = False

    def run(self) -> None:
        """Open it for `take`."""
        try:
            # With O_DIRECT, as a reader may ask for it: where the filesystem has none, the kernel would answer EIO.
            flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC | os.O_DIRECT
            fd = os.open(self._path, flags)
        except OSError as error:
            self.reason = str(error.strerror)
            return
        try:
            found = os.fstat(fd)
            ours = stat.S_ISREG(found.st_mode) and found.st_uid == os.geteuid() and found.st_nlink == 1
            if not ours or found.st_size != self._size:
                wanted = f"the file of {self._size} bytes that weightfs made"
                self.reason = f"it is not {wanted}; run `weightfs verify --repair`"
                return
            with self._lock:
                if not self._taken:
                    self._fd, fd = fd, -1
        finally:
            if fd >= 0:
                os.close(fd)

    def take(self) -> int:
        """The descriptor, or -1 and `reason`. What is opened later, nobody waits for."""
        with self._lock:
            self._taken = True
            return self._fd


@contextlib.contextmanager
def _private_file() -> Iterator[Private]:
    """A file without a name, in memory, that a name of this moment leads to."""
    content = secrets.token_bytes(4096)
    fd = os.memfd_create("weightfs-self-test", os.MFD_CLOEXEC)
    try:
        os.write(fd, content)
        ino = secrets.randbits(61) << 1 | DIRECT
        yield Private(f".{secrets.token_hex(16)}", ino, content, fd)
    finally:
        os.close(fd)
