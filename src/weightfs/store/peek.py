"""The refs of a cache that nobody has open, read by a process of its own, and without a trace.

Opening a cache takes its lock, raises its epoch and looks at every file. Who only wants to know which refs there are
reads the index as it lies there: read-only and without LMDB's lock file, so that nothing is written. If somebody opens
the cache meanwhile, the pages may change below the reader: then this process may fail, and nobody else.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import lmdb

from weightfs.errors import CacheError
from weightfs.interpreter import not_started
from weightfs.store.lmdberrors import corrupt
from weightfs.store.records import RecordError, decode_ref, unseal

MAX_REFS = 10_000  # as many as the configuration may name


def ref_names(directory: Path, timeout: float) -> list[str]:
    """The refs in the index in `directory`, sorted; none if it has no index. `timeout` in seconds.

    Raises:
        CacheCorruptError: It cannot be read.
        CacheError: The process did not start, or did not end in time.
    """
    if not (directory / "data.mdb").exists():
        return []
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    try:
        done = subprocess.run(  # noqa: S603 - our own interpreter and module, a path as a plain argument
            [sys.executable, "-m", __name__, os.fspath(directory)],
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=timeout,
            check=False,
        )
        names = json.loads(done.stdout) if done.returncode == 0 else None
    except subprocess.TimeoutExpired:
        raise CacheError(
            f"the index in {directory} was not read within {timeout:g} s; is the disk slow?"
        ) from None
    except OSError as error:
        raise CacheError(f"the index in {directory} cannot be looked into: {not_started(error)}") from None
    except ValueError as error:
        raise CacheError(f"the process that reads the index in {directory} failed: {error}") from None
    if not isinstance(names, list):
        last = done.stderr.decode(errors="replace").strip().splitlines()[-1:] or [f"exit {done.returncode}"]
        raise corrupt(directory, last[0][:200])
    return [str(name) for name in names]


def main() -> None:
    """Print the refs in the index named by the first argument, as JSON."""
    env = lmdb.open(sys.argv[1], max_dbs=32, readonly=True, lock=False, create=False)
    names: list[str] = []
    with env.begin() as txn:
        table = env.open_db(b"ref", txn=txn, create=False)
        for key, value in txn.cursor(db=table):
            names.append(decode_ref(unseal("ref", bytes(key), bytes(value))).ref)
            if len(names) >= MAX_REFS:
                break
    sys.stdout.write(json.dumps(sorted(names)))


if __name__ == "__main__":
    try:
        main()
    except (lmdb.Error, RecordError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
