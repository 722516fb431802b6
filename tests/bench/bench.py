"""The figures of docs/performance.md: each row beside its peers, in the same run, in alternating rounds.

    make bench                       five rounds, 1 GiB files: about a quarter of an hour
    make bench ROUNDS=1 SIZE=256     a quick look
    make bench ARGS='--only fill-http-tmpfs cold-read'

Writes build/bench.txt and build/bench.json. A row whose contender fails is reported as not measured, with the reason;
the exit status is 1 if any failed (not if an aim was missed: those are figures, not faults).
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import os
import platform
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import rows
from contenders import MIB, BenchError, run
from ground import Bench
from report import Measure, write

BUILD = Path(__file__).parents[2] / "build"
SHM = Path("/dev/shm")


def machine(work: Path, sizes: str) -> dict[str, str]:
    """What the figures depend on."""
    cpus = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":")[1].strip() for line in cpus if line.startswith("model name")), "?")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**30
    disk = run("df", "--output=fstype", work).split()[-1]
    return {
        "when": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "machine": f"{len(os.sched_getaffinity(0))} cores, {model}, {memory} GiB, {disk}",
        "kernel": platform.release(),
        "python": platform.python_version(),
        "peers": ", ".join(
            [
                run("curl", "--version").split("\n")[0].split(" (")[0],
                run("aria2c", "--version").split("\n")[0],
                run("rclone", "version").split("\n")[0],
                run("skopeo", "--version").strip(),
                "huggingface_hub " + importlib.metadata.version("huggingface_hub"),
                "weightfs "
                + run(sys.executable, "-c", "import weightfs; print(weightfs.__version__)").strip(),
            ]
        ),
        "sizes": sizes,
    }


def chosen(only: Sequence[str]) -> dict[str, Callable[[Bench], Measure | list[Measure]]]:
    """The rows to measure, by key."""
    unknown = set(only) - set(rows.ROWS)
    if unknown:
        sys.exit(f"bench: there is no row {', '.join(sorted(unknown))}; there are {', '.join(rows.ROWS)}")
    return {key: row for key, row in rows.ROWS.items() if not only or key in only}


def on_signal(number: int, _frame: object) -> None:
    """End as on Ctrl-C, so that mounts and files go."""
    raise SystemExit(128 + number)


def main() -> int:
    """Measure; 0 if every row could be."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--size", type=int, default=1024, help="of the files, in MiB")
    parser.add_argument("--only", nargs="+", default=[], metavar="ROW", help=", ".join(rows.ROWS))
    parser.add_argument(
        "--work", type=Path, help="a directory on the disk to measure (default: a temporary one)"
    )
    arguments = parser.parse_args()
    selected = chosen(arguments.only)
    signal.signal(signal.SIGTERM, on_signal)
    measures: list[Measure] = []
    failures: dict[str, str] = {}
    with contextlib.ExitStack() as ends:
        parent = arguments.work or Path(tempfile.gettempdir())
        work = Path(ends.enter_context(tempfile.TemporaryDirectory(prefix="weightfs-bench-", dir=parent)))
        shm = Path(ends.enter_context(tempfile.TemporaryDirectory(prefix="weightfs-bench-", dir=SHM)))
        bench = ends.enter_context(Bench(work, shm, arguments.rounds, arguments.size * MIB))
        missing = [peer for peer in ("rclone", "skopeo") if not shutil.which(peer)]
        if missing:
            sys.exit(f"bench: {' and '.join(missing)} is missing: run `make bench`, which installs it")
        about = machine(work, f"{arguments.size} MiB files, {arguments.rounds} rounds")
        for key, row in selected.items():
            print(f"bench: {key} …", flush=True)
            started = time.monotonic()
            try:
                found = row(bench)
            except (BenchError, OSError) as error:
                failures[f"NOT MEASURED {key}"] = str(error)
                print(f"bench: {key} failed: {error}", file=sys.stderr, flush=True)
                continue
            measures += found if isinstance(found, list) else [found]
            print(f"bench: {key} took {time.monotonic() - started:.0f} s", flush=True)
            write(BUILD, measures, about)  # an interrupted run keeps what it has
    print(write(BUILD, measures, about | failures))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
