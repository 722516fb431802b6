"""`weightfs map`: where a model's tensors lie, and how much of each is in the cache, as a picture.

Rule: a bar is full only where everything is there, and empty only where nothing is; names that a file gives are never
passed on to the terminal with control characters in them.
"""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import click

from weightfs.cli.asking import ask
from weightfs.cli.group import examples, say
from weightfs.cli.looking import aligned, printable
from weightfs.cli.options import cache_options, json_option, load_config, parse_refs
from weightfs.cli.painting import paint, takes_blocks
from weightfs.errors import FailureKind, IntegrityError, SourceError, UsageError, WeightfsError

if TYPE_CHECKING:
    from weightfs.control.ports import Document, Operations

MAX_BAR: Final = 40  # columns
MIN_BAR: Final = 8
MIN_NAME: Final = 16
PIPED_WIDTH: Final = 120  # where nobody watches


@dataclass(frozen=True, slots=True)
class Palette:
    """How the three parts of a bar look: a mark of one column each."""

    verified: str
    cached: str
    missing: str


PLAIN: Final = Palette("#", "=", ".")
COLOURED: Final = Palette("█", "▓", "░")
STYLES: Final = {COLOURED.verified: "green", COLOURED.cached: "yellow", COLOURED.missing: "bright_black"}


_SPACE: Final = ("OFFSET", "SIZE", "CACHED")


@click.command(
    "map",
    short_help="Show where tensors lie, and what is cached of them.",
    epilog=examples(
        "weightfs map ollama://aya:8b",
        "weightfs map --by tensor https://models.example.com/tiny.gguf",
        "weightfs map --json --by tensor REF | jq '.files[].tensors[] | select(.cached_bytes > 0) | .name'",
    ),
)
@click.argument("ref", metavar="REF")
@click.option(
    "--by", type=click.Choice(["layer", "tensor"]), default="layer", show_default=True, help="A row for each."
)
@click.option("--fetch", is_flag=True, help="Fetch headers that are not cached yet; tensors never.")
@json_option
@cache_options
@click.pass_context
def map_(ctx: click.Context, /, ref: str, by: str, fetch: bool, as_json: bool, **_: object) -> int:
    """Show, per layer or per tensor of REF, where it lies and how much of it is cached and verified."""
    config = load_config(ctx)
    (parsed,) = parse_refs((ref,))

    async def work(operations: Operations, _: bool) -> Document:
        return await operations.tensor_map(str(parsed), layers=by == "layer", fetch=fetch)

    document = ask(ctx, config, "map", work, fetches=fetch)
    check(document, fetched=fetch)
    if as_json:
        click.echo(json.dumps(document, indent=2))
        return 0
    show(document)
    for file in document["files"]:
        if file["problem"]:
            say(f"{printable(file['path'])}: {file['problem']}")
    return 0


def check(document: Document, *, fetched: bool) -> None:
    """Raise, if there is nothing to show, the error that says why and what to do."""
    ref, files = document["ref"], document["files"]
    if not files:
        raise UsageError(
            f"{ref} has no GGUF or safetensors file, so nothing can be mapped; `weightfs ls -l {ref}` shows what it has"
        )
    if any(file["header"] == "read" for file in files):
        return
    first = files[0]
    raise _why(f"{first['path']} of {ref}", first, ref, fetched=fetched)


def _why(what: str, file: Document, ref: str, *, fetched: bool) -> WeightfsError:
    problem = file["problem"].removesuffix(".")
    match file["header"]:
        case "malformed":
            return IntegrityError(f"{what} cannot be mapped: {problem}; look where it comes from")
        case "withheld":
            return UsageError(f"{what} cannot be read yet: {problem}; `weightfs pull {ref}` verifies it")
        case _ if fetched:
            return SourceError(f"{what} cannot be mapped: {problem}", kind=FailureKind.TIMEOUT)
        case _:
            return UsageError(f"{what}: {problem}; `weightfs map --fetch {ref}` fetches it")


def show(document: Document) -> None:
    """Print the picture: coloured where a terminal shows it, else in ASCII."""
    palette = choose_palette()
    width = shutil.get_terminal_size((PIPED_WIDTH, 24)).columns
    if not sys.stdout.isatty():
        width = max(width, PIPED_WIDTH)
    lines = picture(document, width, palette)
    paint(lines, {} if palette is PLAIN else STYLES)


def choose_palette() -> Palette:
    """Colours and blocks only for a terminal that has both and a person who wants them (no-color.org)."""
    return COLOURED if takes_blocks() else PLAIN


def picture(document: Document, width: int, palette: Palette) -> list[str]:
    """The lines, none wider than `width` as far as names can be shortened."""
    lines = [f"{palette.verified} verified  {palette.cached} cached  {palette.missing} not cached"]
    for file in document["files"]:
        if file["header"] == "read":
            lines += ["", *_file_lines(file, width, palette)]
    return lines


def _file_lines(file: Document, width: int, palette: Palette) -> list[str]:
    from weightfs.units import format_size

    rows = file["layers"] if "layers" in file else file["tensors"]
    head = (*(("LAYER", "TYPE", "TENSORS") if "layers" in file else ("TENSOR", "TYPE", "SHAPE")), *_SPACE)
    cells = [head, *(_cells(row) for row in rows)]
    others = [len(line) for line in aligned([("", *row[1:]) for row in cells], right=(3, 4, 5))]
    longest = max(len(row[0]) for row in cells)
    room = width - max(others) - 2
    bar = max(MIN_BAR, min(MAX_BAR, room - longest))
    name = max(MIN_NAME, min(longest, room - bar))
    table = aligned([(shortened(row[0], name), *row[1:]) for row in cells], right=(3, 4, 5))
    share = f"{format_size(file['cached_bytes'])} of {format_size(file['size_bytes'])} cached"
    lines = [
        f"{printable(file['path'])}  {share}, {format_size(file['verified_bytes'])} verified",
        table[0].rstrip(),
    ]
    lines += [
        f"{line}  {draw(row['size_bytes'], row['cached_bytes'], row['verified_bytes'], bar, palette)}"
        for line, row in zip(table[1:], rows, strict=True)
    ]
    return lines


def _cells(row: Document) -> tuple[str, ...]:
    from weightfs.units import format_size

    what = str(row["tensor_count"]) if "tensor_count" in row else "x".join(map(str, row["shape"])) or "1"
    share = f"{percent(row['cached_bytes'], row['size_bytes'])}%"
    return (
        printable(row["name"]),
        row["dtype"],
        what,
        str(row["offset"]),
        format_size(row["size_bytes"]),
        share.rjust(4),
    )


def draw(size: int, cached: int, verified: int, width: int, palette: Palette) -> str:
    """A bar of `width` marks: what is verified, then what is cached only, then what is missing."""
    good = _marks(verified, size, width)
    there = max(good, _marks(cached, size, width))
    return palette.verified * good + palette.cached * (there - good) + palette.missing * (width - there)


def _marks(part: int, size: int, width: int) -> int:
    if part >= size:
        return width
    return min(width - 1, max(1, part * width // size)) if part else 0


def percent(part: int, size: int) -> int:
    """100 is said of what is complete alone, 0 of what is not there at all."""
    return _marks(part, size, 100)


def shortened(name: str, width: int) -> str:
    """At most `width` characters: the middle goes, since both ends tell tensors apart."""
    if len(name) <= width:
        return name
    tail = (width - 1) // 2
    return f"{name[: width - 1 - tail]}~{name[len(name) - tail :]}"
