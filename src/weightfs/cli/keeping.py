"""`weightfs verify` and `weightfs rm`: looking after what the cache holds."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from weightfs.cli.asking import ask
from weightfs.cli.group import examples
from weightfs.cli.options import (
    cache_options,
    fetch_options,
    json_option,
    load_config,
    parse_refs,
)
from weightfs.errors import DaemonError, IntegrityError

if TYPE_CHECKING:
    from weightfs.cli.progress import Progress
    from weightfs.control.ports import Document, Operations
    from weightfs.core.ref import Ref

POLL = 0.5  # seconds between two looks at the progress


@click.command(
    short_help="Re-hash what is cached.",
    epilog=examples(
        "weightfs verify",
        "weightfs verify --repair https://models.example.com/tiny.gguf",
    ),
)
@click.argument("refs", metavar="[REF]...", nargs=-1)
@click.option("--repair", is_flag=True, help="Fetch again the chunks that are damaged, and only those.")
@json_option
@fetch_options
@cache_options
@click.pass_context
def verify(ctx: click.Context, /, refs: tuple[str, ...], repair: bool, as_json: bool, **_: object) -> int:
    """Compare what is cached of the REFs (of all, if none is named) with its recorded digests.

    Ends with 0 if all is as it should be, or was repaired, and with 4 if not. Without --repair nothing is changed: what
    is damaged is read as it is.
    """
    config = load_config(ctx)
    parsed = parse_refs(refs)
    from weightfs.cli.progress import make_progress

    with make_progress(quiet=as_json) as progress:

        async def work(operations: Operations, _: bool) -> Document:
            return await _verify(operations, parsed, progress, repair=repair)

        result = ask(
            ctx, config, "verify", work, fetches=repair, stopped="stopped; nothing was changed by halves"
        )
    if as_json:
        click.echo(json.dumps(result, indent=2))
    else:
        for report in result["reports"]:
            for line in report_lines(report):
                click.echo(line)
    if not result["ok"]:
        raise IntegrityError(verdict(result["reports"], repair=repair))
    return 0


async def _verify(operations: Operations, refs: list[Ref], progress: Progress, *, repair: bool) -> Document:
    job = await operations.start_verify([str(ref) for ref in refs], repair=repair)
    return await follow(operations, job, progress, "verification")


async def follow(operations: Operations, job: Document, progress: Progress, what: str) -> Document:
    """Wait for a job that hashes refs, and show how far it is; its result. Who stops waiting stops the job."""
    import trio

    from weightfs.control.documents import error_from_json
    from weightfs.logs import redact_url

    try:
        while job["state"] == "running":
            job = await operations.job(job["job"], wait=POLL)
            at = job["progress"]
            if at:
                progress.begin(at["ref"], redact_url(at["ref"]), at["total"])
                progress.update(at["ref"], at["done"], at["total"])
    finally:
        if job["state"] == "running":
            with trio.move_on_after(5, shield=True):
                await operations.cancel_job(job["job"])
    if job["state"] == "failed":
        raise error_from_json(job["error"])
    if job["state"] == "cancelled":
        raise DaemonError(f"somebody cancelled the {what}; run the command again")
    result: Document = job["result"]
    return result


def verdict(reports: Sequence[Document], *, repair: bool) -> str:
    """One sentence about the refs that are not as they should be, with the way out."""
    wrong = [report["ref"] for report in reports if report["quarantined"]]
    if wrong:
        return (
            f"{', '.join(wrong)}: not what was promised; `weightfs repair` fetches it again, from another mirror if "
            "there is one"
        )
    damaged = [report["ref"] for report in reports if not report["ok"]]
    way_out = (
        "remove it and pull it again" if repair else "it is read as it is until you run verify with --repair"
    )
    return f"what is cached of {', '.join(damaged)} is not what was recorded; {way_out}"


def report_lines(report: Document) -> list[str]:
    """One ref's report for people."""
    from weightfs.logs import redact_url
    from weightfs.units import counted, format_size

    name = redact_url(report["ref"])
    verdict = "ok" if report["ok"] else "DAMAGED"
    checked = f"{counted(report['checked_chunks'], 'chunk')} ({format_size(report['checked_bytes'])})"
    lines = [f"{name}: {verdict}, {checked} checked"]
    lines += [f"    {path}: chunk {chunk} is damaged" for path, chunk in report["bad"]]
    if report["repaired"]:
        lines.append(f"    fetched again: {counted(report['repaired'], 'chunk')}")
    lines += [
        f"    {path}: quarantined, its digest is not the promised one" for path in report["quarantined"]
    ]
    return lines


@click.command(
    short_help="Remove a model from the cache.",
    epilog=examples(
        "weightfs rm https://models.example.com/tiny.gguf",
        "weightfs rm ollama://aya:8b",
    ),
)
@click.argument("refs", metavar="REF...", nargs=-1, required=True)
@json_option
@cache_options
@click.pass_context
def rm(ctx: click.Context, /, refs: tuple[str, ...], as_json: bool, **_: object) -> int:
    """Forget the REFs, pinned or not, and delete what only they had. A running mount stops showing them at once."""
    config = load_config(ctx)
    parsed = parse_refs(refs)

    async def work(operations: Operations, _: bool) -> list[Document]:
        return [await operations.remove(str(ref)) for ref in parsed]

    from weightfs.logs import redact_url
    from weightfs.units import format_size

    removed = ask(ctx, config, "rm", work)
    if as_json:
        click.echo(json.dumps({"removed": removed}, indent=2))
        return 0
    for document in removed:
        click.echo(f"{redact_url(document['ref'])}: {format_size(document['freed_bytes'])} freed")
    return 0
