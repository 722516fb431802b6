"""Rows about throughput, each a function from `Bench` to one or more measures; `ROWS` lists all there are."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path

from contenders import (
    MIB,
    WEIGHTFS,
    aria2,
    cat,
    client,
    curl,
    empty,
    run,
    timed,
    wait,
    warm,
    weightfs_pull,
)
from ground import MB, NAME, TLS, Bench, stored
from report import OURS, Aim, Measure
from rows_load import latency_under_fill, memory, start
from rows_registries import pull_hub, pull_oci

from weightfs.testing.link import Link

FAULTS = 256
FAULT_THREADS = 16
LINK_RATE = 100 * MB
LINK_LATENCY = 0.05


def fill_row(key: str, scheme: str, on_disk: bool) -> Callable[[Bench], Measure]:
    """Download, verify and make durable, against curl and aria2c, which make durable only."""

    def row(bench: Bench) -> Measure:
        place = bench.work if on_disk else bench.shm
        url = bench.origin.https_url(f"{TLS}/{NAME}") if scheme == "https" else bench.origin.url(NAME)
        ca_file = bench.origin.ca_file

        def fetched_by(fetch: Callable[[str, Path, Path], float]) -> Callable[[], float]:
            def measured() -> float:
                target = empty(place / "fetched")
                seconds = fetch(url, target if fetch is weightfs_pull else target / NAME, ca_file)
                empty(target)
                return bench.speed(seconds)

            return measured

        where = "disk" if on_disk else "memory (/dev/shm)"
        return bench.turns(
            Measure(
                key,
                f"fill over {scheme}, to {where}",
                "MB/s",
                higher=True,
                aims=(Aim(">= 1.0 x the better of curl, aria2c", 1.0, peers=("curl", "aria2c -x16")),),
                note="whole commands: weightfs pull with its start-up, SHA-256 of every chunk and of the whole, and "
                "its commits; curl and aria2c with a sync of the file, and without verifying.",
            ),
            {OURS: fetched_by(weightfs_pull), "curl": fetched_by(curl), "aria2c -x16": fetched_by(aria2)},
        )

    return row


def pull_start(bench: Bench) -> Measure:
    """What of the fill rows is the start of a process: a pull of what is there already."""
    cache = empty(bench.work / "weightfs-cache")
    url = bench.origin.url(NAME)
    run(WEIGHTFS, "pull", url, "--cache", cache)
    return bench.turns(
        Measure("pull-start", "weightfs pull of a complete file", "s", higher=False),
        {OURS: lambda: timed(WEIGHTFS, "pull", url, "--cache", cache)},
    )


def cold_read(bench: Bench) -> Measure:
    """The first sequential read, through the mount, with nothing cached."""

    def ours() -> float:
        with bench.weightfs().mounted(bench.origin.url(NAME)) as mount:
            return bench.speed(cat(mount.path(NAME)))

    def rclone() -> float:
        with bench.rclone().mounted() as mount:
            return bench.speed(cat(mount.path(NAME)))

    return bench.turns(
        Measure(
            "cold-read",
            "cold sequential read through the mount",
            "MB/s",
            higher=True,
            aims=(Aim(">= 3 x rclone", 3.0, peers=("rclone mount",)),),
        ),
        {OURS: ours, "rclone mount": rclone},
    )


def cached_read(bench: Bench) -> list[Measure]:
    """Complete files: after a new mount (nothing in its page cache), and once more (everything in it)."""
    url = bench.origin.url(NAME)
    raw = bench.origin.root / NAME
    fresh = Measure(
        "cached-read",
        "cached, not in the mount's page cache",
        "MB/s",
        higher=True,
        aims=(
            Aim(">= 3 x rclone", 3.0, peers=("rclone mount",)),
            Aim(">= 0.5 x cat of the raw file", 0.5, peers=("raw, hot",)),
        ),
        note="the cache's own file is in the page cache of its filesystem, for both mounts; the raw file is on tmpfs. "
        "Where passthrough works (root, Linux 6.9), the kernel reads that file itself, through its page cache.",
    )
    hot = Measure(
        "hot-read",
        "in the mount's page cache",
        "MB/s",
        higher=True,
        aims=(Aim(">= 0.95 x raw", 0.95, peers=("raw, hot",)),),
    )
    ours = bench.weightfs()
    with ours.mounted(url, fill="all"):
        wait("the fill", lambda: ours.cached(NAME) == bench.size, 600)
    theirs = bench.rclone()
    with theirs.mounted():
        cat(theirs.path(NAME))
        wait("rclone to write its cache", lambda: stored(theirs.cache) >= bench.size, 120)

    def both(
        name: str, mounted: Callable[[], contextlib.AbstractContextManager[object]], path: Callable[[], Path]
    ) -> float:
        with mounted():
            cold = bench.speed(cat(path()))
            hot.add(name, bench.speed(cat(path())))
            return cold

    def weightfs() -> float:
        warm(ours.cache)
        return both(OURS, lambda: ours.mounted(url), lambda: ours.path(NAME))

    def rclone() -> float:
        warm(theirs.cache)
        return both("rclone mount", theirs.mounted, lambda: theirs.path(NAME))

    def plain() -> float:
        hot.add("raw, hot", bench.speed(cat(raw)))
        return bench.speed(cat(raw))

    bench.turns(fresh, {OURS: weightfs, "rclone mount": rclone, "raw, hot": plain})
    return [fresh, hot]


def scattered(bench: Bench) -> list[Measure]:
    """256 page faults all over a cold file, from 16 threads: seconds, and what was fetched for them."""
    seconds = Measure(
        "scattered-seconds",
        f"{FAULTS} scattered faults, {FAULT_THREADS} threads",
        "s",
        higher=False,
        aims=(Aim("<= 0.5 x rclone", 0.5, at_least=False, peers=("rclone mount",)),),
        note="weightfs with fill = never.",
    )
    fetched = Measure(
        "scattered-fetched",
        f"{FAULTS} scattered faults: fetched",
        "MB",
        higher=False,
        note="weightfs beside the chunks of 1 MiB that were touched; it also fetches head and tail of the file.",
    )

    def ours() -> float:
        with bench.weightfs().mounted(bench.origin.url(NAME), fill="never") as mount:
            bench.origin.forget_requests()
            found = client("faults", mount.path(NAME), str(FAULTS), str(FAULT_THREADS), "1")
            wait("the fetches in flight", lambda: not mount.status()["jobs"])
        fetched.add(OURS, bench.origin.bytes_sent(NAME) / MB)
        touched = {offset // MIB for offset in found["offsets"]}
        fetched.add("chunks touched", len(touched) * MIB / MB)
        return float(found["seconds"])

    def rclone() -> float:
        with bench.rclone().mounted() as mount:
            bench.origin.forget_requests()
            found = client("faults", mount.path(NAME), str(FAULTS), str(FAULT_THREADS), "1")
        fetched.add("rclone mount", bench.origin.bytes_sent(NAME) / MB)
        return float(found["seconds"])

    bench.turns(seconds, {OURS: ours, "rclone mount": rclone})
    head_and_tail = 2 * MIB / MB
    limit = 1 + head_and_tail / fetched.median("chunks touched")
    fetched.aims = (
        Aim("<= one chunk per chunk touched, + 2", limit + 0.001, at_least=False, peers=("chunks touched",)),
    )
    return [seconds, fetched]


def slow_link(bench: Bench) -> Measure:
    """A cold sequential read over 100 MB/s and 50 ms, against curl over the same."""
    root = bench.origin.root
    measure = Measure(
        "slow-link",
        "cold read, origin of 100 MB/s and 50 ms",
        "MB/s",
        higher=True,
        aims=(
            Aim(">= 95 MB/s, 0.95 of the limit", 0.95 * LINK_RATE / MB),
            Aim(">= 0.95 of what the link gives to curl", 0.95, peers=("curl to /dev/null",)),
        ),
        note="the link is a relay in user space with one rate for all connections (this is not netem: no loss, no "
        "TCP slow start).",
    )
    with Link(bench.origin.port, rate=LINK_RATE, latency=LINK_LATENCY) as link:
        base = f"http://127.0.0.1:{link.ports[0]}/"
        slow = empty(root / "slow")
        os.link(root / NAME, slow / NAME)
        run(WEIGHTFS, "publish", slow / NAME, "--url", f"{base}slow/{NAME}")

        def ours() -> float:
            with bench.weightfs().mounted(f"{base}slow/{NAME}") as mount:
                return bench.speed(cat(mount.path(NAME)))

        def rclone() -> float:
            with bench.rclone(f"{base}slow/").mounted() as mount:
                return bench.speed(cat(mount.path(NAME)))

        def plain() -> float:
            return bench.speed(timed("curl", "-sS", "--fail", "-o", "/dev/null", f"{base}slow/{NAME}"))

        return bench.turns(measure, {OURS: ours, "rclone mount": rclone, "curl to /dev/null": plain})


ROWS: dict[str, Callable[[Bench], Measure | list[Measure]]] = {
    "fill-http-disk": fill_row("fill-http-disk", "http", on_disk=True),
    "fill-http-tmpfs": fill_row("fill-http-tmpfs", "http", on_disk=False),
    "fill-https-disk": fill_row("fill-https-disk", "https", on_disk=True),
    "fill-https-tmpfs": fill_row("fill-https-tmpfs", "https", on_disk=False),
    "pull-start": pull_start,
    "pull-oci": pull_oci,
    "pull-hf": pull_hub,
    "cold-read": cold_read,
    "cached-read": cached_read,
    "scattered": scattered,
    "slow-link": slow_link,
    "latency": latency_under_fill,
    "memory": memory,
    "start": start,
}
