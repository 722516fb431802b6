"""Damages the index and the data files of a cache at random, and reads everything: for test_fuzz.py, and for figures.

    python tests/faults/fuzz.py --rounds 1000 [--seed 1]

A round copies a cache that was closed or killed, damages one of its files, and then lives two or three times: in
each life a process of its own opens the cache, pins the refs again, as a daemon does with its configuration, and reads
every byte of every file through an engine. A life may end with an error or, where the damage was done behind the back
of the index's checksum, be killed by a signal; the one after it must read all. In none may a byte be wrong.
One JSON line for each round that is at fault, and one with the sums.
"""

from __future__ import annotations

import argparse
import collections
import hashlib
import itertools
import json
import logging
import os
import random
import shutil
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import trio

from weightfs.core.geometry import MIB, ByteSpan
from weightfs.core.ref import parse_ref
from weightfs.engine.engine import open_engine
from weightfs.engine.settings import EngineSettings, FillMode
from weightfs.errors import WeightfsError
from weightfs.sources import https  # noqa: F401 - imported before the forks, not in each
from weightfs.store import index as indexes
from weightfs.store.cache import Cache
from weightfs.testing.published import CHUNK, chunk_list, sample

PAGE = 4096
SECONDS = 60  # of one life: a hang is a fault too
RIGHT, WRONG, ERROR, BROKEN = 0, 3, 4, 5  # how a life ends
SETTINGS = EngineSettings(workers=0, fill=FillMode.NEVER)


def make_origin(place: Path) -> dict[str, bytes]:
    """Three files, by their refs: with a chunk list, with a digest alone, and without either."""
    listed, digested, bare = sample(20 * CHUNK + 77), sample(2 * MIB + 5, 1), sample(MIB + 9, 2)
    files = {"listed.bin": listed, "digested.bin": digested, "bare.bin": bare}
    for name, data in files.items():
        (place / name).write_bytes(data)
    (place / "listed.bin.meta4").write_bytes(chunk_list(listed, [], name="listed.bin"))
    digest = hashlib.sha256(digested).hexdigest()
    return {
        f"file://{place}/listed.bin": listed,
        f"file://{place}/digested.bin#sha256={digest}": digested,
        f"file://{place}/bare.bin": bare,
    }


async def use(root: Path, files: dict[str, bytes], *, leave: Callable[[], None] | None = None) -> None:
    """Pin the refs and read everything. ValueError at a wrong byte. `leave` is called at the end, with all open."""
    cache = await trio.to_thread.run_sync(lambda: Cache.open(root, now=1))
    try:
        async with open_engine(cache, SETTINGS) as engine:
            for ref, data in files.items():
                blob = (await engine.add(parse_ref(ref))).entries[0].blob
                for start in range(0, len(data), 256 * 1024):
                    got = await engine.read(blob.id, ByteSpan(start, start + 256 * 1024).clamp(len(data)))
                    if got != data[start : start + 256 * 1024]:
                        raise ValueError(f"wrong bytes of {ref} at {start}")
            await engine.quiet()
            if leave is not None:
                leave()
    finally:
        await trio.to_thread.run_sync(cache.close)


def life(root: Path, files: dict[str, bytes], report: Path) -> int:
    """One process that uses the cache: its wait status. What it has to say is in `report`."""
    pid = os.fork()
    if not pid:
        live(root, files, report)
    return os.waitpid(pid, 0)[1]


def live(root: Path, files: dict[str, bytes], report: Path) -> NoReturn:
    """The child."""
    code, text = RIGHT, ""
    signal.alarm(SECONDS)
    try:
        trio.run(lambda: use(root, files))
    except WeightfsError as error:
        code, text = ERROR, f"{type(error).__name__}: {error}"
    except ValueError as error:
        code, text = WRONG, str(error)
    except BaseException:  # whatever it is, it is the finding
        code, text = BROKEN, traceback.format_exc()
    report.write_text(text)
    os._exit(code)


# ---- damages: each changes one file in place


def flip_bits(path: Path, rng: random.Random) -> None:
    """One to 64 bits, anywhere or close together."""
    size = path.stat().st_size
    base, width = (0, size) if rng.random() < 0.5 else (rng.randrange(size), 64)
    with path.open("r+b") as file:
        for _ in range(rng.choice((1, 1, 2, 8, 64))):
            at = min(size - 1, base + rng.randrange(width))
            old = os.pread(file.fileno(), 1, at)[0]
            os.pwrite(file.fileno(), bytes([old ^ 1 << rng.randrange(8)]), at)


