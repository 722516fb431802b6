"""Walk an index in a process of its own, because LMDB ends the process that meets a damaged page.

A cut data.mdb is a SIGBUS, a zeroed page a failed assertion (SIGABRT): measured, not feared. So an index that was not
closed by us, or was touched since, is walked by a child first: every page of every table and of the free list, and
everything that LMDB takes for granted when it writes. The walker is py-lmdb's own, which never gives the file to LMDB.
A hundred thousand chunk records take it 0.3 s.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

PROBE_TIMEOUT = (
    120.0  # seconds: an index on a slow disk that is read for the first time; a walk in a circle ends here
)

# Keep it free of our own modules: it has to start fast.
_WALK = """
import sys, lmdb.verify
findings = lmdb.verify.verify(sys.argv[1])
if findings:
    sys.exit(str(findings[0]))
"""


def walk(directory: Path) -> str | None:
    """What is wrong with the index in `directory`, in a few words; None if every page can be read."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    try:
        done = subprocess.run(  # noqa: S603 - our own interpreter, our own text, a path as a plain argument
            [sys.executable, "-c", _WALK, os.fspath(directory)],
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=PROBE_TIMEOUT,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return "its pages lead in a circle, or the disk does not answer"
    except OSError as error:
        return f"the process that looks through it did not start: {error}"
    if not done.returncode:
        return None
    last = done.stderr.decode(errors="replace").strip().splitlines()[-1:]
    return last[0][:200] if last else f"reading it ends with signal {-done.returncode}"
