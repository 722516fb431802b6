from __future__ import annotations

import ctypes
import hashlib
import random
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weightfs.engine import running
from weightfs.engine.running import BLOCK, SAVABLE, RunningSha256

savable = pytest.mark.skipif(not SAVABLE, reason="no libcrypto whose SHA-256 can be saved")
pieces = st.lists(st.binary(max_size=300), max_size=12)


def the_library() -> running._Libcrypto:
    assert running._library is not None
    return running._library


def test_this_machine_can_save() -> None:
    assert SAVABLE, "CI has OpenSSL: without it the tests of saving would be skipped unseen"


@given(pieces)
def test_equals_hashlib_at_every_step(parts: list[bytes]) -> None:
    mine, theirs = RunningSha256(), hashlib.sha256()
    for part in parts:
        mine.update(part)
        theirs.update(part)
        assert mine.digest() == theirs.digest()
    assert mine.length == sum(map(len, parts))


@savable
@given(st.binary(max_size=2000), st.integers(0, 40), st.binary(max_size=500))
def test_saved_and_taken_up_again(data: bytes, blocks: int, rest: bytes) -> None:
    cut = min(blocks, len(data) // BLOCK) * BLOCK
    first = RunningSha256()
    first.update(data[:cut])
    second = RunningSha256(first.state(), cut)
    assert second.length == cut
    assert second.state() == first.state()
    second.update(data[cut:])
    second.update(rest)
    assert second.digest() == hashlib.sha256(data + rest).digest()


@savable
@given(st.binary(max_size=400), st.binary(max_size=400), st.binary(max_size=400))
def test_a_copy_goes_its_own_way(common: bytes, left: bytes, right: bytes) -> None:
    one = RunningSha256()
    one.update(common)
    two = one.copy()
    one.update(left)
    two.update(right)
    assert one.digest() == hashlib.sha256(common + left).digest()
    assert two.digest() == hashlib.sha256(common + right).digest()


@given(st.binary(max_size=1000))
def test_takes_every_kind_of_buffer(data: bytes) -> None:
    expected = hashlib.sha256(data).digest()
    words = memoryview(bytearray(data[: len(data) // 4 * 4])).cast("I") if len(data) >= 4 else memoryview(b"")
    for buffer in (data, bytearray(data), memoryview(data), memoryview(bytearray(data))):
        mine = RunningSha256()
        mine.update(buffer)
        assert mine.digest() == expected
        assert mine.length == len(data)
    mine = RunningSha256()
    mine.update(words)  # a memoryview's len() counts items, not bytes
    assert mine.length == words.nbytes
    assert mine.digest() == hashlib.sha256(words).digest()


@savable
def test_the_intermediate_value_is_that_of_fips_180_4() -> None:
    # FIPS 180-2, appendix B.2: H(1) after the first block of the two-block message "abcdbcdecdef…".
    message = b"abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq"
    block = message + b"\x80" + bytes(7)
    mine = RunningSha256()
    mine.update(block)
    assert mine.state().hex() == "85e655d6417a17953363376a624cde5c76e09589cac5f811cc4b32c1f20e533a"


@savable
def test_a_state_off_a_block_boundary_is_refused() -> None:
    mine = RunningSha256()
    mine.update(b"x" * 65)
    with pytest.raises(ValueError, match="65 bytes cannot be saved"):
        mine.state()


@pytest.mark.parametrize(
    ("state", "length"),
    [(None, 64), (bytes(31), 64), (bytes(33), 64), (bytes(32), 63), (bytes(32), -64), (bytes(32), 1 << 62)],
)
def test_states_that_cannot_be(state: bytes | None, length: int) -> None:
    with pytest.raises(ValueError, match=r"SHA-256"):
        RunningSha256(state, length)


@savable
def test_past_2_to_the_32_bits() -> None:
    zeros = bytes(64 << 20)
    mine, theirs = RunningSha256(), hashlib.sha256()
    for _ in range(8):
        mine.update(zeros)
        theirs.update(zeros)
    resumed = RunningSha256(mine.state(), mine.length)
    resumed.update(b"end")
    theirs.update(b"end")
    assert resumed.digest() == theirs.digest()


@savable
def test_several_threads_with_one_each() -> None:
    data = [random.Random(seed).randbytes(1 << 20) for seed in range(4)]
    found: dict[int, bytes] = {}

    def work(number: int) -> None:
        mine = RunningSha256()
        for start in range(0, 1 << 20, 1 << 14):
            mine.update(data[number][start : start + (1 << 14)])
        found[number] = mine.digest()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {number: hashlib.sha256(data[number]).digest() for number in range(4)}


def test_without_libcrypto_hashlib_does_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running, "_library", None)
    mine = RunningSha256()
    mine.update(b"x" * 64)
    twin = mine.copy()
    mine.update(memoryview(b"y"))
    assert mine.digest() == hashlib.sha256(b"x" * 64 + b"y").digest()
    assert twin.digest() == hashlib.sha256(b"x" * 64).digest()
    with pytest.raises(NotImplementedError, match="hash from the start"):
        twin.state()
    with pytest.raises(NotImplementedError, match="hash from the start"):
        RunningSha256(bytes(32), 64)


@savable
def test_the_self_test_notices_a_library_with_another_context() -> None:
    library = the_library()
    assert running._passes_self_test(library)

    class Shifted:
        """One that keeps the bit count elsewhere: states taken up again end in another digest."""

        init, final = library.init, library.final

        @staticmethod
        def update(context: object, data: object, size: int) -> int:
            result = library.update(context, data, size)
            inner = context._obj  # type: ignore[attr-defined]  # ctypes.byref keeps its object there
            inner.high ^= 1
            return result

    assert not running._passes_self_test(Shifted())  # type: ignore[arg-type]  # a stand-in


@savable
def test_a_refusing_library_is_an_error_and_not_a_digest() -> None:
    library = the_library()

    class Refusing:
        init, update = library.init, library.update

        @staticmethod
        def final(digest: object, context: object) -> int:
            return 0

    hasher = running._SavableHasher(Refusing(), None, 0)  # type: ignore[arg-type]  # a stand-in
    with pytest.raises(RuntimeError, match="libcrypto"):
        hasher.digest()
    assert not running._passes_self_test(Refusing())  # type: ignore[arg-type]


def test_no_libcrypto_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str | None) -> object:
        raise OSError(f"no {name}")

    monkeypatch.setattr(ctypes, "CDLL", missing)
    monkeypatch.setattr(ctypes.util, "find_library", lambda _: "libcrypto-nowhere.so")
    assert running._load() is None