def spoil_page(path: Path, rng: random.Random) -> None:
    """One page, or several in a row, of zeros, of noise, or of another page."""
    pages = max(1, path.stat().st_size // PAGE)
    count = rng.choice((1, 1, 2, 7))
    at = rng.randrange(pages)
    with path.open("r+b") as file:
        other = os.pread(file.fileno(), count * PAGE, rng.randrange(pages) * PAGE)
        filling = rng.choice((bytes(count * PAGE), rng.randbytes(count * PAGE), other))
        os.pwrite(file.fileno(), filling[: max(0, path.stat().st_size - at * PAGE)], at * PAGE)


def truncate(path: Path, rng: random.Random) -> None:
    """Shorter, at a page or not."""
    size = rng.randrange(path.stat().st_size)
    os.truncate(path, size if rng.random() < 0.5 else size // PAGE * PAGE)


def extend(path: Path, rng: random.Random) -> None:
    """Longer, by zeros or noise."""
    with path.open("ab") as file:
        file.write(rng.choice((bytes, rng.randbytes))(rng.randrange(1, 40 * PAGE)))


def delete(path: Path, _: random.Random) -> None:
    """Gone."""
    path.unlink()


def replace(path: Path, rng: random.Random) -> None:
    """Another file of the same name: of noise, of text, of zeros, or empty."""
    size = path.stat().st_size
    path.unlink()
    path.write_bytes(rng.choice((rng.randbytes(size), b"not what you think\n" * 99, bytes(size), b"")))


def put_directory(path: Path, _: random.Random) -> None:
    """A directory in its place."""
    path.unlink()
    path.mkdir()


DAMAGES = (flip_bits, flip_bits, spoil_page, spoil_page, truncate, extend, delete, replace, put_directory)


def damage(root: Path, older: Path, rng: random.Random) -> str:
    """Damage one file of the cache; says which and how."""
    index, blobs = root / "index", sorted((root / "blobs").iterdir())
    kind = rng.random()
    if kind < 0.05:
        shutil.copy2(older / "index" / "data.mdb", index / "data.mdb")
        return "index: an older one"
    if kind < 0.1:
        other = rng.choice(sorted(index.iterdir()))
        rng.choice((truncate, flip_bits, replace))(other, rng) if other.stat().st_size else delete(other, rng)
        return f"index: {other.name}"
    path = index / "data.mdb" if kind < 0.65 else rng.choice(blobs)
    how = rng.choice(DAMAGES)
    how(path, rng)
    unseen = path.parent == index and path.is_file() and rng.random() < 0.4
    if unseen:
        forge(path)
    return f"{'index' if path.parent == index else 'data'}: {how.__name__}{', unseen' if unseen else ''}"


def forge(data: Path) -> None:
    """Make it look as if it had been closed like this: what no check at the start can find."""
    (data.parent / "closed").write_bytes(indexes._digest(data))


# ---- rounds


def make_grounds(place: Path, files: dict[str, bytes]) -> list[Path]:
    """A cache that was closed, one that was killed, and an older state of the first."""
    clean, killed, older = place / "clean", place / "killed", place / "older"

    def leave() -> None:
        shutil.copytree(clean, killed)

    def grow() -> None:
        first = dict(list(files.items())[:1])
        trio.run(lambda: use(clean, first))
        shutil.copytree(clean, older)
        trio.run(lambda: use(clean, files))
        trio.run(lambda: use(clean, files, leave=leave))

    pid = os.fork()  # trio's threads stay out of the process that forks the rounds
    if not pid:
        try:
            grow()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    if os.waitpid(pid, 0)[1]:
        raise SystemExit("the caches could not be made")
    return [clean, killed, older]


def round_of(
    number: int, seed: int, place: Path, grounds: list[Path], files: dict[str, bytes]
) -> dict[str, Any]:
    """One round."""
    rng = random.Random(f"{seed} {number}")
    root, report = place / "round", place / "report"
    shutil.rmtree(root, ignore_errors=True)
    shutil.copytree(grounds[rng.random() < 0.4], root, ignore=shutil.ignore_patterns("control.sock"))
    what = damage(root, grounds[2], rng)
    ends: list[int] = []
    texts: list[str] = []
    while len(ends) < 2 or (ends[-1] != RIGHT and len(ends) < 3):
        report.write_text("")
        status = life(root, files, report)
        ends.append(os.waitstatus_to_exitcode(status))
        texts.append(report.read_text())
    loops = any(first != RIGHT != second for first, second in itertools.pairwise(ends))
    at_fault = loops or WRONG in ends or BROKEN in ends
    at_fault = at_fault or (ends[0] < 0 and not what.endswith("unseen"))
    return {"round": number, "damage": what, "ends": ends, "texts": texts, "fault": at_fault}


def main() -> int:
    """See above; 1 if any round was at fault."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--first", type=int, default=0)
    told = parser.parse_args()
    logging.disable()
    ends: collections.Counter[str] = collections.Counter()
    faults = executions = 0
    with tempfile.TemporaryDirectory(prefix="weightfs-fuzz-") as name:
        place = Path(name)
        files = make_origin(place)
        grounds = make_grounds(place, files)
        for number in range(told.first, told.first + told.rounds):
            done = round_of(number, told.seed, place, grounds, files)
            ends[f"first life: {name_of(done['ends'][0])}"] += 1
            ends[f"second life: {name_of(done['ends'][1])}"] += 1
            executions += len(done["ends"])
            if done["fault"]:
                faults += 1
                print(json.dumps(done), flush=True)
    print(
        json.dumps(
            {
                "rounds": told.rounds,
                "executions": executions,
                "faults": faults,
                **dict(sorted(ends.items())),
            }
        )
    )
    return 1 if faults else 0


def name_of(end: int) -> str:
    """How a life ended, in words."""
    names = {RIGHT: "all right", WRONG: "wrong bytes", ERROR: "an error", BROKEN: "an exception"}
    return names.get(end) or (signal.Signals(-end).name if end < 0 else f"code {end}")


if __name__ == "__main__":
    sys.exit(main())
