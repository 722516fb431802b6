"""What `weightfs status REF` draws: the chunks of each file as one line, scaled to the terminal.

Rule: everything drawn is bounded by the terminal's width and by `MAX_FILES`; names that a file gives are never passed
on to the terminal with control characters in them.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from weightfs.cli.mapping import PIPED_WIDTH, shortened
from weightfs.cli.painting import paint, takes_blocks
from weightfs.core.cells import Cell, cell_of, cells

if TYPE_CHECKING:
    from weightfs.control.ports import Document

MAX_FILES: Final = 64  # of a data set with many thousands; --json has all
MAX_LINE: Final = 200  # columns: a longer line is not easier to read
MIN_LINE: Final = 8
INDENT: Final = "  "

PLAIN: Final = {
    Cell.PRESENT: "#",
    Cell.PART: "=",
    Cell.IN_FLIGHT: ">",
    Cell.QUARANTINED: "!",
    Cell.ABSENT: ".",
}
BLOCKS: Final = {
    Cell.PRESENT: "█",
    Cell.PART: "▒",
    Cell.IN_FLIGHT: "▶",
    Cell.QUARANTINED: "✗",
    Cell.ABSENT: "░",
}
STYLES: Final = {"█": "green", "▒": "yellow", "▶": "cyan", "✗": "bold red", "░": "bright_black"}
WORDS: Final = {Cell.PRESENT: "here", Cell.PART: "part of it", Cell.IN_FLIGHT: "in flight"} | {
    Cell.QUARANTINED: "quarantined",
    Cell.ABSENT: "absent",
}


def chunk_lines(document: Document, width: int, marks: dict[Cell, str]) -> list[str]:
    """The legend, and for each file its name, its line, and below that line where its header is."""
    legend = "  ".join(f"{marks[cell]} {word}" for cell, word in WORDS.items())
    lines = [f"{legend}  h header"]
    files = document["files"]
    for file in files[:MAX_FILES]:
        lines += ["", *file_lines(file, width, marks)]
    if len(files) > MAX_FILES:
        lines += ["", f"… and {len(files) - MAX_FILES} more files: --json has all"]
    return [line if len(line) <= width else line[: width - 1] + "…" for line in lines]


def file_lines(file: Document, width: int, marks: dict[Cell, str]) -> list[str]:
    """One file."""
    from weightfs.cli.looking import printable
    from weightfs.units import format_size

    share = f"{format_size(file['cached_bytes'])} of {format_size(file['size_bytes'])}, {file['trust']}"
    each = f"{file['chunk_count']} × {format_size(file['chunk_length'])}"
    lines = [shortened(printable(file["path"]), max(MIN_LINE, width)), f"{INDENT}{share}, {each}"]
    runs, first, count = file["runs"], file["first_chunk"], file["chunk_count"]
    if runs is None:
        return [*lines, f"{INDENT}it has too many runs of chunks to be drawn beside the others"]
    if not count:
        return lines
    room = max(MIN_LINE, min(MAX_LINE, width - len(INDENT)))
    own = {name: [(start - first, stop - first) for start, stop in runs[name]] for name in runs}
    line = cells(
        count, room, present=own["present"], in_flight=own["in_flight"], quarantined=own["quarantined"]
    )
    lines.append(INDENT + "".join(marks[cell] for cell in line))
    header = file["header_bytes"]
    if header:
        # Of a member of a tar the header begins somewhere in its first chunk: a chunk more at most.
        last = min(count - 1, (header - 1) // file["chunk_length"])
        lines.append(f"{INDENT}{'h' * (cell_of(last, count, len(line)) + 1)}")
    return lines


def terminal_width() -> int:
    """Columns of the terminal, or what suits a file."""
    import shutil

    width = shutil.get_terminal_size((PIPED_WIDTH, 24)).columns
    return width if sys.stdout.isatty() else max(width, PIPED_WIDTH)


def choose_marks() -> dict[Cell, str]:
    """Blocks for a terminal that has them, and for a person who wants them (no-color.org); else ASCII."""
    return BLOCKS if takes_blocks() else PLAIN


def show(lines: Sequence[str], marks: dict[Cell, str]) -> None:
    """Print them; in colours where there are blocks."""
    paint(lines, {} if marks is PLAIN else STYLES)
