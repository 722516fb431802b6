"""A SHA-256 whose state can be saved and taken up again, at any 64-byte boundary.

`hashlib` cannot do it; libcrypto's `SHA256_Init`, `_Update` and `_Final` can, because their context is a plain
structure: eight 32-bit words of intermediate hash value (FIPS 180-4, section 6.2), a bit count, and a partial block.
libcrypto's structure is not promised to stay as it is, so a known-answer test runs once, at import; where it fails, or
where there is no libcrypto, `SAVABLE` is False, `hashlib` does the work, and the caller hashes from the start again.

A state is 32 bytes: 8 × u32be. It means nothing without the length that was hashed, which the caller keeps.
"""

from __future__ import annotations

import contextlib
import ctypes
import ctypes.util
import hashlib
import struct
from typing import TYPE_CHECKING, Protocol, Self

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

BLOCK = 64  # bytes (FIPS 180-4, section 1: block size of SHA-256)
STATE_LENGTH = 32
_MAX_LENGTH = (1 << 61) - 1  # bytes: the bit count has 64 bits

_STATE = struct.Struct(">8I")


class _Context(ctypes.Structure):
    """`SHA256_CTX` of openssl/sha.h, with room behind it should a library write past what that header says."""

    _fields_ = (
        ("h", ctypes.c_uint32 * 8),
        ("low", ctypes.c_uint32),  # of the bit count
        ("high", ctypes.c_uint32),
        ("block", ctypes.c_uint8 * BLOCK),
        ("pending", ctypes.c_uint32),  # bytes in `block`
        ("digest_length", ctypes.c_uint32),
        ("room", ctypes.c_uint8 * 128),
    )


class _Hasher(Protocol):
    def update(self, data: bytes | memoryview) -> None: ...
    def state(self) -> bytes: ...
    def copy(self) -> Self: ...
    def digest(self) -> bytes: ...


class _Libcrypto:
    """The three functions, bound once. A call through `CDLL` lets go of the GIL."""

    def __init__(self, library: ctypes.CDLL) -> None:
        context = ctypes.POINTER(_Context)
        self.init: Callable[[object], int] = library.SHA256_Init
        self.update: Callable[[object, object, int], int] = library.SHA256_Update
        self.final: Callable[[object, object], int] = library.SHA256_Final
        library.SHA256_Init.argtypes = (context,)
        library.SHA256_Update.argtypes = (context, ctypes.c_void_p, ctypes.c_size_t)
        library.SHA256_Final.argtypes = (ctypes.c_char_p, context)


class _SavableHasher:
    """One context of libcrypto."""

    def __init__(self, library: _Libcrypto, state: bytes | None, length: int) -> None:
        self._library = library
        self._context = _Context()
        self._call(library.init(ctypes.byref(self._context)))
        if state is not None:
            self._context.h[:] = _STATE.unpack(state)
            bits = length * 8
            self._context.low, self._context.high = bits & 0xFFFF_FFFF, bits >> 32

    def update(self, data: bytes | memoryview) -> None:
        view = memoryview(data).cast("B")
        if not len(view):
            return
        if isinstance(data, bytes):
            pointer: object = data
        elif view.readonly:
            pointer = bytes(view)  # ctypes takes an address from writable buffers only
        else:
            pointer = ctypes.byref(ctypes.c_char.from_buffer(view))
        self._call(self._library.update(ctypes.byref(self._context), pointer, len(view)))

    def state(self) -> bytes:
        return _STATE.pack(*self._context.h)

    def copy(self) -> _SavableHasher:
        twin = _SavableHasher.__new__(_SavableHasher)
        twin._library = self._library
        twin._context = _Context.from_buffer_copy(self._context)
        return twin

    def digest(self) -> bytes:
        out = ctypes.create_string_buffer(32)
        # Final wipes what it is given.
        self._call(self._library.final(out, ctypes.byref(_Context.from_buffer_copy(self._context))))
        return out.raw

    @staticmethod
    def _call(result: int) -> None:
        if result != 1:
            raise RuntimeError("libcrypto refused a SHA-256 operation")


