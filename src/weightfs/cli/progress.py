"""Progress on stderr: bars where somebody watches, nothing where a script does."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID


class Progress(Protocol):
    """How far several pieces of work are, in bytes."""

    def begin(self, key: str, label: str, total: int) -> None:
        """A piece begins."""
        ...

    def update(self, key: str, done: int, total: int) -> None:
        """It got so far."""
        ...


class SilentProgress:
    """For scripts, and where nobody watches."""

    def begin(self, key: str, label: str, total: int) -> None:
        """Nothing to show."""

    def update(self, key: str, done: int, total: int) -> None:
        """Nothing to show."""


class _Bars:
    def __init__(self, bars: RichProgress) -> None:
        self._bars = bars
        self._tasks: dict[str, TaskID] = {}

    def begin(self, key: str, label: str, total: int) -> None:
        """One bar more; what is there already does not count into the rate."""
        if key not in self._tasks:
            self._tasks[key] = self._bars.add_task(_shorten(label), total=total)

    def update(self, key: str, done: int, total: int) -> None:
        """Move its bar."""
        if key in self._tasks:
            self._bars.update(self._tasks[key], completed=done, total=total)


def _shorten(label: str, width: int = 40) -> str:
    return label if len(label) <= width else "…" + label[1 - width :]


@contextlib.contextmanager
def make_progress(*, quiet: bool) -> Iterator[Progress]:
    """Bars if stderr is a terminal and not `quiet`."""
    if quiet or not sys.stderr.isatty():
        yield SilentProgress()
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=False) as bars:
        yield _Bars(bars)
