"""What a mount counts, in the terms of the metrics. The only place that knows both."""

from __future__ import annotations

import trio

from weightfs.control.metrics import MountMeasures
from weightfs.mount.stats import MountStats


def mount_measures(stats: MountStats) -> MountMeasures:
    """As it is now. From the trio thread."""
    ages = [read.age for read in stats.in_flight(trio.current_time())]
    return MountMeasures(
        reads=stats.reads,
        read_bytes=stats.read_bytes,
        failed_reads=stats.failed_reads,
        delayed_reads=stats.delayed_reads,
        held_reads=stats.held,
        internal_errors=stats.internal_errors,
        passed_opens=stats.passed_opens,
        passed_files=stats.passed_files,
        reads_in_flight=len(ages),
        oldest_read=max(ages, default=0.0),
    )
