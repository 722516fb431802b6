"""Prometheus metrics: what the engine and the mount count, as it is when it is asked for.

Rules: no global state: each scrape makes its own registry, from frozen values. The number of series is bounded: the
labels are mirrors' hosts (at most 32, and `other`: `engine.tally`) and words of our own enums; never a ref, a blob, a
path or a URL. Names and units follow https://prometheus.io/docs/practices/naming/: base units, `_total` for counters.
docs/monitoring/README.md lists them. prometheus_client is imported here alone, and in the thread that needs it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Final, Protocol

import trio

import weightfs

if TYPE_CHECKING:
    from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily, Metric

    from weightfs.engine.measures import HostMeasures, Measures  # only types: a command has no engine
    from weightfs.engine.tally import HistogramMeasures

# Half of what Prometheus waits for by default, so that it hears why rather than nothing.
SCRAPE_SECONDS: Final = 5.0
OPENMETRICS: Final = "application/openmetrics-text"


@dataclass(frozen=True, slots=True)
class MountMeasures:
    """What a mount counts since it began: the fields of `mount.stats.MountStats`. `oldest_read` in seconds."""

    reads: int
    read_bytes: int
    failed_reads: int
    delayed_reads: int
    held_reads: int
    internal_errors: int
    passed_opens: int
    passed_files: int
    reads_in_flight: int
    oldest_read: float


class MeasuredEngine(Protocol):
    """The part of `engine.Engine` that is measured."""

    async def measures(self) -> Measures:
        """From memory."""
        ...


@dataclass(frozen=True, slots=True)
class Exposition:
    """One answer to a scrape."""

    body: bytes
    content_type: str


class Scraper:
    """Answers scrapes of one engine and, if there is one, its mount."""

    def __init__(self, engine: MeasuredEngine, mount: Callable[[], MountMeasures] | None) -> None:
        self._engine = engine
        self._mount = mount
        self._one_at_a_time = trio.CapacityLimiter(1)

    async def scrape(self, accept: str) -> Exposition:
        """Everything: OpenMetrics if the header Accept names it, else Prometheus' text.

        trio.TooSlowError after `SCRAPE_SECONDS`.
        """
        with trio.fail_after(SCRAPE_SECONDS):
            measures = await self._engine.measures()
            mount = None if self._mount is None else self._mount()
            return await trio.to_thread.run_sync(
                _expose, measures, mount, accept, limiter=self._one_at_a_time, abandon_on_cancel=True
            )


def _expose(measures: Measures, mount: MountMeasures | None, accept: str) -> Exposition:
    from prometheus_client import CollectorRegistry, ProcessCollector
    from prometheus_client.exposition import choose_encoder

    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Collected(measures, mount))
    ProcessCollector(registry=registry)
    # The library does not see the header itself: it fails with a TypeError on some, and sends back what it was sent.
    named = any(kind.partition(";")[0].strip().lower() == OPENMETRICS for kind in accept.split(","))
    encode, content_type = choose_encoder(OPENMETRICS if named else "")
    return Exposition(encode(registry), content_type)


class _Collected:
    """`prometheus_client.registry.Collector` of values that are there already."""

    def __init__(self, measures: Measures, mount: MountMeasures | None) -> None:
        self._measures = measures
        self._mount = mount

    def collect(self) -> Iterator[Metric]:
        yield _gauge("weightfs_build_info", "The version that runs.", {weightfs.__version__: 1}, "version")
        yield from _holdings(self._measures)
        yield from _room(self._measures)
        yield from _reading(self._measures)
        yield from _fetching(self._measures)
        yield from _mirrors(self._measures.hosts)
        if self._mount is not None:
            yield from _mount(self._mount)


def _holdings(measures: Measures) -> Iterator[Metric]:
    blobs = measures.blobs
    yield _gauge("weightfs_refs", "Models that are known.", measures.refs)
    yield _gauge("weightfs_pinned_refs", "Models that are kept whole.", measures.pinned_refs)
    yield _gauge("weightfs_blobs", "Files, each once, by how far they are verified.", blobs.by_trust, "trust")
    yield _gauge("weightfs_complete_blobs", "Files of which every chunk is cached.", blobs.complete)
    yield _gauge("weightfs_filling_blobs", "Files that are completed in the background.", blobs.filling)
    yield _gauge(
        "weightfs_unfetchable_blobs",
        "Files of which something is given up for now: see `error` in `weightfs status`.",
        blobs.unfetchable,
    )
    yield _gauge("weightfs_open_handles", "Handles of files that programs have open.", blobs.open_handles)
    yield _gauge("weightfs_blobs_size_bytes", "Size of all files, each once.", blobs.nbytes)
    yield _gauge(
        "weightfs_blobs_present_bytes", "The part of them that is in the cache.", blobs.present_bytes
    )


def _room(measures: Measures) -> Iterator[Metric]:
    yield _gauge(
        "weightfs_cache_held_bytes",
        "Room that chunks take: cached, in flight, and not given back.",
        measures.held_bytes,
    )
    yield _gauge(
        "weightfs_cache_limit_bytes",
        "What they may take now, by max-size and min-free; +Inf without a limit.",
        math.inf if measures.limit_bytes is None else measures.limit_bytes,
    )
    yield _gauge(
        "weightfs_cache_filesystem_free_bytes", "Free on the cache's filesystem.", measures.free_bytes
    )
    yield _gauge("weightfs_cache_filesystem_size_bytes", "Size of that filesystem.", measures.total_bytes)
    yield _gauge(
        "weightfs_cache_in_trouble",
        "1 if the cache cannot keep what is fetched: see `trouble` in `weightfs status`.",
        int(measures.in_trouble),
    )
    yield _counter("weightfs_evicted_bytes", "Bytes evicted to make room.", measures.evicted_bytes)
    yield _counter("weightfs_disk_faults", "Chunks that the disk did not keep.", measures.disk_faults)


def _reading(measures: Measures) -> Iterator[Metric]:
    yield _gauge(
        "weightfs_waiting_readers", "Readers that wait for chunks to be fetched.", measures.waiting_readers
    )
    yield _histogram(
        "weightfs_read_wait_seconds",
        "Time of reads that could not be answered at once, by the end of it.",
        measures.read_waits,
    )
    yield _histogram(
        "weightfs_chunk_wait_seconds",
        "Time that somebody waited for chunks to be fetched.",
        measures.chunk_waits,
    )
    yield _counter(
        "weightfs_read_failures", "Reads that the engine gave up, by reason.", measures.read_failures, "kind"
    )


def _fetching(measures: Measures) -> Iterator[Metric]:
    yield _gauge(
        "weightfs_fetches_in_flight",
        "Requests to mirrors, by who wants them.",
        measures.in_flight,
        "priority",
    )
    yield _histogram("weightfs_fetch_seconds", "Time of requests to mirrors.", measures.fetches)
    yield _counter(
        "weightfs_fetch_failures", "Requests that failed, by reason.", measures.fetch_failures, "kind"
    )
    yield _counter("weightfs_fetched_bytes", "Bytes of chunks that were fetched.", measures.fetched_bytes)
    yield _counter(
        "weightfs_mismatched_chunks",
        "Chunks that were not what their list says, and refused.",
        measures.mismatched_chunks,
    )
    yield _gauge("weightfs_fetch_workers", "Worker processes that live.", measures.workers)
    yield _gauge("weightfs_fetch_workers_wanted", "Worker processes that should.", measures.workers_wanted)
    yield _counter(
        "weightfs_fetch_worker_restarts",
        "Workers that ended before their time.",
        measures.worker_restarts,
    )


def _mirrors(hosts: Iterable[HostMeasures]) -> Iterator[Metric]:
    """By host; of one that was never asked there is no series."""
    hosts = tuple(hosts)
    yield _counter(
        "weightfs_mirror_fetched_bytes",
        "Bytes of chunks that a host gave.",
        {one.host: one.nbytes for one in hosts},
        "host",
    )
    yield _counter(
        "weightfs_mirror_failures",
        "Requests to a host that failed.",
        {one.host: one.failures for one in hosts},
        "host",
    )
    yield _counter(
        "weightfs_mirror_mismatched_chunks",
        "Chunks of a host that were not what their list says.",
        {one.host: one.mismatches for one in hosts},
        "host",
    )


def _mount(mount: MountMeasures) -> Iterator[Metric]:
    yield _counter("weightfs_mount_reads", "Reads that were answered with bytes.", mount.reads)
    yield _counter("weightfs_mount_read_bytes", "Bytes that they got.", mount.read_bytes)
    yield _counter(
        "weightfs_mount_failed_reads", "Reads that were answered with an errno.", mount.failed_reads
    )
    yield _counter(
        "weightfs_mount_delayed_reads",
        "Reads that were tried only after the time of an earlier failure.",
        mount.delayed_reads,
    )
    yield _gauge("weightfs_mount_held_reads", "Reads whose answer is held back.", mount.held_reads)
    yield _gauge("weightfs_mount_reads_in_flight", "Reads that are not answered.", mount.reads_in_flight)
    yield _gauge("weightfs_mount_oldest_read_seconds", "Age of the oldest of them.", mount.oldest_read)
    yield _counter(
        "weightfs_mount_internal_errors",
        "Requests that met an error nobody foresaw; the log has it.",
        mount.internal_errors,
    )
    yield _counter(
        "weightfs_mount_passthrough_opens",
        "Opens after which the kernel reads from the cache itself: those reads are not counted.",
        mount.passed_opens,
    )
    yield _gauge("weightfs_mount_passthrough_files", "Files that are open in that way.", mount.passed_files)


def _gauge(name: str, text: str, value: float | Mapping[str, int], label: str = "") -> Metric:
    from prometheus_client.core import GaugeMetricFamily

    if not isinstance(value, Mapping):
        return GaugeMetricFamily(name, text, value=value)
    family = GaugeMetricFamily(name, text, labels=[label])
    for one, count in value.items():
        family.add_metric([one], count)
    return family


def _counter(name: str, text: str, value: int | Mapping[str, int], label: str = "") -> CounterMetricFamily:
    """`name` without `_total`, which the format puts there."""
    from prometheus_client.core import CounterMetricFamily

    if not isinstance(value, Mapping):
        return CounterMetricFamily(name, text, value=value)
    family = CounterMetricFamily(name, text, labels=[label])
    for one, count in value.items():
        family.add_metric([one], count)
    return family


def _histogram(name: str, text: str, value: HistogramMeasures) -> HistogramMetricFamily:
    from prometheus_client.core import HistogramMetricFamily

    bounds = [*map(str, value.bounds), "+Inf"]
    buckets = list(zip(bounds, map(float, accumulate(value.counts)), strict=True))
    return HistogramMetricFamily(name, text, buckets=buckets, sum_value=value.total)
