"""`weightfs top`: what a mount is doing, model by model, until somebody has seen enough.

Rules: what is drawn fits the terminal, however many models there are: who is busy comes first, and the rest is counted.
A daemon is asked the less often the longer its answer takes. A cache without a daemon is shown once, since whoever
looks at it keeps it from a mount.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import click

from weightfs.cli.asking import ask
from weightfs.cli.group import Stopped, examples
from weightfs.cli.mapping import shortened
from weightfs.cli.options import cache_options, load_config
from weightfs.cli.picturing import terminal_width

if TYPE_CHECKING:
    from weightfs.control.ports import Document, Operations

PAUSE_PER_SECOND: Final = 20.0  # of waiting for an answer: at most five percent of the daemon's time
MIN_INTERVAL: Final = 0.2  # seconds
MAX_INTERVAL: Final = 3600.0
SMOOTHING: Final = 0.3  # the weight of the latest rate: a request of fill lasts about a second
WIDE: Final = 96  # columns; below, the bar makes room for the name
NARROW: Final = 78  # and below, sizes and trust do
MIN_NAME: Final = 8
BAR: Final = 10
SNAPSHOT_LINES: Final = 1000  # where no terminal says how many there is room for


@dataclass(slots=True)
class Rates:
    """Bytes per second from the network: of each ref, and in all. Told by what `status` counts."""

    by_ref: dict[str, float] = field(default_factory=dict)
    total: float = 0.0
    _at: float | None = None
    _fetched: dict[str, int] = field(default_factory=dict)
    _all: int = 0

    def note(self, document: Document, now: float) -> None:
        """The next answer, at monotonic time `now`. What was never seen before, or began anew, has no rate yet."""
        fetched = {ref["ref"]: _fetched(ref) for ref in document["refs"]}
        if self._at is not None and now > self._at:
            seconds = now - self._at
            self.total = _smooth(self.total, max(0, document["fetched_bytes"] - self._all) / seconds)
            self.by_ref = {
                name: _smooth(self.by_ref.get(name, 0.0), max(0, count - self._fetched[name]) / seconds)
                for name, count in fetched.items()
                if name in self._fetched
            }
        self._at, self._fetched, self._all = now, fetched, document["fetched_bytes"]


def _smooth(before: float, latest: float) -> float:
    rate = latest if not before else (1 - SMOOTHING) * before + SMOOTHING * latest
    return rate if rate >= 1 else 0.0


def _fetched(ref: Document) -> int:
    return sum({file["blob"]: file["fetched_bytes"] for file in ref["files"]}.values())


@click.command(
    short_help="Watch a mount at work.",
    epilog=examples("weightfs top", "weightfs top --interval 5", "weightfs top --once"),
)
@click.option("--once", is_flag=True, help="Show it once; so it is where stdout is no terminal.")
@click.option(
    "--interval",
    type=click.FloatRange(MIN_INTERVAL, MAX_INTERVAL),
    default=1.0,
    show_default=True,
    metavar="S",
    help="Seconds between two looks, at least.",
)
@cache_options
@click.pass_context
def top(ctx: click.Context, /, once: bool, interval: float, **_: object) -> int:
    """Show per model how much is here, its rate, the time left, readers that wait, trust, and mirrors with faults.

    q or Ctrl-C ends it. Models that are busy come first. A cache that no mount or command has is shown once.
    """
    config = load_config(ctx)
    live = not once and sys.stdout.isatty() and sys.stdin.isatty()

    async def work(operations: Operations, is_daemon: bool) -> None:
        if live and is_daemon:
            await _watch(operations, interval)
            return
        document = await operations.status()
        height = os.get_terminal_size().lines if sys.stdout.isatty() else SNAPSHOT_LINES
        for line in top_lines(document, Rates(), terminal_width(), height):
            click.echo(line)

    try:
        ask(ctx, config, "top", work)
    except Stopped as stopped:
        if not live or stopped.signum != signal.SIGINT:
            raise
    return 0


async def _watch(operations: Operations, interval: float) -> None:
    import trio
    from rich.console import Console
    from rich.live import Live

    console = Console(highlight=False)
    rates = Rates()
    with _keys(), Live(console=console, screen=True, auto_refresh=False) as live:
        while True:
            began = time.monotonic()
            document = await operations.status()
            now = time.monotonic()
            rates.note(document, now)
            lines = top_lines(document, rates, console.width, console.height - 1)
            live.update(_coloured(lines), refresh=True)
            with trio.move_on_after(max(interval, PAUSE_PER_SECOND * (now - began))):
                await _quit_key()
                return


def _coloured(lines: Sequence[str]) -> Any:
    from rich.text import Text

    text = Text("\n".join(lines), no_wrap=True, overflow="crop")
    for pattern, style in (
        ("quarantined", "bold red"),
        ("paused", "yellow"),
        ("#+", "green"),
        (r"^\s+! .*", "red"),
    ):
        text.highlight_regex(rf"(?m){pattern}", style)
    return text


@contextlib.contextmanager
def _keys() -> Iterator[None]:
    """Keys come one by one and unseen, while the context is open; Ctrl-C stays a signal."""
    import termios
    import tty

    descriptor = sys.stdin.fileno()
    before = termios.tcgetattr(descriptor)
    try:
        tty.setcbreak(descriptor)
        yield
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)


async def _quit_key() -> None:
    """Return when q is pressed, or nobody can press a key any more."""
    import trio

    descriptor = sys.stdin.fileno()
    while True:
        await trio.lowlevel.wait_readable(descriptor)
        if not select.select([descriptor], [], [], 0)[0]:
            continue
        if os.read(descriptor, 64).lower() in (b"", b"q"):
            return


def top_lines(document: Document, rates: Rates, width: int, height: int) -> list[str]:
    """At most `height` lines of at most `width` columns."""
    from weightfs.units import counted

    lines = _head(document, rates)
    refs = sorted(document["refs"], key=lambda ref: _order(ref, rates.by_ref))
    name = _name_width(refs, width)
    lines += ["", _row(("MODEL", "TRUST", "SIZE", "HERE", "", "RATE", "LEFT", "WAIT"), name, width)]
    for number, ref in enumerate(refs):
        more = [_row(_cells(ref, rates.by_ref, name), name, width), *_notes(ref)]
        left = len(refs) - number - 1
        # One line is kept for the count of those for which there is no room.
        if len(lines) + len(more) > height - (1 if left else 0):
            more = more[: max(0, height - 1 - len(lines))]
            lines += [*more, f"… and {counted(left + (0 if more else 1), 'more model')}"]
            break
        lines += more
    if not refs:
        lines.append("no models; `weightfs add` makes them known")
    return [_cut(line, width) for line in lines[: max(0, height)]]


def _head(document: Document, rates: Rates) -> list[str]:
    from weightfs.units import counted, format_duration, format_size

    if document["mountpoint"]:
        who = f"serving {document['mountpoint']}"
    else:
        who = "idle" if document["role"] == "top" else f"weightfs {document['role']} at work"
    uptime = f" (pid {document['pid']}, for {format_duration(document['uptime'])})" if who != "idle" else ""
    limit = document["limit_bytes"]
    most = "" if limit is None else f" of at most {format_size(limit)}"
    parts = [
        f"cache {format_size(document['held_bytes'])}{most}",
        f"{format_size(document['free_bytes'])} free",
        f"{format_size(rates.total)}/s",
        f"{counted(len(document['jobs']), 'request')} in flight",
    ]
    lines = [f"{who}{uptime}", ", ".join(parts)]
    if document["paused"]:
        lines.append("paused: nothing is fetched that nobody waits for")
    faults = [
        f"{counted(document[key], 'chunk')} {text}"
        for key, text in (
            ("mismatched_chunks", "came damaged"),
            ("disk_faults", "the disk did not keep"),
        )
        if document[key]
    ]
    if faults:
        lines.append(f"  ! {', '.join(faults)}")
    if document["trouble"]:
        lines.append(f"  ! {document['trouble']}")
    return [_plain(line) for line in lines]


def _order(ref: Document, rates: Mapping[str, float]) -> tuple[bool, bool, bool, str]:
    """Who has waiting readers or errors first, then who is fetched, then who is not whole."""
    urgent = any(file["waiting_readers"] or file["error"] for file in ref["files"])
    return not urgent, not rates.get(ref["ref"]), bool(ref["complete"]), ref["ref"]


def _cells(ref: Document, rates: Mapping[str, float], name: int) -> tuple[str, ...]:
    from weightfs.units import format_duration, format_size

    size, present = ref["size_bytes"], ref["present_bytes"]
    rate = rates.get(ref["ref"], 0.0)
    percent = 100 if ref["complete"] else min(99, present * 100 // max(1, size))
    waiting = sum({file["blob"]: file["waiting_readers"] for file in ref["files"]}.values())
    marks = "".join(f" ({mark})" for mark in ("pinned", "paused") if ref.get(mark))
    bar = "#" * (BAR if ref["complete"] else min(BAR - 1, percent * BAR // 100))
    return (
        shortened(_plain(ref["ref"]), max(MIN_NAME, name - len(marks))) + marks,
        ref["trust"],
        format_size(size),
        f"{percent}%",
        bar.ljust(BAR, "."),
        f"{format_size(rate)}/s" if rate else "-",
        format_duration((size - present) / rate) if rate and present < size else "-",
        str(waiting) if waiting else "-",
    )


def _notes(ref: Document) -> list[str]:
    """What is wrong with a ref: one line for its errors, one for each mirror with faults, three at most."""
    from weightfs.units import counted, format_size

    lines = []
    failing = [file for file in ref["files"] if file["error"]]
    if failing:
        more = f" (and {counted(len(failing) - 1, 'more file')})" if len(failing) > 1 else ""
        lines.append(f"    ! {_plain(failing[0]['error'])}{more}")
    mirrors: dict[str, list[Document]] = {}
    for file in ref["files"]:
        for mirror in file["mirrors"]:
            if mirror["faults"] or mirror["mismatches"]:
                mirrors.setdefault(mirror["url"], []).append(mirror)
    for url, scores in list(mirrors.items())[:2]:
        faults, wrong = (sum(one[key] for one in scores) for key in ("faults", "mismatches"))
        rate = max((one["rate"] or 0.0 for one in scores), default=0.0)
        benched = max(one["benched_for"] or 0.0 for one in scores)
        told = f"{counted(faults, 'fault')}, {counted(wrong, 'wrong chunk')}, {format_size(rate)}/s"
        lines.append(f"    ! {told}{f', left alone for {benched:.0f}s' if benched else ''}: {_plain(url)}")
    return lines


def _name_width(refs: Sequence[Document], width: int) -> int:
    longest = max((len(ref["ref"]) + 18 for ref in refs), default=MIN_NAME)
    return max(MIN_NAME, min(longest, width - sum(2 + room for room in _columns(width) if room)))


def _columns(width: int) -> tuple[int, ...]:
    """The widths of the columns after the name; 0 leaves one out."""
    trust, size = (12, 9) if width >= NARROW else (0, 0)
    return trust, size, 4, BAR if width >= WIDE else 0, 11, 9, 4


def _row(cells: Sequence[str], name: int, width: int) -> str:
    shown = [shortened(cells[0], name).ljust(name)]
    for column, (cell, room) in enumerate(zip(cells[1:], _columns(width), strict=True)):
        if room:
            shown.append(cell.ljust(room) if column in (0, 3) else cell.rjust(room))
    return "  ".join(shown)


def _cut(line: str, width: int) -> str:
    return line if len(line) <= width else line[: max(0, width - 1)] + "…"


def _plain(text: str) -> str:
    from weightfs.cli.looking import printable
    from weightfs.logs import redact

    return printable(redact(text))
