"""`weightfs gc`: evict what is too old or beyond the limits of the cache, now."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import click

from weightfs.cli.asking import ask
from weightfs.cli.group import examples
from weightfs.cli.options import cache_options, json_option, limit_options, load_config

if TYPE_CHECKING:
    from weightfs.control.ports import Document, Operations


@click.command(
    short_help="Evict what is beyond the limits.",
    epilog=examples(
        "weightfs gc --dry-run",
        "weightfs gc --max-age 30d",
        "weightfs gc --max-size 200GiB --json",
    ),
)
@click.option("-n", "--dry-run", is_flag=True, help="Only say what would be evicted.")
@json_option
@limit_options
@cache_options
@click.pass_context
def gc(ctx: click.Context, /, dry_run: bool, as_json: bool, **_: object) -> int:
    """Evict what was not used for longer than max-age, and the least recently used beyond max-size and min-free.

    Pinned models and open files stay. What is evicted is still listed, and is fetched again when it is read. A running
    mount does the same by itself, with its own limits.
    """
    config = load_config(ctx)

    async def work(operations: Operations, _: bool) -> Document:
        return await operations.gc(dry_run=dry_run)

    report = ask(ctx, config, "gc", work)
    if as_json:
        click.echo(json.dumps(report, indent=2))
    else:
        for line in gc_lines(report):
            click.echo(line)
    return 0


def gc_lines(report: Document) -> list[str]:
    """The report for people."""
    from weightfs.logs import redact_url
    from weightfs.units import format_duration, format_size

    verb = "would be evicted" if report["dry_run"] else "evicted"
    lines = [
        f"{redact_url(one['ref'])}: {format_size(one['nbytes'])}{'' if one['whole'] else ' of it'} {verb}, "
        f"not used for {format_duration(one['idle_seconds'])}"
        for one in report["evicted"]
    ]
    limit = "no limit" if report["limit_bytes"] is None else f"limit {format_size(report['limit_bytes'])}"
    total = f"{format_size(report['freed_bytes'])} {'to be freed' if report['dry_run'] else 'freed'}"
    lines.append(f"{total}; {format_size(report['held_bytes'])} in the cache, {limit}")
    if report["missing_bytes"]:
        lines.append(
            f"warning: {format_size(report['missing_bytes'])} more are beyond the limits, and what is left is pinned "
            "or in use"
        )
    return lines
