"""`weightfs repair`: fetch again what is bad on the disk, or quarantined."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import click

from weightfs.cli.asking import ask
from weightfs.cli.group import examples
from weightfs.cli.keeping import follow, report_lines
from weightfs.cli.options import (
    cache_options,
    fetch_options,
    json_option,
    load_config,
    parse_refs,
)
from weightfs.errors import IntegrityError

if TYPE_CHECKING:
    from weightfs.control.ports import Document, Operations


@click.command(
    short_help="Fetch again what is damaged or quarantined.",
    epilog=examples(
        "weightfs repair",
        "weightfs repair --json https://models.example.com/tiny.gguf",
    ),
)
@click.argument("refs", metavar="[REF]...", nargs=-1)
@json_option
@fetch_options
@cache_options
@click.pass_context
def repair(ctx: click.Context, /, refs: tuple[str, ...], as_json: bool, **_: object) -> int:
    """Hash what is cached of the REFs (of all, if none is named), and fetch again what is wrong.

    Of what the disk spoilt, the chunks that differ from their records; of a quarantined file every chunk, from another
    mirror than the one that gave it if there is one, until the digest of the whole is the promised one.
    Ends with 0 if all is right now, and with 4 if not.
    """
    config = load_config(ctx)
    parsed = parse_refs(refs)
    from weightfs.cli.progress import make_progress

    with make_progress(quiet=as_json) as progress:

        async def work(operations: Operations, _: bool) -> Document:
            job = await operations.start_repair([str(ref) for ref in parsed])
            return await follow(operations, job, progress, "repair")

        result = ask(ctx, config, "repair", work, fetches=True, stopped="stopped; what was fetched is kept")
    if as_json:
        click.echo(json.dumps(result, indent=2))
    else:
        for report in result["reports"]:
            for line in repair_lines(report):
                click.echo(line)
    wrong = [report["ref"] for report in result["reports"] if not report["ok"]]
    if wrong:
        raise IntegrityError(
            f"{', '.join(wrong)}: still not what was promised; name a mirror that has the right bytes, or remove it "
            "with `weightfs rm`"
        )
    return 0


def repair_lines(report: Document) -> list[str]:
    """One ref's report for people."""
    lines = report_lines(report)
    for found in report["mended"]:
        wrong, right = found["wrong_from"] or "its mirror", found["right_from"] or "its mirror"
        lines.append(
            f"    {found['path']}: chunk {found['chunk']} was wrong from {wrong}, and is right from {right}"
        )
    for path, wrong in report["wrong"].items():
        lines.append(
            f"    {path}: wrong chunks since the start: {wrong['wire']} by the wire, {wrong['disk']} by the disk, "
            f"{wrong['origin']} by the origin"
        )
    return lines
