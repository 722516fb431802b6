"""`weightfs status` and `weightfs ls`: what is there, what it is, and what is going on.

Rule: what a file says of itself is never passed on to the terminal with control characters in it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

import click

from weightfs.cli.asking import ask
from weightfs.cli.group import examples
from weightfs.cli.options import cache_options, json_option, load_config, parse_refs
from weightfs.errors import RefError, UsageError

if TYPE_CHECKING:
    from weightfs.config import Config
    from weightfs.control.ports import Document, Operations
    from weightfs.core.cells import Cell

MAX_FILES: Final = 64  # of a ref of which everything is shown


@click.command(
    short_help="Show what is going on.",
    epilog=examples(
        "weightfs status",
        "weightfs status ollama://aya:8b",
        "weightfs status --json | jq '.refs[] | {ref, present_bytes, trust}'",
        "weightfs status --json ollama://aya:8b | jq '.refs[].chunks.files[].runs.present'",
    ),
)
@click.argument("refs", metavar="[REF]...", nargs=-1)
@json_option
@cache_options
@click.pass_context
def status(ctx: click.Context, /, refs: tuple[str, ...], as_json: bool, **_: object) -> int:
    """Show the daemon, its models, and how far each is; of an idle cache, what it holds.

    Of a REF that is named: which of its chunks are here, in flight, quarantined or absent, drawn as one line per file.
    """
    config = load_config(ctx)
    names = [str(ref) for ref in parse_refs(refs)]

    async def work(operations: Operations, _: bool) -> Document:
        document = await operations.status()
        if names:
            document["refs"] = [
                {**ref, "chunks": await operations.chunk_map(ref["ref"])}
                for ref in chosen(document["refs"], names)
            ]
        return document

    document = ask(ctx, config, "status", work)
    if as_json:
        click.echo(json.dumps(document, indent=2))
        return 0
    if not names:
        for line in status_lines(document):
            click.echo(line)
        return 0
    from weightfs.cli import picturing

    marks = picturing.choose_marks()
    for ref in document["refs"]:
        picturing.show(ref_lines(ref, picturing.terminal_width(), marks), marks)
    return 0


def ref_lines(ref: Document, width: int, marks: dict[Cell, str]) -> list[str]:
    """One ref: how far it is, what is wrong with its files, and its chunks."""
    from weightfs.cli.picturing import chunk_lines
    from weightfs.units import format_size

    share = f"{_share(ref)} of {format_size(ref['size_bytes'])}"
    fill = "" if ref["fill"] == "default" else f", fill: {ref['fill']}"
    lines = [_name(ref), f"  {share}, {ref['trust']}, revision {printable(ref['revision'])}{fill}"]
    lines += [f"  {printable(line)}" for file in ref["files"][:MAX_FILES] for line in _file_lines(file)]
    return [
        *lines,
        *(f"  {line}".rstrip() for line in chunk_lines(ref["chunks"], max(1, width - 2), marks)),
        "",
    ]


@click.command(
    short_help="List the models.",
    epilog=examples(
        "weightfs ls",
        "weightfs ls -l",
        "weightfs ls -l ollama://aya:8b",
        "weightfs ls --json | jq -r '.refs[].ref'",
    ),
)
@click.argument("refs", metavar="[REF]...", nargs=-1)
@click.option(
    "-l",
    "--long",
    "as_long",
    is_flag=True,
    help="With trust, size, what is present, and paths; of a REF that is named, what its headers say.",
)
@click.option(
    "--fetch", is_flag=True, help="With -l REF: fetch headers that are not cached yet; tensors never."
)
@json_option
@cache_options
@click.pass_context
def ls(
    ctx: click.Context, /, refs: tuple[str, ...], as_long: bool, fetch: bool, as_json: bool, **_: object
) -> int:
    """List the refs in the cache, or show what a REF is: architecture, quantisation, parameters, files."""
    if fetch and not (as_long and refs):
        raise UsageError("--fetch goes with -l and a REF, as in `weightfs ls -l --fetch REF`")
    config = load_config(ctx)
    names = [str(ref) for ref in parse_refs(refs)]
    if names and as_long:
        return _ls_details(ctx, config, names, fetch=fetch, as_json=as_json)

    async def work(operations: Operations, _: bool) -> list[Document]:
        return chosen(await operations.refs(), names)

    documents = ask(ctx, config, "ls", work)
    if as_json:
        click.echo(json.dumps({"refs": documents}, indent=2))
        return 0
    for line in long_lines(documents) if as_long else [str(ref["ref"]) for ref in documents]:
        click.echo(line)
    return 0


def chosen(refs: Sequence[Document], names: Sequence[str]) -> list[Document]:
    """The documents of the refs that were named, of all if none was. RefError."""
    from weightfs.core.names import identity

    if not names:
        return list(refs)
    known = {identity(ref["ref"]): ref for ref in refs}
    for name in names:
        if identity(name) not in known:
            raise RefError(f"{name} is not in the cache; `weightfs ls` lists what is")
    return [known[identity(name)] for name in names]


def _ls_details(
    ctx: click.Context, config: Config, names: Sequence[str], *, fetch: bool, as_json: bool
) -> int:
    async def work(operations: Operations, _: bool) -> list[Document]:
        return [await operations.details(name, fetch=fetch) for name in names]

    documents = ask(ctx, config, "ls", work, fetches=fetch)
    if as_json:
        click.echo(json.dumps({"refs": documents}, indent=2))
        return 0
    for document in documents:
        for line in details_lines(document):
            click.echo(line)
    return 0


def details_lines(document: Document) -> list[str]:
    """A ref, what each of its models is, and its files."""
    from weightfs.units import format_size

    lines = [document["ref"]]
    for model in document["models"]:
        lines += [f"  {printable(model['name'])}", *(f"    {line}" for line in _model_lines(model))]
    rows = [
        (
            format_size(file["size_bytes"]),
            format_size(file["cached_bytes"]),
            file["trust"],
            printable(file["path"]),
        )
        for file in document["files"]
    ]
    lines += [f"  {line}" for line in aligned([("SIZE", "CACHED", "TRUST", "FILE"), *rows], right=(0, 1))]
    if not document["models"]:
        lines.append("  no GGUF or safetensors file: nothing is known of a model")
    for file in document["files"]:
        if file["problem"]:
            lines.append(f"  {printable(file['path'])}: {printable(file['problem'])}")
    if any(file["header"] == "missing" for file in document["files"]):
        lines.append(f"  `weightfs ls -l --fetch {document['ref']}` fetches headers that are missing")
    return lines


def _model_lines(model: Document) -> list[str]:
    from weightfs.units import format_count, format_size

    unread = model["unread"]
    if unread == len(model["files"]):
        return []
    context = model["context_length"]
    facts = [
        ("format", model["format"]),
        ("architecture", model["architecture"] or "not said"),
        ("quantisation", model["quantisation"] or "none"),
        ("context", "not said" if context is None else f"{context} tokens"),
        ("parameters", format_count(model["parameter_count"])),
        ("tensors", f"{model['tensor_count']} ({format_size(model['tensor_bytes'])})"),
    ]
    if unread:
        facts.append(("note", f"{unread} of {len(model['files'])} files are not counted: no header"))
    return aligned([(name, printable(value)) for name, value in facts])


def printable(text: str) -> str:
    """The text as a terminal may get it."""
    return "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in text)


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


def _warning_lines(document: Document) -> list[str]:
    from weightfs.units import counted

    counts = (
        (document["mismatched_chunks"], "refused, since not what the list says, and asked for again"),
        (document["disk_faults"], "that the disk did not keep"),
    )
    lines = [f"warning: {counted(count, 'chunk')} {text}" for count, text in counts if count]
    if document["disk"] != "healthy":
        lines.append(f"disk: {document['disk']}")
    if document["paused"]:
        lines.append("paused: nothing is fetched that nobody waits for; `weightfs resume --all` ends that")
    if document["trouble"]:
        lines.append(f"trouble: {document['trouble']}")
    return lines


def status_lines(document: Document) -> list[str]:
    """The status for people."""
    from weightfs.units import counted, format_duration, format_size

    if document["role"] == "mount":
        head = f"serving {document['mountpoint']} (pid {document['pid']}, for {format_duration(document['uptime'])})"
    elif document["role"] == "status":
        head = "idle: no daemon has this cache"
    else:
        head = f"weightfs {document['role']} is at work (pid {document['pid']})"
    held = f"{format_size(document['cache_bytes'])} in {counted(len(document['refs']), 'ref')}"
    lines = [head, f"cache {document['cache']}: {held}, {format_size(document['free_bytes'])} free"]
    lines += _limit_lines(document)
    if document["fetched_bytes"]:
        lines.append(f"fetched {format_size(document['fetched_bytes'])} since the start")
    lines += _warning_lines(document)
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


def _limit_lines(document: Document) -> list[str]:
    """What the cache may hold, and what went for it."""
    from weightfs.units import format_size

    lines = []
    if document["limit_bytes"] is not None:
        held, limit = format_size(document["held_bytes"]), format_size(document["limit_bytes"])
        lines.append(f"holds {held} of at most {limit}")
    if document["evicted_bytes"]:
        lines.append(f"evicted {format_size(document['evicted_bytes'])} since the start")
    return lines


def _file_lines(file: Document) -> list[str]:
    """What is worth telling about one file: readers that wait, errors, mirrors with faults."""
    from weightfs.units import format_size

    lines = []
    if file["waiting_readers"]:
        lines.append(f"{file['path']}: {file['waiting_readers']} readers wait")
    if file["error"]:
        lines.append(f"{file['path']}: {file['error']}")
    if any(file["wrong"].values()):
        lines.append(f"{file['path']}: wrong chunks: {_by_cause(file['wrong'])}")
    for mirror in file["mirrors"]:
        if mirror["faults"] or mirror["mismatches"]:
            rate = f", {format_size(mirror['rate'])}/s" if mirror["rate"] else ""
            lines.append(
                f"{mirror['url']}: {mirror['faults']} faults, {mirror['mismatches']} wrong chunks{rate}"
            )
        if any(mirror["wrong"].values()):
            lines.append(f"{mirror['url']}: wrong chunks: {_by_cause(mirror['wrong'])}")
    return lines


def _by_cause(wrong: Document) -> str:
    """Whose fault they were."""
    return ", ".join(f"{count} by the {cause}" for cause, count in wrong.items() if count)


def _name(ref: Document) -> str:
    marks = ", ".join(mark for mark in ("pinned", "paused") if ref.get(mark))
    return f"{ref['ref']} ({marks})" if marks else str(ref["ref"])


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
