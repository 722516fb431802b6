"""`weightfs status` and `weightfs ls`: what is there and what is going on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from weightfs.cli.asking import ask
from weightfs.cli.group import examples
from weightfs.cli.options import cache_options, json_option, load_config

if TYPE_CHECKING:
    from weightfs.control.ports import Document, Operations


@click.command(
    short_help="Show what is going on.",
    epilog=examples(
        "weightfs status",
        "weightfs status --json | jq '.refs[] | {ref, present_bytes, trust}'",
    ),
)
@json_option
@cache_options
@click.pass_context
def status(ctx: click.Context, /, as_json: bool, **_: object) -> int:
    """Show the daemon, its models, and how far each is; of an idle cache, what it holds."""
    config = load_config(ctx)

    async def work(operations: Operations, _: bool) -> Document:
        return await operations.status()

    document = ask(ctx, config, "status", work)
    if as_json:
        click.echo(json.dumps(document, indent=2))
    else:
        for line in status_lines(document):
            click.echo(line)
    return 0


@click.command(
    short_help="List the models.",
    epilog=examples(
        "weightfs ls",
        "weightfs ls -l",
        "weightfs ls --json | jq -r '.refs[].ref'",
    ),
)
@click.option("-l", "--long", "as_long", is_flag=True, help="With trust, size, what is present, and paths.")
@json_option
@cache_options
@click.pass_context
def ls(ctx: click.Context, /, as_long: bool, as_json: bool, **_: object) -> int:
    """List the refs in the cache."""
    config = load_config(ctx)

    async def work(operations: Operations, _: bool) -> list[Document]:
        return await operations.refs()

    refs = ask(ctx, config, "ls", work)
    if as_json:
        click.echo(json.dumps({"refs": refs}, indent=2))
        return 0
    for line in long_lines(refs) if as_long else [str(ref["ref"]) for ref in refs]:
        click.echo(line)
    return 0


def long_lines(refs: Sequence[Document]) -> list[str]:
    """One line per ref: trust, size, share that is present, ref; below it, indented, its paths."""
    from weightfs.units import format_size

    rows = [(ref["trust"], format_size(ref["size_bytes"]), _share(ref), _name(ref)) for ref in refs]
    lines = aligned(rows, right=(1, 2))
    result = []
    for line, ref in zip(lines, refs, strict=True):
        result.append(line)
        result += [f"    {blob['path']}" for blob in ref["blobs"]]
    return result


def status_lines(document: Document) -> list[str]:
    """The status for people."""
    from weightfs.units import format_duration, format_size

    if document["role"] == "mount":
        head = f"serving {document['mountpoint']} (pid {document['pid']}, for {format_duration(document['uptime'])})"
    elif document["role"] == "status":
        head = "idle: no daemon has this cache"
    else:
        head = f"weightfs {document['role']} is at work (pid {document['pid']})"
    held = f"{format_size(document['cache_bytes'])} in {len(document['refs'])} refs"
    lines = [head, f"cache {document['cache']}: {held}, {format_size(document['free_bytes'])} free"]
    if document["fetched_bytes"]:
        lines.append(f"fetched {format_size(document['fetched_bytes'])} since the start")
    for count, text in (
        (document["mismatched_chunks"], "chunks did not match their list and were fetched elsewhere"),
        (document["disk_faults"], "chunks that the disk did not keep"),
    ):
        if count:
            lines.append(f"warning: {count} {text}")
    if document["trouble"]:
        lines.append(f"trouble: {document['trouble']}")
    lines.append("")
    rows = [
        (ref["trust"], format_size(ref["size_bytes"]), _share(ref), _name(ref)) for ref in document["refs"]
    ]
    lines += aligned([("TRUST", "SIZE", "HERE", "REF"), *rows], right=(1, 2)) if rows else ["no refs"]
    for ref in document["refs"]:
        lines += [f"  {line}" for file in ref["files"] for line in _file_lines(file)]
    for job in document["jobs"]:
        lines.append(
            f"  in flight: chunks {job['first_chunk']} to {job['last_chunk']} from {job['mirror']}, "
            f"{format_size(job['bytes_left'])} left, for {format_duration(job['age'])} ({job['priority']})"
        )
    return lines


def _file_lines(file: Document) -> list[str]:
    """What is worth telling about one file: readers that wait, errors, mirrors with faults."""
    from weightfs.units import format_size

    lines = []
    if file["waiting_readers"]:
        lines.append(f"{file['path']}: {file['waiting_readers']} readers wait")
    if file["error"]:
        lines.append(f"{file['path']}: {file['error']}")
    for mirror in file["mirrors"]:
        if mirror["faults"] or mirror["mismatches"]:
            rate = f", {format_size(mirror['rate'])}/s" if mirror["rate"] else ""
            lines.append(
                f"{mirror['url']}: {mirror['faults']} faults, {mirror['mismatches']} wrong chunks{rate}"
            )
    return lines


def _name(ref: Document) -> str:
    return f"{ref['ref']} (pinned)" if ref.get("pinned") else str(ref["ref"])


def _share(ref: Document) -> str:
    if ref["complete"]:
        return "100%"
    # 100 % is said of what is complete alone.
    return f"{min(99, ref['present_bytes'] * 100 // max(1, ref['size_bytes']))}%"


def aligned(rows: Sequence[Sequence[str]], *, right: Sequence[int] = ()) -> list[str]:
    """Columns as wide as their widest cell; the last one is not padded."""
    if not rows:
        return []
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    last = len(widths) - 1
    lines = []
    for row in rows:
        cells = [
            cell.rjust(width) if column in right else cell if column == last else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells))
    return lines
