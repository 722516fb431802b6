from __future__ import annotations

from collections.abc import Iterable
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weightfs.core.geometry import GIB, KIB, MIB, BlobShape, ByteSpan, ChunkSpan
from weightfs.core.readahead import REORDER, ReadAhead

SHAPE = BlobShape(2 * GIB, MIB)
PAGE = 4 * KIB
REQUEST = 128 * KIB  # the kernel's, unless it was raised


def reads(start: int, count: int, length: int = REQUEST) -> list[ByteSpan]:
    return [ByteSpan(start + n * length, start + (n + 1) * length) for n in range(count)]


def widths(ahead: ReadAhead, spans: Iterable[ByteSpan], *, stalled: bool = True) -> list[int]:
    """How many chunks each read asks for ahead, in order; 0 for None."""
    answers = [ahead.observe(span, stalled) for span in spans]
    return [0 if answer is None else len(answer) for answer in answers]


def test_first_contact_asks_for_nothing_more() -> None:
    ahead = ReadAhead(SHAPE)
    assert ahead.observe(ByteSpan(0, PAGE), True) is None
    assert ahead.observe(ByteSpan(GIB, GIB + MIB), True) is None


def test_the_second_read_asks_for_one_chunk_beyond_its_own() -> None:
    ahead = ReadAhead(SHAPE)
    ahead.observe(ByteSpan(0, REQUEST), True)
    assert ahead.observe(ByteSpan(REQUEST, 2 * REQUEST), True) == ChunkSpan(1, 2)


def test_the_window_doubles_when_as_much_was_read_and_the_reader_still_waits() -> None:
    got = widths(ReadAhead(SHAPE, max_window=16 * MIB), reads(0, 24 * 8))
    assert [got[8 * chunk : 8 * chunk + 8] for chunk in range(24)] == [
        [0] + [1] * 7,  # eight requests wait for chunk 0: one wait
        *[[width] * 8 for width in (2, 2, 4, 4, 4, 4, 8, 8, 8, 8, 8, 8, 8, 8, *[16] * 9)],
    ]


def test_no_more_is_ahead_than_was_read() -> None:
    ahead = ReadAhead(SHAPE)
    for span in reads(0, 100, MIB):
        window = ahead.observe(span, True)
        assert window is None or len(window) <= span.stop // MIB


def test_the_kernels_own_window_in_parallel_requests_is_one_wait() -> None:
    assert max(widths(ReadAhead(SHAPE), reads(100 * MIB, 4, MIB))) <= 4


def test_a_reader_that_never_waits_keeps_one_chunk() -> None:
    assert set(widths(ReadAhead(SHAPE), reads(0, 200), stalled=False)) == {0, 1}


def test_a_window_stays_when_the_stalls_end() -> None:
    ahead = ReadAhead(SHAPE)
    assert widths(ahead, reads(0, 32))[-1] == 4
    assert set(widths(ahead, reads(4 * MIB, 32), stalled=False)) == {4}


@pytest.mark.parametrize(
    ("max_window", "widest"), [(0, 0), (MIB - 1, 0), (MIB, 1), (3 * MIB, 3), (64 * MIB, 64)]
)
def test_max_window_bounds_and_turns_off(max_window: int, widest: int) -> None:
    assert max(widths(ReadAhead(SHAPE, max_window=max_window), reads(0, 80 * 8))) == widest


def test_the_window_may_be_lowered_and_raised_while_reading() -> None:
    ahead = ReadAhead(SHAPE)
    assert widths(ahead, reads(0, 16 * 8))[-1] == 16
    ahead.max_window = 2 * MIB
    assert set(widths(ahead, reads(16 * MIB, 16), stalled=False)) == {2}
    ahead.max_window = 0
    assert set(widths(ahead, reads(18 * MIB, 16))) == {0}
    ahead.max_window = 64 * MIB
    assert widths(ahead, reads(20 * MIB, 16 * 8))[-1] >= 8


