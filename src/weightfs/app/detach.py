"""Run in the background, and tell the caller how the start went.

The caller returns when the child serves, or has failed. The child leaves the terminal (setsid, no stdin, output to
a log file) but keeps one end of a pipe, over which it says one line of JSON. Nothing else runs yet when it is forked:
no thread, no trio.

Below an automount point nobody gets past the kernel until the mount is complete, but the process group of the service
manager, in which it runs mount(8) (autofs(5)). A child that was started in that group leaves it only when it serves.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from weightfs.control.documents import error_from_json, error_to_json
from weightfs.errors import CacheError, DaemonError, WeightfsError
from weightfs.logs import one_line, redact, traceback_of

Ready = Callable[[Sequence[str]], None]
MAX_LINE = 64 * 1024


def detach(work: Callable[[Ready], int], log_file: Path, on_start: Callable[[], None]) -> list[str]:
    """Fork; in the child run `work`, in the parent wait for its first word.

    Args:
        work: Called in the child with what it must call when it serves; returns the exit code.
        log_file: Where the child's stdout and stderr go; its directory is made.
        on_start: Called in the child first, after the redirection: sets up logging.

    Returns:
        In the parent: the child's warnings. The child never returns.

    Raises:
        WeightfsError: What the child raised; DaemonError if it ended without a word.
    """
    output = _open_log(log_file)
    reading, writing = os.pipe2(os.O_CLOEXEC)
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        os.close(reading)
        _child(work, output, writing, on_start)
    os.close(writing)
    os.close(output)
    try:
        with os.fdopen(reading, "rb") as pipe:
            return _first_word(pipe, pid, log_file)
    except KeyboardInterrupt:
        os.kill(pid, signal.SIGTERM)
        os.waitpid(pid, 0)
        raise


def _open_log(log_file: Path) -> int:
    try:
        log_file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        return os.open(log_file, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise CacheError(
            f"the log file {log_file} cannot be written: {error.strerror}; run weightfs as the owner of its directory, "
            "or name another with --cache or --log-file"
        ) from None


def _child(work: Callable[[Ready], int], output: int, writing: int, on_start: Callable[[], None]) -> None:
    code = 1
    told = False
    managed = in_managers_group()

    def tell(word: dict[str, Any]) -> None:
        nonlocal told
        if not told:
            told = True
            os.write(writing, json.dumps(word).encode()[: MAX_LINE - 1] + b"\n")
            os.close(writing)

    def ready(warnings: Sequence[str]) -> None:
        if managed:
            os.setsid()
        tell({"ready": True, "warnings": list(warnings)})

    try:
        if not managed:
            os.setsid()
        os.chdir("/")
        nothing = os.open(os.devnull, os.O_RDONLY)
        os.dup2(nothing, 0)
        os.dup2(output, 1)
        os.dup2(output, 2)
        on_start()
        code = work(ready)
    except WeightfsError as error:
        code = error.exit_code
        tell(error_to_json(error))
        # Into the log file, after the parent has gone.
        print(f"weightfs: {one_line(redact(str(error)))}", file=sys.stderr)  # noqa: T201
    except BaseException as error:  # noqa: BLE001  # the process ends here, with a word and a code
        print(traceback_of(error), end="", file=sys.stderr)  # noqa: T201
        text = f"the daemon failed in a way it should not ({type(error).__name__}); its log has the details"
        tell({"error": text, "kind": "DaemonError", "exit_code": DaemonError.exit_code})
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        # Not sys.exit: what the parent had begun (a test runner, click) must not be gone through twice.
        os._exit(code)


def in_managers_group() -> bool:
    """Whether this process may pass an automount point that waits for its mount."""
    try:
        return os.getpgrp() == os.getpgid(1)
    except OSError:  # a security module may forbid the question
        return False


def _first_word(pipe: BinaryIO, pid: int, log_file: Path) -> list[str]:
    line = pipe.readline(MAX_LINE)
    if line.endswith(b"\n"):
        word = json.loads(line)
        if word.get("ready"):
            return [str(warning) for warning in word["warnings"]]
        os.waitpid(pid, 0)
        raise error_from_json(word)
    _, status = os.waitpid(pid, 0)
    code = os.waitstatus_to_exitcode(status)
    raise DaemonError(f"the daemon ended (code {code}) before it served; {log_file} may say why")
