"""`weightfs debug`: what a daemon is doing right now, and what a bug report needs.

Rule: it asks the daemon that has the cache, and never opens the cache itself.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from weightfs.cli.group import Stopped, examples, say
from weightfs.cli.looking import aligned, printable
from weightfs.cli.options import (
    cache_options,
    fetch_options,
    given_settings,
    json_option,
    limit_options,
    load_config,
)
from weightfs.errors import DaemonError

if TYPE_CHECKING:
    from weightfs.config import Config
    from weightfs.control.client import ControlClient
    from weightfs.control.ports import Document


@click.group(
    "debug",
    short_help="See what a daemon does right now.",
    epilog=examples("weightfs debug inflight", "weightfs debug stacks", "weightfs debug bundle"),
)
def debug() -> None:
    """Look into a running daemon: what waits, and for what; where it is; and all of it in a file for a bug report."""


@debug.command(
    short_help="What waits, and for what.",
    epilog=examples(
        "weightfs debug inflight",
        "weightfs debug inflight --json | jq '.requests[] | {op, age, pid, wait}'",
    ),
)
@json_option
@cache_options
@click.pass_context
def inflight(ctx: click.Context, /, as_json: bool, **_: object) -> int:
    """Show the kernel's requests that are not answered yet, and the fetches in flight, oldest first.

    Of a read: the chunks that it needs, and what each of them waits for. The kernel says who asks only for requests
    that name a file, not for reads. Complete files that the kernel reads by itself (passthrough) make no requests.
    """
    document = _ask(load_config(ctx), lambda daemon: daemon.inflight())
    _show(document, inflight_lines, as_json=as_json)
    return 0


@debug.command(
    short_help="Where its tasks and threads are.",
    epilog=examples("weightfs debug stacks", "kill -USR2 PID    # if it does not answer: to its log"),
)
@json_option
@cache_options
@click.pass_context
def stacks(ctx: click.Context, /, as_json: bool, **_: object) -> int:
    """Show the stacks of the daemon's tasks and threads: files, lines and functions, no values.

    A daemon whose loop stands still cannot answer. SIGUSR2 makes it write the stacks of its threads to stderr: to the
    journal, or to its log file.
    """
    try:
        document = _ask(load_config(ctx), lambda daemon: daemon.stacks())
    except DaemonError as error:
        raise DaemonError(
            f"{error}; a daemon that hangs writes its threads' stacks to its log at `kill -USR2 PID`"
        ) from None
    _show(document, stacks_lines, as_json=as_json)
    return 0


@debug.command(
    short_help="All of it in one file.",
    epilog=examples("weightfs debug bundle", "weightfs debug bundle -o /tmp/weightfs.tar.gz"),
)
@click.option(
    "-o",
    "--output",
    metavar="FILE",
    help="Where to.  [default: weightfs-debug-<time>.tar.gz in this directory]",
)
@limit_options
@fetch_options
@cache_options
@click.pass_context
def bundle(ctx: click.Context, /, output: str | None, **_: object) -> int:
    """Write an archive for a bug report.

    It has versions, settings, the doctor's report, status, what is in flight, stacks, and the end of the log. Tokens,
    passwords, header values and URL queries are taken out. Left are names of models and files, URLs, and paths of this
    machine: look into it before you pass it on. It is made also where no daemon runs, or none answers.
    """
    import trio

    from weightfs.app.bundle import Bundle, collect, write
    from weightfs.app.interrupts import run_until_signal

    config = load_config(ctx)
    given = ctx.params.get("config")
    file = None if given is None else Path(given).expanduser()
    now = time.time()
    path = Path(output or time.strftime("weightfs-debug-%Y%m%d-%H%M%S.tar.gz", time.gmtime(now))).expanduser()
    made: list[Bundle] = []

    async def run() -> None:
        made.append(await collect(config, given_settings(ctx), file, os.environ))

    signum = trio.run(run_until_signal, run)
    if signum is not None and not made:
        raise Stopped(signum, "stopped; nothing was written")
    size = write(made[0], path, now)
    for name, reason in sorted(made[0].missing.items()):
        say(f"warning: {name} is not in it: {reason}")
    from weightfs.units import format_size

    click.echo(f"{path} ({format_size(size)}); look into it before you pass it on")
    return 0


def _ask(config: Config, question: Callable[[ControlClient], Awaitable[Document]]) -> Document:
    """The daemon's answer. DaemonError if there is no daemon, or it does not answer."""
    import trio

    from weightfs.control.client import find_daemon

    async def run() -> Document:
        async with find_daemon(config.cache) as daemon:
            if daemon is None:
                raise DaemonError(f"no daemon has the cache {config.cache}; there is nothing to look into")
            return await question(daemon)

    return trio.run(run)


