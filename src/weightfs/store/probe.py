"""Walk an index in a process of its own, because LMDB ends the process that meets a damaged page.

A cut data.mdb is a SIGBUS, a zeroed page a failed assertion (SIGABRT): measured, not feared. So an index that was not
closed by us, or was touched since, is walked by a child first: every page of every table and of the free list, and
everything that LMDB takes for granted when it writes. The walker is py-lmdb's own, which never gives the file to LMDB.
A hundred thousand chunk records take it 0.3 s.

Only what the walker finds, and the signals that a damaged page brings, are damage. A walker that did not start, had no
memory, or was ended by somebody says nothing of the index: it stays where it is.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from weightfs.errors import CacheError
from weightfs.interpreter import not_started

PROBE_TIMEOUT = (
    120.0  # seconds: an index on a slow disk that is read for the first time; a walk in a circle ends here
)

_DAMAGED = 4  # its exit code; 1 is what Python itself ends with, 2 and 3 are those of other programs
_BY_DAMAGE = (signal.SIGBUS, signal.SIGABRT, signal.SIGSEGV, signal.SIGFPE, signal.SIGILL)

# Keep it free of our own modules: it has to start fast.
_WALK = f"""
import sys, lmdb.verify
try:
    findings = lmdb.verify.verify(sys.argv[1])
except MemoryError:
    raise
except Exception as error:
    findings = [str(error) or type(error).__name__]
if findings:
    print(findings[0], file=sys.stderr)
    sys.exit({_DAMAGED})
"""


def walk(directory: Path) -> str | None:
    """What is wrong with the index in `directory`, in a few words; None if every page can be read.

    CacheError if nobody can know.
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    try:
        done = subprocess.run(  # noqa: S603 - our own interpreter, our own text, a path as a plain argument
            [sys.executable, "-c", _WALK, os.fspath(directory)],
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=PROBE_TIMEOUT,
            check=False,
            process_group=0,  # Ctrl-C is for us, not for the walker
        )
    except subprocess.TimeoutExpired:
        return "its pages lead in a circle, or the disk does not answer"
    except OSError as error:
        raise CacheError(f"the index {directory} cannot be looked through: {not_started(error)}") from None
    if not done.returncode:
        return None
    last = "".join(done.stderr.decode(errors="replace").strip().splitlines()[-1:])[:200]
    if done.returncode == _DAMAGED:
        return last
    if -done.returncode in _BY_DAMAGE:
        return last or f"reading it ends with signal {-done.returncode}"
    how = f"signal {-done.returncode}" if done.returncode < 0 else f"exit code {done.returncode}"
    how += f", {last}" if last else ""
    raise CacheError(f"the process that looks through the index {directory} was ended ({how}): try again")