@given(st.integers(0, 1 << 32), st.integers(2, 12))
def test_the_kernels_reordering_does_not_break_a_stream(seed: int, in_flight: int) -> None:
    random = Random(seed)
    # As many requests as are in flight at once may overtake one another.
    spans = reads(0, 40 * 8)
    order = sorted(range(len(spans)), key=lambda n: n + random.uniform(0, in_flight))
    got = widths(ReadAhead(SHAPE, max_window=16 * MIB), [spans[n] for n in order])
    assert max(got) == 16
    assert max(got[:8]) <= 4  # at most request 19 has come, so at most two chunks were left behind


def test_requests_that_arrive_swapped() -> None:
    ahead = ReadAhead(SHAPE)
    spans = reads(0, 8)
    answers = [ahead.observe(spans[n], False) for n in (1, 0, 3, 2, 5, 4, 7, 6)]
    assert answers == [None, None, ChunkSpan(1, 2), None, ChunkSpan(1, 2), None, ChunkSpan(1, 2), None]


def test_eight_interleaved_streams_each_have_their_window() -> None:
    ahead = ReadAhead(SHAPE, max_window=8 * MIB)
    streams = [reads(n * 200 * MIB, 64) for n in range(8)]
    last = {}
    for turn in zip(*streams, strict=True):
        for n, span in enumerate(turn):
            last[n] = ahead.observe(span, True)
    assert last == {n: ChunkSpan(200 * n + 8, 200 * n + 16) for n in range(8)}


def test_a_ninth_stream_displaces_the_least_recent() -> None:
    ahead = ReadAhead(SHAPE)
    for n in range(8):
        ahead.observe(ByteSpan(n * 100 * MIB, n * 100 * MIB + PAGE), True)
    ahead.observe(ByteSpan(PAGE, 2 * PAGE), True)  # the first is now the most recent
    ahead.observe(ByteSpan(GIB, GIB + PAGE), True)
    assert ahead.observe(ByteSpan(2 * PAGE, 3 * PAGE), True) == ChunkSpan(1, 2)
    assert ahead.observe(ByteSpan(100 * MIB + PAGE, 100 * MIB + 2 * PAGE), True) is None


def test_nine_streams_over_eight_slots_never_grow() -> None:
    ahead = ReadAhead(SHAPE)
    streams = [reads(n * 200 * MIB, 40) for n in range(9)]
    assert set(widths(ahead, [span for turn in zip(*streams, strict=True) for span in turn])) == {0}