class _PlainHasher:
    """`hashlib`, which begins at the beginning and cannot be saved."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def update(self, data: bytes | memoryview) -> None:
        self._hash.update(data)

    def state(self) -> bytes:
        raise NotImplementedError("this machine's libcrypto cannot save a SHA-256: hash from the start again")

    def copy(self) -> _PlainHasher:
        twin = _PlainHasher()
        twin._hash = self._hash.copy()
        return twin

    def digest(self) -> bytes:
        return self._hash.digest()


class RunningSha256:
    """SHA-256 of bytes given in order. Not to be used from two threads at once; different ones may run in parallel.

    Args:
        state: what `state()` returned, or None to begin.
        length: how many bytes that state stands for: a multiple of 64, and 0 without a state.

    Raises:
        ValueError: a state of another size than 32 bytes, or a length that no state can have.
        NotImplementedError: a state was given, and `SAVABLE` is False.
    """

    __slots__ = ("_hasher", "_length")

    def __init__(self, state: bytes | None = None, length: int = 0) -> None:
        if not 0 <= length <= _MAX_LENGTH or length % BLOCK:
            raise ValueError(f"a SHA-256 is saved at multiples of {BLOCK} bytes, not at {length}")
        if state is None and length:
            raise ValueError(f"a SHA-256 over {length} bytes needs its state")
        if state is not None and len(state) != STATE_LENGTH:
            raise ValueError(f"the state of a SHA-256 has {STATE_LENGTH} bytes, not {len(state)}")
        self._length = length
        self._hasher: _Hasher
        if _library is not None:
            self._hasher = _SavableHasher(_library, state, length)
        elif state is None:
            self._hasher = _PlainHasher()
        else:
            raise NotImplementedError(
                "this machine's libcrypto cannot take up a saved SHA-256: hash from the start"
            )

    @property
    def length(self) -> int:
        """Bytes hashed so far, those behind the first state included."""
        return self._length

    def update(self, data: bytes | bytearray | memoryview) -> None:
        """Hash more bytes. Lets go of the GIL; give it a chunk at a time."""
        view = data if isinstance(data, bytes) else memoryview(data)
        size = len(view) if isinstance(view, bytes) else view.nbytes
        self._hasher.update(view)
        self._length += size

    def state(self) -> bytes:
        """The intermediate hash value, 32 bytes.

        Raises:
            ValueError: the length is not a multiple of 64, so that part of a block would be lost.
            NotImplementedError: `SAVABLE` is False.
        """
        if self._length % BLOCK:
            raise ValueError(
                f"a SHA-256 over {self._length} bytes cannot be saved: not a multiple of {BLOCK}"
            )
        return self._hasher.state()

    def copy(self) -> RunningSha256:
        """An independent one that has hashed the same bytes."""
        twin = RunningSha256.__new__(RunningSha256)
        twin._length = self._length
        twin._hasher = self._hasher.copy()
        return twin

    def digest(self) -> bytes:
        """The SHA-256 of everything so far, 32 bytes; more may follow."""
        return self._hasher.digest()


class GitSha1:
    """git's name of a file of `size` bytes given in order: SHA-1 over `blob <size>`, NUL and the bytes.

    gitformat-pack(5) and "Git Internals - Git Objects" of the Git Book. It cannot be saved.
    """

    __slots__ = ("_hash",)

    def __init__(self, size: int) -> None:
        # Not chosen for its strength: it is what the origin publishes. docs/semantics.md says what it proves.
        self._hash = hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)

    def update(self, data: bytes | bytearray | memoryview) -> None:
        """Hash more bytes. Lets go of the GIL; give it a chunk at a time."""
        self._hash.update(data)

    def digest(self) -> bytes:
        """20 bytes."""
        return self._hash.digest()


def _load() -> _Libcrypto | None:
    """The first libcrypto that passes the test: the interpreter's own is loaded already, and found first."""
    with contextlib.suppress(ImportError):
        import _hashlib  # noqa: F401 - brings the interpreter's libcrypto into the process
    for name in _names():
        try:
            library = _Libcrypto(ctypes.CDLL(name))
        except (OSError, AttributeError):
            continue
        if _passes_self_test(library):
            return library
    return None


def _names() -> Iterator[str | None]:
    yield from (None, "libcrypto.so.3", "libcrypto.so.1.1")
    yield ctypes.util.find_library("crypto")  # starts processes of its own, so it comes last


def _passes_self_test(library: _Libcrypto) -> bool:
    """Known answers (FIPS 180-4 examples), and a run saved and taken up again against `hashlib`."""
    try:
        known = _SavableHasher(library, None, 0)
        known.update(b"abc")
        if known.digest().hex() != "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad":
            return False
        text = bytes(range(256)) * 5
        for cut in (64, 128, 1024):
            first = _SavableHasher(library, None, 0)
            first.update(text[:cut])
            second = _SavableHasher(library, first.state(), cut)
            second.update(text[cut:])
            if second.digest() != hashlib.sha256(text).digest():
                return False
        # Past 2^32 bits the upper half of the bit count is in use.
        long = _SavableHasher(library, first.state(), 1 << 30)
        long.update(text[:64])
        bits = long._context.low | long._context.high << 32
    except (RuntimeError, ctypes.ArgumentError):
        return False
    return bits == ((1 << 30) + 64) * 8 and first.state() != bytes(STATE_LENGTH)


_library = _load()

SAVABLE = _library is not None
"""Whether a state can be saved and taken up here."""
