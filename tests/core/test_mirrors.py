from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weightfs.core.geometry import MIB
from weightfs.core.manifest import Mirror
from weightfs.core.mirrors import FAULT_HALF_LIFE, REMEASURE_AFTER, MirrorBoard, joined
from weightfs.core.retry import RETRY_AFTER_CAP, blames_mirror
from weightfs.errors import FailureKind

DAY = 86_400.0


def board(count: int = 3, *, priorities: tuple[int, ...] = ()) -> MirrorBoard:
    priorities = priorities or (1,) * count
    return MirrorBoard([Mirror(f"https://m{n}/f", priority) for n, priority in enumerate(priorities)])


def bench_of(given_board: MirrorBoard, index: int, now: float) -> float:
    return given_board.snapshot()[index].benched_until - now


def test_no_mirrors_no_choice() -> None:
    assert MirrorBoard([]).choose(0.0) is None
    assert len(MirrorBoard([])) == 0


def test_none_when_all_are_avoided() -> None:
    made = board()
    assert made.choose(0.0, frozenset({0, 1, 2})) is None
    assert made.choose(0.0, frozenset({0, 2})) == 1
    assert len(made) == 3


def test_equals_take_turns() -> None:
    made = board()
    assert Counter(made.choose(0.0) for _ in range(9)) == {0: 3, 1: 3, 2: 3}


def test_lower_priority_number_first_whatever_the_speed() -> None:
    made = board(priorities=(2, 1, 3))
    assert made.choose(0.0) == 1
    made.succeeded(1, MIB, 100.0)
    assert {made.choose(0.0) for _ in range(5)} == {1}
    assert made.choose(0.0, frozenset({1})) == 0


def test_the_fast_one_is_preferred_and_about_equals_share() -> None:
    made = board()
    for index, seconds in ((0, 8.0), (1, 1.0), (2, 1.01)):
        made.choose(0.0, frozenset({0, 1, 2}) - {index})
        made.succeeded(index, 100 * MIB, seconds)
    assert Counter(made.choose(1.0) for _ in range(8)) == {1: 4, 2: 4}


def test_a_slow_one_is_measured_again_after_a_while() -> None:
    made = board(2)
    for index, seconds in ((0, 100.0), (1, 1.0)):
        assert made.choose(0.0) == index
        made.succeeded(index, MIB, seconds)
    assert made.choose(REMEASURE_AFTER / 2) == 1
    assert made.choose(REMEASURE_AFTER + 1) == 0


def test_faults_outrank_speed_until_they_decay() -> None:
    made = board(2)
    for index, seconds in ((0, 1.0), (1, 100.0)):
        made.choose(0.0)
        made.succeeded(index, MIB, seconds)
    made.failed(0, FailureKind.RESET, 0.0)
    assert made.choose(5.0) == 1  # no longer benched, still one fault
    made.choose(2 * FAULT_HALF_LIFE - 1, frozenset({0}))  # keeps the slow one's measurement fresh
    made.choose(2 * FAULT_HALF_LIFE - 1, frozenset({1}))
    assert made.choose(2 * FAULT_HALF_LIFE) == 0


def test_a_failed_mirror_is_benched_and_comes_back() -> None:
    made = board(2)
    made.failed(0, FailureKind.TIMEOUT, 10.0)
    assert {made.choose(10.5) for _ in range(4)} == {1}
    made.failed(1, FailureKind.TIMEOUT, 10.6)
    made.failed(1, FailureKind.TIMEOUT, 11.7)
    assert made.choose(11.8) == 0


def test_when_all_are_benched_the_first_to_return_is_given() -> None:
    made = board()
    for index, now in ((1, 0.0), (2, 0.1), (0, 0.2)):
        made.failed(index, FailureKind.CONNECT, now)
    assert made.choose(0.3) == 1
    assert made.choose(0.3, frozenset({1})) == 2


def test_all_benched_mirrors_are_tried_in_turn() -> None:
    # A failure on the bench prolongs it; otherwise the first to return would be asked for ever.
    made = board()
    for index in range(3):
        made.failed(index, FailureKind.NOT_FOUND, 0.0)
    asked = []
    for step in range(1, 7):
        chosen = made.choose(float(step))
        assert chosen is not None
        asked.append(chosen)
        made.failed(chosen, FailureKind.NOT_FOUND, float(step))
    assert asked == [0, 1, 2, 0, 1, 2]


@pytest.mark.parametrize(
    ("kind", "first", "longest"),
    [
        (FailureKind.RESET, 1.0, 60.0),
        (FailureKind.AUTH, 10.0, 600.0),
        (FailureKind.MISMATCH, 60.0, 3600.0),
    ],
)
def test_benches_double_with_each_incident_and_are_bounded(
    kind: FailureKind, first: float, longest: float
) -> None:
    made = board(1)
    benches = []
    for step in range(60):
        made.failed(0, kind, step * DAY)
        benches.append(bench_of(made, 0, step * DAY))
    assert benches[:4] == [first, 2 * first, 4 * first, 8 * first]
    assert max(benches) == benches[-1] == longest