@pytest.mark.parametrize("size", [8 * MIB, 64 * MIB, 2 * GIB])
@pytest.mark.parametrize("seed", range(10))
def test_random_access_never_grows_the_window(seed: int, size: int) -> None:
    # In a small blob every page is near some stream; what is missing then is density.
    random = Random(seed)
    ahead = ReadAhead(BlobShape(size, MIB))
    starts = [random.randrange(size // PAGE) * PAGE for _ in range(400)]
    assert max(widths(ahead, [ByteSpan(start, start + PAGE) for start in starts])) <= 1


def test_strides_are_no_stream() -> None:
    # One page of every 64 KiB: near enough each time, but most of the bytes are not wanted.
    spans = [ByteSpan(n * 64 * KIB, n * 64 * KIB + PAGE) for n in range(2000)]
    assert set(widths(ReadAhead(SHAPE), spans)) == {0}


def test_a_page_read_over_and_over_is_no_credit_for_a_leap() -> None:
    ahead = ReadAhead(SHAPE)
    assert set(widths(ahead, [ByteSpan(0, PAGE)] * 1000)) == {0}
    assert ahead.observe(ByteSpan(3 * MIB, 3 * MIB + PAGE), True) is None


def test_a_stream_with_small_gaps_is_one() -> None:
    # Pages that the kernel still has are not asked for again.
    spans = [span for n, span in enumerate(reads(0, 80 * 8)) if n % 4]
    assert max(widths(ReadAhead(SHAPE), spans)) == 64


def test_a_stride_that_turns_sequential_becomes_a_stream_again() -> None:
    ahead = ReadAhead(SHAPE)
    widths(ahead, [ByteSpan(n * 64 * KIB, n * 64 * KIB + PAGE) for n in range(2000)])
    assert max(widths(ahead, reads(125 * MIB, 80 * 8))) == 64


@pytest.mark.parametrize("length", [PAGE, REQUEST, MIB])
def test_backwards_reads_ask_for_nothing(length: int) -> None:
    got = widths(ReadAhead(SHAPE), reversed(reads(0, 64 * MIB // length, length)))
    assert set(got) == {0}


def test_a_read_again_asks_for_nothing() -> None:
    ahead = ReadAhead(SHAPE)
    spans = reads(0, 16)
    assert widths(ahead, spans)[-1] == 2
    assert set(widths(ahead, spans)) == {0}


def test_a_second_pass_is_a_stream_of_its_own() -> None:
    ahead = ReadAhead(SHAPE)
    widths(ahead, reads(0, 20 * 8))
    assert widths(ahead, reads(0, 4 * 8))[-1] == 4


@pytest.mark.parametrize(("beyond", "one_stream"), [(REORDER, True), (REORDER + 1, False)])
def test_how_far_ahead_of_the_frontier_a_stream_reaches(beyond: int, one_stream: bool) -> None:
    ahead = ReadAhead(SHAPE)
    ahead.observe(ByteSpan(0, 16 * MIB), False)
    start = 16 * MIB + beyond
    assert (ahead.observe(ByteSpan(start, start + MIB), False) is not None) == one_stream


@pytest.mark.parametrize(("behind", "one_stream"), [(REORDER, True), (REORDER + 1, False)])
def test_how_far_behind_the_frontier_a_stream_reaches(behind: int, one_stream: bool) -> None:
    ahead = ReadAhead(SHAPE, streams=1)
    ahead.observe(ByteSpan(0, 16 * MIB), False)
    ahead.observe(
        ByteSpan(16 * MIB - behind, 16 * MIB - behind + PAGE), False
    )  # another stream displaces the only one
    assert (ahead.observe(ByteSpan(16 * MIB, 17 * MIB), False) is not None) == one_stream


def test_llama_cpp_tail_then_head_then_all() -> None:
    ahead = ReadAhead(SHAPE)
    assert ahead.observe(ByteSpan(SHAPE.size - PAGE, SHAPE.size), True) is None
    assert widths(ahead, reads(0, 64 * 8))[-1] == 64


def test_never_past_the_end() -> None:
    shape = BlobShape(3 * MIB + 5, MIB)
    ahead = ReadAhead(shape)
    ahead.observe(ByteSpan(0, MIB), True)
    assert ahead.observe(ByteSpan(MIB, 2 * MIB), True) == ChunkSpan(2, 4)
    assert ahead.observe(ByteSpan(2 * MIB, 3 * MIB), True) == ChunkSpan(3, 4)
    assert ahead.observe(ByteSpan(3 * MIB, 4 * MIB), True) is None
    assert ahead.observe(ByteSpan(4 * MIB, 5 * MIB), True) is None


def test_empty_reads_and_empty_blobs_leave_no_trace() -> None:
    ahead = ReadAhead(SHAPE, streams=1)
    ahead.observe(ByteSpan(0, PAGE), True)
    assert ahead.observe(ByteSpan(GIB, GIB), True) is None
    assert ahead.observe(ByteSpan(SHAPE.size, SHAPE.size + PAGE), True) is None
    assert ahead.observe(ByteSpan(PAGE, 2 * PAGE), True) == ChunkSpan(1, 2)
    assert ReadAhead(BlobShape(0, MIB)).observe(ByteSpan(0, PAGE), True) is None


def test_at_least_one_stream_is_followed() -> None:
    with pytest.raises(ValueError, match="not 0"):
        ReadAhead(SHAPE, streams=0)


@given(
    st.integers(0, 40 * MIB),
    st.lists(st.tuples(st.integers(0, 44 * MIB), st.integers(0, 5 * MIB), st.booleans()), max_size=60),
    st.integers(0, 8 * MIB),
)
def test_any_reads_at_all_keep_the_bounds(
    size: int, given_reads: list[tuple[int, int, bool]], max_window: int
) -> None:
    shape = BlobShape(size, MIB)
    ahead = ReadAhead(shape, max_window=max_window, streams=3)
    for start, length, stalled in given_reads:
        span = ByteSpan(start, start + length)
        answer = ahead.observe(span, stalled)
        if answer is not None:
            assert answer.start == shape.chunks_covering(span).stop
            assert 0 < len(answer) <= max_window // MIB
            assert answer.stop <= shape.chunk_count
