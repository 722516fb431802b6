"""A frozen sum of what one engine counts and has, for machines: made for each scrape, and cheap however much is pinned.

Nothing in it grows with refs, blobs or mirrors (`tally` has the bounds). It may go to any thread.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import trio

from weightfs.core.manifest import Trust
from weightfs.core.plan import Priority
from weightfs.core.planner import Planner
from weightfs.engine.blobs import BlobState
from weightfs.engine.catalog import Catalog
from weightfs.engine.committer import Committer
from weightfs.engine.fetcher import Fetcher
from weightfs.engine.holdings import Holdings
from weightfs.engine.room import Room
from weightfs.engine.tally import HistogramMeasures, Tally
from weightfs.engine.turns import in_turns
from weightfs.engine.workers import WorkerPool
from weightfs.errors import FailureKind


@dataclass(frozen=True, slots=True)
class HostMeasures:
    """A `HostTally`, frozen."""

    host: str
    nbytes: int
    failures: int
    mismatches: int


@dataclass(frozen=True, slots=True)
class BlobMeasures:
    """Sums over all blobs; each counts once, wherever it is named."""

    by_trust: Mapping[str, int]
    complete: int
    filling: int
    unfetchable: int
    open_handles: int
    nbytes: int
    present_bytes: int


@dataclass(frozen=True, slots=True)
class Measures:
    """Of one engine. Sizes in bytes; whatever is no gauge counts from the begin of the process."""

    refs: int
    pinned_refs: int
    blobs: BlobMeasures
    waiting_readers: int
    in_flight: Mapping[str, int]  # fetches, by priority
    workers: int
    workers_wanted: int
    worker_restarts: int
    held_bytes: int
    limit_bytes: int | None
    free_bytes: int
    total_bytes: int
    evicted_bytes: int
    fetched_bytes: int
    mismatched_chunks: int
    disk_faults: int
    in_trouble: bool
    read_waits: HistogramMeasures
    read_failures: Mapping[str, int]
    chunk_waits: HistogramMeasures
    fetches: HistogramMeasures
    fetch_failures: Mapping[str, int]
    hosts: tuple[HostMeasures, ...]


async def measure(
    catalog: Catalog,
    planner: Planner,
    pool: WorkerPool,
    fetcher: Fetcher,
    committer: Committer,
    holdings: Holdings,
    room: Room,
    tally: Tally,
) -> Measures:
    """Ask the engine's parts. Not of one moment: readers have their turns meanwhile."""
    refs = catalog.refs()
    blobs = await _sum_up(catalog.states(), planner)
    jobs = Counter(job.priority for job in planner.jobs(trio.current_time()))
    return Measures(
        refs=len(refs),
        pinned_refs=sum(stored.pinned for stored in refs),
        blobs=blobs,
        waiting_readers=planner.waiting(),
        in_flight={priority.name.lower(): jobs[priority] for priority in Priority},
        workers=len(pool.pids),
        workers_wanted=pool.wanted,
        worker_restarts=pool.restarts,
        held_bytes=planner.held_bytes,
        limit_bytes=room.limit,
        free_bytes=room.space.free_bytes,
        total_bytes=room.space.total_bytes,
        evicted_bytes=room.evicted_bytes,
        fetched_bytes=fetcher.fetched_bytes,
        mismatched_chunks=fetcher.mismatches,
        disk_faults=holdings.disk_faults,
        in_trouble=bool(committer.trouble or room.trouble),
        read_waits=tally.read_waits.frozen(),
        read_failures=_by_kind(tally.read_failures),
        chunk_waits=tally.chunk_waits.frozen(),
        fetches=tally.fetches.frozen(),
        fetch_failures=_by_kind(tally.fetch_failures),
        hosts=tuple(
            HostMeasures(name, one.nbytes, one.failures, one.mismatches)
            for name, one in sorted(tally.hosts.items())
        ),
    )


def _by_kind(counts: Counter[FailureKind]) -> dict[str, int]:
    """Every kind, those that never came too: a counter that appears with its first fault hides it from `rate`."""
    return {kind.value: counts[kind] for kind in FailureKind}


async def _sum_up(states: Sequence[BlobState], planner: Planner) -> BlobMeasures:
    """Goes through the blobs, a slice at a time: with 100,000 of them readers have their turns all the while."""
    trusts = dict.fromkeys((trust.value for trust in Trust), 0)
    complete = filling = unfetchable = handles = nbytes = present = 0
    for turn in in_turns(states):
        for state in turn:
            trusts[state.trust.value] += 1
            nbytes += state.shape.size
            present += state.present_bytes
            handles += state.handles
            if state.complete:
                complete += 1
                continue
            filling += state.filling
            stuck = state.no_room is not None or (planner.knows(state.id) and planner.failure(state.id))
            unfetchable += bool(stuck)
        await trio.lowlevel.checkpoint()
    return BlobMeasures(trusts, complete, filling, unfetchable, handles, nbytes, present)
