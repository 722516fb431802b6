"""What the engine can be told. `config` validates what people write; here are the plain values, with their units."""

from __future__ import annotations

import enum
import os
from dataclasses import dataclass, field
from typing import Final

from weightfs.core.bandwidth import Timetable
from weightfs.core.geometry import MIB
from weightfs.core.manifest import Policy
from weightfs.core.mirror_rules import PrefixRule
from weightfs.core.plan import Limits
from weightfs.sources.base import FetchSettings


class FillMode(enum.StrEnum):
    """Which blobs are completed in the background: none, those that somebody opened, or all."""

    NEVER = "never"
    OPENED = "opened"
    ALL = "all"


# What a running engine can take over; the rest is read once, when it starts.
LIVE: Final = (
    "fetch", "read_timeout", "bandwidth", "host_bandwidth", "max_bytes", "min_free_bytes", "max_age",
)  # fmt: skip


def default_workers() -> int:
    """One fetch worker process per core, at most four."""
    return min(4, len(os.sched_getaffinity(0)))


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """Times in seconds, sizes in bytes."""

    fetch: FetchSettings = field(default_factory=FetchSettings)
    limits: Limits = field(default_factory=Limits)
    mirrors: tuple[PrefixRule, ...] = ()  # more places for blobs with digests
    workers: int = field(default_factory=default_workers)  # 0: fetch in this process
    fill: FillMode = FillMode.OPENED
    keep_pinned: bool = True  # complete pinned refs in the background, whatever `fill` says
    headers_first: bool = (
        False  # fetch small files and headers when a ref is pinned; off: nothing but what is read
    )
    policy: Policy = Policy.PROVISIONAL
    read_timeout: float = 600.0  # a read that waits longer fails; 0: it waits for ever
    readahead_bytes: int = 64 * MIB  # largest window of one sequential stream
    # Bytes per second by the time of day, over all hosts and of single ones (lower case, as URLs name them).
    bandwidth: Timetable | None = None
    host_bandwidth: tuple[tuple[str, Timetable], ...] = ()
    # The cache's limits (docs/design.md, "Eviction"); None: no limit. Of `min_free_bytes`, None is the default rule.
    max_bytes: int | None = None  # what chunks may take
    min_free_bytes: int | None = 0  # what the cache's filesystem has to keep free
    max_age: float | None = None  # seconds: what was not used for longer is evicted
    tidies: bool = True  # by itself, not only when `gc` is asked for
    commit_bytes: int = 16 * MIB  # so much landed, or `commit_seconds` after the first, makes a commit
    commit_seconds: float = 1.0
    worker_buffer_bytes: int = 32 * MIB  # chunk buffers of one worker; a single chunk may exceed it
    disk_threads: int = 16
    worker_silence_seconds: float = 30.0  # a worker process without a sign of life for so long is replaced