def _show(document: Document, lines: Callable[[Document], list[str]], *, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(document, indent=2))
        return
    for line in lines(document):
        click.echo(printable(line))


def inflight_lines(document: Document) -> list[str]:
    """For people."""
    from weightfs.units import format_duration, format_size

    requests, fetches = document["requests"], document["fetches"]
    count = len(requests) + document["requests_left_out"]
    lines = [
        f"{count} request{_s(count)} of the kernel in flight" + (", the oldest first" if count > 1 else "")
    ]
    for one in requests:
        lines += [_request_line(one), *(f"    {text}" for text in _wait_lines(one))]
    if document["requests_left_out"]:
        lines.append(f"... and {document['requests_left_out']} more")
    if document["left_behind"]:
        lines.append(
            f"{document['left_behind']} works hang whose requests were answered long ago: weightfs debug stacks"
        )
    if document["overdue"]:
        lines.append(
            f"{document['overdue']} were overdue since the start: the log has each with all that it waited for"
        )
    lines += ["", f"{len(fetches)} fetch{'' if len(fetches) == 1 else 'es'} in flight"]
    rows = [
        (
            format_duration(one["age"]),
            f"{one['first_chunk']}-{one['last_chunk']}",
            format_size(one["bytes_left"]),
            one["priority"],
            one["mirror"],
        )
        for one in fetches
    ]
    if rows:
        lines += aligned([("AGE", "CHUNKS", "LEFT", "FOR", "MIRROR"), *rows], right=(0, 2))
    return lines


def _request_line(one: Document) -> str:
    from weightfs.units import format_duration

    parts = [f"{format_duration(one['age'])}  {one['op']} (request {one['number']}, inode {one['inode']})"]
    if one["name"]:
        parts.append(f"name {one['name']}")
    if one["offset"] is not None:
        parts.append(f"bytes [{one['offset']}, {one['offset'] + one['size']})")
    if one["pid"] is not None:
        parts.append(f"by process {one['pid']}")
    if one["held"]:
        parts.append("its failing answer is held back")
    if one["overdue"]:
        parts.append("overdue")
    return ", ".join(parts)


def _wait_lines(one: Document) -> list[str]:
    from weightfs.units import format_duration

    wait = one["wait"]
    if not wait:
        return []
    lines = [f"{wait['ref']}: {wait['present_chunks']} of {wait['chunk_count']} chunks are here"]
    if wait["obstacle"]:
        lines.append(wait["obstacle"])
    for chunk in wait["chunks"]:
        text = f"chunk {chunk['chunk']}: {chunk['state']}"
        if chunk["job"] is not None:
            text += f", job {chunk['job']} from {chunk['mirror']} for {format_duration(chunk['age'])}"
        if chunk["suspect"]:
            text += ", to be hashed again first"
        if chunk["rest"] is not None:
            text += f", for another {format_duration(chunk['rest'])}"
        lines.append(text + (f", {chunk['why']}" if chunk["why"] else ""))
    if wait["left_out"]:
        lines.append(f"and {wait['left_out']} more chunks")
    return lines


def stacks_lines(document: Document) -> list[str]:
    """For people: outermost frame first."""
    lines = []
    for kind in ("tasks", "threads"):
        total = sum(one["count"] for one in document[kind]) + document[f"{kind}_left_out"]
        lines.append(f"{total} {kind}")
        for one in document[kind]:
            more = ", …" if one["count"] > len(one["names"]) else ""
            lines.append(f"  {one['count']} x {', '.join(one['names'])}{more}")
            lines += [f"      {frame}" for frame in one["frames"]]
        if document[f"{kind}_left_out"]:
            lines.append(f"  ... and {document[f'{kind}_left_out']} more")
        lines.append("")
    return lines[:-1]


def _s(count: int) -> str:
    return "" if count == 1 else "s"
