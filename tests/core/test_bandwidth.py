"""Limits are kept however many jobs there are, readers go first, and nobody waits for a host that is not theirs."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weightfs.core.bandwidth import BURST_SECONDS, Pacer, Timetable

KB = 1000
HOSTS = ("a.example", "b.example", "c.example")


def always(rate: int | None) -> Timetable:
    return Timetable(((0, rate),))


def test_a_timetable_holds_from_each_step_on_and_past_midnight() -> None:
    table = Timetable(((8 * 60, 100), (18 * 60, None), (23 * 60, 300)))
    times = {"00:00": 300, "07:59": 300, "08:00": 100, "17:59": 100, "18:00": None, "23:59": 300}
    for text, rate in times.items():
        hour, minute = text.split(":")
        assert table.rate(int(hour) * 60 + int(minute)) == rate


@pytest.mark.parametrize(
    "steps", [(), ((5, 1), (5, 2)), ((9, 1), (5, 2)), ((-1, 1),), ((1440, 1),), ((0, 0),)]
)
def test_a_timetable_that_is_none(steps: tuple[tuple[int, int | None], ...]) -> None:
    with pytest.raises(ValueError, match="not"):
        Timetable(steps)


@dataclass
class Run:
    """Jobs that receive without end, each `piece` bytes at a time, in a world without other delays."""

    pacer: Pacer
    piece: int
    now: float = 100.0

    def until(
        self, end: float, hosts: dict[int, str], urgent: frozenset[int], minute: int = 0
    ) -> dict[int, int]:
        """Bytes received by each job."""
        got = dict.fromkeys(hosts, 0)

        def receive(job: int) -> None:
            got[job] += self.piece
            self.pacer.pay(job, hosts[job], self.piece, urgent=job in urgent)

        for job in hosts:
            receive(job)
        while True:
            gone, due = self.pacer.next(self.now, minute)
            for job in gone:
                receive(job)
            if not gone:
                assert due > self.now  # else it would spin
                if due >= end:
                    return got
                self.now = due


@given(
    overall=st.none() | st.integers(50 * KB, 900 * KB),
    limits=st.dictionaries(st.sampled_from(HOSTS), st.integers(20 * KB, 900 * KB), min_size=1),
    jobs=st.integers(1, 12),
    urgent=st.frozensets(st.integers(0, 11)),
    piece=st.integers(20 * KB, 90 * KB),
)
def test_no_limit_is_exceeded_and_none_is_left_unused(
    overall: int | None, limits: dict[str, int], jobs: int, urgent: frozenset[int], piece: int
) -> None:
    pacer = Pacer(
        None if overall is None else always(overall), {host: always(rate) for host, rate in limits.items()}
    )
    # Of a host without a limit anything might come at once, unless there is an overall one.
    names = [host for host in HOSTS if overall is not None or host in limits]
    hosts = {job: names[job % len(names)] for job in range(jobs)}
    seconds = 5.0
    got = Run(pacer, piece).until(100.0 + seconds, hosts, urgent)
    for host, rate in (*limits.items(), ("", overall)):
        mine = [job for job in hosts if host in ("", hosts[job])]
        total = sum(got[job] for job in mine)
        if rate is not None:
            assert total <= rate * (seconds + BURST_SECONDS) + (len(mine) + 1) * piece
    if overall is not None and not limits.keys() & set(hosts.values()):
        assert sum(got.values()) >= overall * seconds - piece


@given(jobs=st.integers(2, 12), urgent=st.integers(0, 11), piece=st.integers(20 * KB, 90 * KB))
def test_who_a_reader_waits_for_has_the_line_to_itself(jobs: int, urgent: int, piece: int) -> None:
    hosts = dict.fromkeys(range(jobs), HOSTS[0])
    first = urgent % jobs
    got = Run(Pacer(always(500 * KB), {}), piece).until(105.0, hosts, frozenset((first,)))
    # Only what the line had not used before was anybody's.
    others = sum(got[job] for job in hosts if job != first)
    assert others <= 500 * KB * BURST_SECONDS + jobs * piece
    assert others + got[first] >= 500 * KB * 5 - piece


@given(jobs=st.integers(2, 12), piece=st.integers(20 * KB, 90 * KB))
def test_equals_share_alike(jobs: int, piece: int) -> None:
    hosts = dict.fromkeys(range(jobs), HOSTS[0])
    got = Run(Pacer(always(500 * KB), {}), piece).until(105.0, hosts, frozenset())
    assert max(got.values()) - min(got.values()) <= piece


def test_a_host_at_its_limit_holds_up_nobody_else() -> None:
    pacer = Pacer(None, {HOSTS[0]: always(1), HOSTS[1]: always(1_000_000)})
    pacer.pay(1, HOSTS[0], 1000, urgent=True)
    assert pacer.next(0.0, 0)[0] == [1]
    pacer.pay(1, HOSTS[0], 1000, urgent=True)
    pacer.pay(2, HOSTS[1], 1000, urgent=False)
    gone, due = pacer.next(0.0, 0)
    assert gone == [2]
    assert due == 1000 - BURST_SECONDS


def test_who_has_no_limit_is_not_paced() -> None:
    pacer = Pacer(None, {HOSTS[0]: always(1)})
    assert [pacer.paces(host) for host in HOSTS] == [True, False, False]
    pacer.pay(1, HOSTS[1], 1000, urgent=False)  # asked all the same
    assert pacer.next(0.0, 0) == ([1], float("inf"))
    assert Pacer(always(1), {}).paces(HOSTS[1])


def test_a_job_that_ended_is_not_told_and_what_it_received_counts() -> None:
    pacer = Pacer(always(1000), {})
    pacer.pay(1, HOSTS[0], 2000, urgent=False)
    assert pacer.next(0.0, 0)[0] == [1]
    pacer.forget(1)
    pacer.pay(2, HOSTS[0], 1000, urgent=False)
    pacer.forget(2)
    assert pacer.next(0.0, 0) == ([], float("inf"))
    pacer.pay(3, HOSTS[0], 1000, urgent=False)
    assert pacer.next(0.0, 0) == ([], 2 - BURST_SECONDS)


def test_the_limit_of_the_hour_counts_from_then_on() -> None:
    pacer = Pacer(Timetable(((0, 1000), (60, None))), {})
    pacer.pay(1, HOSTS[0], 9000, urgent=False)
    assert pacer.next(0.0, 59)[0] == [1]
    pacer.pay(1, HOSTS[0], 9000, urgent=False)
    assert pacer.next(0.0, 59) == ([], 9 - BURST_SECONDS)
    assert pacer.next(0.0, 60) == ([1], float("inf"))
