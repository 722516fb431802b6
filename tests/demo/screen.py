"""What the person sees: the steps, the claims, and two bars that show what is cached and what is verified.

Rule: a claim that does not hold ends the demo with a non-zero exit. The bars know only what any user can ask
of a mounted file: its extended attributes. Without a terminal the same is told in plain lines.
"""

from __future__ import annotations

import os
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

POLL_SECONDS = 0.2
PLAIN_SECONDS = 2.0  # between two lines about progress where there is no terminal
LOOK_SECONDS = 10.0
PLAIN_COLUMNS = 100
MB = 1_000_000


class ClaimFailed(Exception):
    """Something that the demo says is not so."""


@dataclass(frozen=True, slots=True)
class Watched:
    """A file on the mount, and how big it is."""

    path: Path
    size: int

    def look(self) -> tuple[int, str]:
        """Bytes cached, and the trust state; (0, why not) while nobody serves it."""
        try:
            cached = int(os.getxattr(self.path, "user.weightfs.cached"))
            return cached, os.getxattr(self.path, "user.weightfs.state").decode()
        except OSError as error:
            return 0, "not served" if error.errno else str(error)


class Screen:
    """The terminal. Use as a context manager: the bars are live inside."""

    def __init__(self) -> None:
        self.console = Console(highlight=False)
        self._live = self.console.is_terminal
        if not self._live:
            self.console.width = PLAIN_COLUMNS
        self._progress = Progress(
            TextColumn("  {task.description:<18}"),
            BarColumn(40),
            TextColumn("{task.fields[cached]:>6.1f} of {task.total:>5.1f} MB cached"),
            TextColumn("{task.fields[state]}"),
            console=self.console,
            disable=not self._live,
        )
        self._watched: dict[str, Watched] = {}
        self._watching = threading.Event()
        self._ended = threading.Event()
        self._idle = threading.Lock()  # held while the mount is looked at
        self._poller = threading.Thread(target=self._poll, daemon=True)
        self._started = time.monotonic()

    def __enter__(self) -> Self:
        self._progress.start()
        self._poller.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._ended.set()
        self._progress.stop()

    def step(self, letter: str, title: str) -> None:
        """Begin a step of the story."""
        label = f"{letter}. " if letter else ""
        self.console.print(f"\n[bold]{label}{title}[/]  [dim]+{time.monotonic() - self._started:.0f} s[/]")

    def say(self, text: str) -> None:
        """A line of it."""
        self.console.print(f"  {text}", soft_wrap=True)

    def show(self, command: str) -> None:
        """A command as a person types it."""
        self.console.print(f"  $ {command}", style="cyan", markup=False, soft_wrap=True)

    def quote(self, output: str) -> None:
        """What a command said."""
        for line in output.rstrip().splitlines():
            self.console.print(f"    {line}", style="dim", markup=False, soft_wrap=True)

    def claim(self, holds: bool, text: str) -> None:
        """State something and whether it is so. ClaimFailed if not."""
        mark = ("✓ ", "green") if holds else ("✗ ", "bold red")
        self.console.print(Text.assemble("  ", mark, text), soft_wrap=True)
        if not holds:
            raise ClaimFailed(text)

    def table(self, table: Table) -> None:
        """The result, below everything."""
        self._watching.clear()
        self._progress.stop()
        self.console.print()
        self.console.print(table)

    def watch(self, files: dict[str, Watched]) -> None:
        """Show these from now on."""
        for name, file in files.items():
            if name not in self._watched:
                self._progress.add_task(name, total=file.size / MB, cached=0.0, state="")
            self._watched[name] = file
        self._watching.set()

    def look_away(self) -> None:
        """Leave the mount alone, so that it can be unmounted; `watch` goes on."""
        self._watching.clear()
        if not self._idle.acquire(timeout=LOOK_SECONDS):  # the look that is under way ends first
            raise ClaimFailed(f"getxattr answers within {LOOK_SECONDS:.0f} s")
        self._idle.release()

    def _poll(self) -> None:
        told = 0.0
        last = ""
        while not self._ended.wait(POLL_SECONDS):
            if not self._watching.is_set():
                continue
            with self._idle:
                seen = {name: file.look() for name, file in self._watched.items()}
            for task in self._progress.tasks:
                cached, state = seen[task.description]
                if state != "not served":
                    self._progress.update(task.id, completed=cached / MB, cached=cached / MB)
                self._progress.update(task.id, state=state)
            line = ", ".join(f"{name} {cached / MB:.0f} MB {state}" for name, (cached, state) in seen.items())
            if not self._live and line != last and time.monotonic() - told >= PLAIN_SECONDS:
                self.console.print(f"    cached: {line}", style="dim", markup=False, soft_wrap=True)
                told, last = time.monotonic(), line
