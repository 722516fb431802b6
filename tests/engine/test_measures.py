"""What is counted, and that it stays small."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from trio.testing import MockClock

from weightfs.core.geometry import MIB, ByteSpan
from weightfs.core.manifest import Trust
from weightfs.core.ref import parse_ref
from weightfs.engine.settings import EngineSettings, FillMode
from weightfs.engine.tally import MAX_HOSTS, OTHER, Histogram, Tally
from weightfs.errors import FailureKind, ReadError
from weightfs.testing.engines import running_engine
from weightfs.testing.nginx import Nginx

SIZE = 2 * MIB + 5
LAZY = EngineSettings(workers=0, fill=FillMode.NEVER, read_timeout=5.0)


@given(st.lists(st.floats(0, 100)))
def test_a_histogram_is_what_counting_gives(values: list[float]) -> None:
    bounds = (0.5, 1.0, 10.0)
    histogram = Histogram(bounds)
    for value in values:
        histogram.observe(value)
    found = histogram.frozen()
    assert sum(found.counts) == len(values)
    for index, bound in enumerate(bounds):
        assert sum(found.counts[: index + 1]) == sum(value <= bound for value in values)
    assert found.total == pytest.approx(sum(values))


async def test_the_time_of_a_block_counts_however_it_ends(autojump_clock: MockClock) -> None:
    histogram = Histogram((1.0, 3.0))
    with trio.move_on_after(2), histogram.timing():
        await trio.sleep_forever()
    assert histogram.frozen().counts == (0, 1, 0)


@pytest.mark.parametrize(
    ("url", "host"),
    [
        ("https://user:pw@CDN.example.com/a?sig=1", "cdn.example.com"),
        ("http://127.0.0.1:8080/a", "127.0.0.1:8080"),
        ("file:///srv/m.gguf", "file"),
        ("http://[::1/a", OTHER),
        ("http://h:99999/a", OTHER),
    ],
)
def test_the_name_of_a_host_holds_no_secret(url: str, host: str) -> None:
    tally = Tally()
    tally.host(url).failures += 1
    assert list(tally.hosts) == [host]


def test_hosts_beyond_the_bound_are_counted_together() -> None:
    tally = Tally()
    for number in range(10 * MAX_HOSTS):
        tally.host(f"https://h{number}.example.com/").nbytes += 1
    assert len(tally.hosts) == MAX_HOSTS + 1
    assert tally.hosts[OTHER].nbytes == 9 * MAX_HOSTS
    tally.host("https://h0.example.com/").nbytes += 1
    assert tally.hosts["h0.example.com"].nbytes == 2


@pytest.fixture
def origin(tmp_path: Path) -> Iterator[Nginx]:
    root = tmp_path / "origin"
    root.mkdir()
    (root / "m.bin").write_bytes(random.Random(1).randbytes(SIZE))
    with Nginx(root) as nginx:
        yield nginx


@pytest.mark.nginx
async def test_reads_fetches_and_hosts_are_counted(tmp_path: Path, origin: Nginx) -> None:
    async with running_engine(tmp_path / "cache", LAZY) as engine:
        blob = (await engine.add(parse_ref(origin.url("m.bin")))).entries[0].blob
        before = await engine.measures()
        assert (before.refs, before.blobs.nbytes, before.blobs.complete) == (1, SIZE, 0)
        assert before.blobs.by_trust[Trust.UNVERIFIABLE] == 1
        assert set(before.fetch_failures) == set(FailureKind)
        await engine.read(blob.id, ByteSpan(0, 10))
        await engine.read(blob.id, ByteSpan(0, 10))  # from the cache: nobody waits
        await engine.quiet()
        after = await engine.measures()
        assert sum(after.chunk_waits.counts) == 1
        assert sum(after.read_waits.counts) == 1
        assert after.fetched_bytes == after.blobs.present_bytes >= MIB
        assert [(one.host, one.nbytes, one.failures) for one in after.hosts] == [
            (f"127.0.0.1:{origin.port}", after.fetched_bytes, 0)
        ]
        assert sum(after.fetches.counts) >= 1
        assert after.blobs.open_handles == 0
        assert not after.in_trouble


@pytest.mark.nginx
async def test_failures_are_counted_by_kind_and_by_host(tmp_path: Path, origin: Nginx) -> None:
    async with running_engine(tmp_path / "cache", LAZY) as engine:
        blob = (await engine.add(parse_ref(origin.url("m.bin")))).entries[0].blob
        (tmp_path / "origin" / "m.bin").unlink()
        with pytest.raises(ReadError) as caught:
            await engine.read(blob.id, ByteSpan(0, 10))
        found = await engine.measures()
        assert found.read_failures[caught.value.kind] == 1
        assert found.fetch_failures[FailureKind.NOT_FOUND] >= 1
        assert found.hosts[0].failures == sum(found.fetch_failures.values())
        assert found.blobs.unfetchable == 1