@pytest.mark.parametrize(("kind", "bench"), [(FailureKind.RESET, 1.0), (FailureKind.MISMATCH, 60.0)])
def test_parallel_jobs_that_fail_together_are_one_incident(kind: FailureKind, bench: float) -> None:
    made = board(1)
    for _ in range(8):
        made.failed(0, kind, 100.0)
    assert bench_of(made, 0, 100.0) == bench
    assert made.snapshot()[0].faults == 8


def test_the_first_wrong_bytes_count_even_on_the_bench() -> None:
    made = board(1)
    made.failed(0, FailureKind.RESET, 0.0)
    made.failed(0, FailureKind.MISMATCH, 0.5)
    assert bench_of(made, 0, 0.5) == 60.0


def test_a_success_ends_the_streak_but_excuses_no_wrong_bytes() -> None:
    made = board(1)
    for now in (0.0, DAY):
        made.failed(0, FailureKind.RESET, now)
        made.succeeded(0, MIB, 1.0)
        assert bench_of(made, 0, now) == 1.0
    for now, bench in ((2 * DAY, 60.0), (3 * DAY, 120.0)):
        made.failed(0, FailureKind.MISMATCH, now)
        made.succeeded(0, MIB, 1.0)
        assert bench_of(made, 0, now) == bench
    assert made.snapshot()[0].mismatches == 2


@pytest.mark.parametrize("kind", [kind for kind in FailureKind if blames_mirror(kind)])
def test_wrong_bytes_bench_longest(kind: FailureKind) -> None:
    made = board(2)
    made.failed(0, FailureKind.MISMATCH, 0.0)
    made.failed(1, kind, 0.0)
    assert bench_of(made, 0, 0.0) >= bench_of(made, 1, 0.0)


@pytest.mark.parametrize("kind", [kind for kind in FailureKind if not blames_mirror(kind)])
def test_what_is_not_its_fault_changes_nothing(kind: FailureKind) -> None:
    made = board(1)
    made.failed(0, kind, 5.0)
    assert made.snapshot() == board(1).snapshot()


@pytest.mark.parametrize(
    ("retry_after", "bench"), [(0.0, 1.0), (120.0, 120.0), (1e64, RETRY_AFTER_CAP), (-5.0, 1.0)]
)
def test_retry_after_prolongs_the_bench_within_its_cap(retry_after: float, bench: float) -> None:
    made = board(1)
    made.failed(0, FailureKind.BUSY, 0.0, retry_after=retry_after)
    assert bench_of(made, 0, 0.0) == bench


def test_a_short_fault_never_ends_a_long_bench() -> None:
    made = board(1)
    made.failed(0, FailureKind.MISMATCH, 0.0)
    made.failed(0, FailureKind.RESET, 1.0)
    assert made.snapshot()[0].benched_until == 60.0


def test_snapshot_counts_bytes_and_speed_and_shows_no_secrets() -> None:
    made = MirrorBoard([Mirror("https://u:p@h/d/f?X-Amz-Signature=abc#x", 7)])
    assert made.snapshot()[0].rate is None
    made.succeeded(0, 100, 1.0)
    made.succeeded(0, 200, 1.0)
    made.succeeded(0, 50, 0.0)  # too quick to measure: counted, not rated
    made.succeeded(0, 0, 1.0)
    score = made.snapshot()[0]
    assert (score.url, score.priority, score.nbytes) == ("https://h/d/f", 7, 350)
    assert score.rate == pytest.approx(130.0)


events = st.lists(
    st.tuples(
        st.integers(0, 2),
        st.one_of(st.none(), st.sampled_from(FailureKind)),
        st.floats(0, 5_000),
        st.floats(0, 1e9),
    ),
    max_size=30,
)


@given(events, st.sets(st.integers(0, 2)))
def test_whatever_happened_a_mirror_that_is_allowed_is_given(
    history: list[tuple[int, FailureKind | None, float, float]], avoid: set[int]
) -> None:
    made, now = board(), 0.0
    for index, kind, pause, amount in history:
        now += pause
        if kind is None:
            made.succeeded(index, int(amount), pause)
        else:
            made.failed(index, kind, now, retry_after=amount)
        assert all(score.benched_until - now <= 3600.0 for score in made.snapshot())
    chosen = made.choose(now, frozenset(avoid))
    assert (chosen is None) == (avoid == {0, 1, 2})
    assert chosen not in avoid


def test_joined_mirrors_keep_their_places_and_take_the_newest_words() -> None:
    one, two, three = (Mirror(f"https://m{n}/f", 5, '"old"') for n in range(3))
    newer = Mirror(one.url, 7, '"new"')
    assert joined((one, two), (three, newer, three)) == (newer, two, three)
    assert joined((one,), ()) == (one,)
