"""What becomes of a cache file that is opened for nobody any more."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import trio

from weightfs.mount import passthrough
from weightfs.mount.passthrough import Passthrough

SECONDS = 10


async def test_what_is_opened_after_its_request_was_answered_is_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Regression: the watchdog cancels the work, and the descriptor of the thread that it leaves behind leaked."""
    path = tmp_path / "file"
    path.write_bytes(b"x")
    begun, may, over = trio.Event(), threading.Event(), threading.Event()
    token = trio.lowlevel.current_trio_token()
    really_open, really_run = os.open, passthrough._Opening.run
    opened: list[int] = []

    def slow(name: Path, flags: int) -> int:
        token.run_sync_soon(begun.set)
        may.wait(SECONDS)
        opened.append(really_open(name, flags & ~os.O_DIRECT))
        return opened[-1]

    def run(self: passthrough._Opening) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(os, "open", slow)
            really_run(self)
        over.set()

    monkeypatch.setattr(passthrough._Opening, "run", run)
    with trio.fail_after(SECONDS):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(Passthrough().lend, path, 1)
            await begun.wait()
            nursery.cancel_scope.cancel()
        may.set()
        await trio.to_thread.run_sync(over.wait, SECONDS)
    (descriptor,) = opened
    with pytest.raises(OSError, match=os.strerror(errno.EBADF)):
        os.fstat(descriptor)


async def test_nothing_is_lent_when_the_request_went_just_after_the_file_was_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Regression: the kernel was given the file, and its number was known to nobody who would take it back."""
    path = tmp_path / "file"
    path.write_bytes(b"x")
    opened: list[int] = []

    async def ends_first(run: Callable[[], None], **_: object) -> None:
        run()
        opening = run.__self__  # type: ignore[attr-defined]
        opened.append(opening._fd)
        scope.cancel()  # and the task goes on without having been told

    lending = Passthrough()

    def register(_: int) -> int:
        raise AssertionError("it was lent")

    monkeypatch.setattr(lending, "_register", register)
    monkeypatch.setattr(trio.to_thread, "run_sync", ends_first)
    with trio.CancelScope() as scope:
        await lending.lend(path, 1)
    assert scope.cancelled_caught
    (descriptor,) = opened
    assert descriptor >= 0
    with pytest.raises(OSError, match=os.strerror(errno.EBADF)):
        os.fstat(descriptor)
