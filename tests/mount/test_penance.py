from __future__ import annotations

import errno

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weightfs.core.geometry import ByteSpan
from weightfs.errors import FailureKind, ReadError
from weightfs.mount.errno import errno_of
from weightfs.mount.penance import Penance, Sentence

PAGE = ByteSpan(8192, 12288)
CHUNK = ByteSpan(0, 1 << 20)


def fail(penance: Penance, now: float, span: ByteSpan = PAGE, *, whole: bool = False) -> Sentence:
    return penance.failed(1, span, errno.EIO, now, now, waited=False, whole=whole)


def test_a_failure_is_held_for_a_second_and_twice_as_long_each_time_up_to_the_cap() -> None:
    penance = Penance(base=1.0, cap=16.0)
    now, holds = 0.0, []
    for _ in range(7):
        assert penance.recall(1, PAGE, now) is None
        sentence = fail(penance, now)
        holds.append(sentence.until - now)
        now = sentence.until
    assert holds == [1.0, 2.0, 4.0, 8.0, 16.0, 16.0, 16.0]


def test_what_is_asked_during_the_hold_waits_for_its_end_and_then_has_paid() -> None:
    penance = Penance()
    fail(penance, 0.0)
    assert fail(penance, 1.0).until == 3.0
    assert penance.recall(1, PAGE, 1.5) == 3.0
    assert penance.recall(2, PAGE, 1.5) is None
    assert penance.failed(1, PAGE, errno.EIO, 1.5, 3.0, waited=True).until == 3.0
    assert penance.recall(1, PAGE, 3.0) == 7.0


def test_no_failing_answer_comes_sooner_than_a_second_after_its_question() -> None:
    penance = Penance()
    fail(penance, 0.0)
    assert penance.recall(1, PAGE, 0.9) == 1.0
    assert penance.failed(1, PAGE, errno.EIO, 0.9, 1.0, waited=True).until == 1.9


def test_readers_that_fail_together_are_one_failure() -> None:
    penance = Penance()
    together = [fail(penance, 0.0) for _ in range(50)]
    assert {sentence.failures for sentence in together} == {1}
    assert [sentence.news for sentence in together] == [True] + [False] * 49
    assert fail(penance, 1.0).failures == 2


@pytest.mark.parametrize(
    ("asked", "remembered"),
    [
        (PAGE, True),
        (ByteSpan(0, 1 << 20), True),  # wants the failing bytes as well
        (ByteSpan(8192, 12287), False),  # may be well without the last byte
        (ByteSpan(0, 8192), False),
    ],
)
def test_only_reads_that_want_all_of_a_failed_read_share_its_fate(asked: ByteSpan, remembered: bool) -> None:
    penance = Penance()
    fail(penance, 0.0)
    assert (penance.recall(1, asked, 0.5) is not None) is remembered


@pytest.mark.parametrize(("start", "remembered"), [(0, True), ((1 << 20) - 1, True), (1 << 20, False)])
def test_every_read_that_touches_a_failed_chunk_shares_its_fate(start: int, remembered: bool) -> None:
    penance = Penance()
    fail(penance, 0.0, CHUNK, whole=True)
    assert (penance.recall(1, ByteSpan(start, start + 1), 0.5) is not None) is remembered


def test_success_forgives_and_time_forgets() -> None:
    penance = Penance(memory=10.0)
    fail(penance, 0.0)
    penance.forgive(1, ByteSpan(0, 1 << 20))
    assert fail(penance, 1.0).failures == 1
    assert fail(penance, 2.0).failures == 2
    assert fail(penance, 14.0).failures == 1


reads = st.tuples(
    st.integers(1, 3), st.integers(0, 40), st.integers(1, 10), st.floats(0.0, 3.0), st.booleans()
)


@given(st.lists(reads, max_size=200))
def test_never_two_fetches_of_one_range_within_the_hold(
    events: list[tuple[int, int, int, float, bool]],
) -> None:
    penance = Penance(base=1.0, cap=4.0, slots=1000)
    fetched: dict[tuple[int, ByteSpan], float] = {}
    now = 0.0
    for ino, start, length, wait, well in events:
        now += wait
        span = ByteSpan(start, start + length)
        patience = penance.recall(ino, span, now)
        if patience is not None:
            assert now < patience <= now + 4.0
            continue
        if well:
            penance.forgive(ino, span)
            fetched = {key: at for key, at in fetched.items() if key[0] != ino}
            continue
        assert now >= fetched.get((ino, span), -9.0) + 1.0
        assert now + 1.0 <= penance.failed(ino, span, errno.EIO, now, now, waited=False).until <= now + 4.0
        fetched[ino, span] = now


def test_the_table_is_bounded() -> None:
    small = Penance(slots=5)
    for number in range(50):
        fail(small, 0.0, ByteSpan(number, number + 1))
        assert len(small) <= 5


@pytest.mark.parametrize("kind", list(FailureKind))
def test_every_kind_has_its_errno(kind: FailureKind) -> None:
    expected = errno.ESTALE if kind is FailureKind.CHANGED else errno.EIO
    assert errno_of(ReadError("x", kind=kind)) == expected
    assert errno_of(RuntimeError()) == errno.EIO
