"""`weightfs pull`: fetch whole refs, verify them, and go on where the last time ended."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Final

import click

from weightfs.cli.group import Stopped, examples, say
from weightfs.cli.options import (
    cache_options,
    fetch_options,
    json_option,
    limit_options,
    load_config,
    parse_refs,
    refuse_for_daemon,
)
from weightfs.errors import IntegrityError

if TYPE_CHECKING:
    from weightfs.config import Config
    from weightfs.control.ports import Document, Operations
    from weightfs.core.ref import Ref
    from weightfs.engine.settings import EngineSettings

POLL: Final = 0.25  # seconds between two looks at the progress
# The owner of the cache may be another `pull` that ends before ours has: then we go on by ourselves.
OWNERS: Final = 5


@click.command(
    short_help="Fetch and verify whole models.",
    epilog=examples(
        "weightfs pull https://models.example.com/tiny.gguf",
        "weightfs pull hf://Qwen/Qwen3-8B-GGUF/*Q4_K_M*",
        "weightfs pull --retry 20 --timeout 10s https://models.example.com/tiny.gguf#sha256=<64 hex digits>",
        "weightfs pull --json https://a.example.com/one.gguf https://b.example.com/two.gguf",
    ),
)
@click.argument("refs", metavar="REF...", nargs=-1, required=True)
@click.option("--refresh", is_flag=True, help="Ask the origin again what a known REF is now.")
@click.option(
    "--allow-unverifiable",
    is_flag=True,
    help="End with 0 also where no origin publishes a digest to verify with.",
)
@click.option("-q", "--quiet", is_flag=True, help="No progress.")
@json_option
@limit_options
@fetch_options
@cache_options
@click.pass_context
def pull(
    ctx: click.Context,
    /,
    refs: tuple[str, ...],
    refresh: bool,
    allow_unverifiable: bool,
    quiet: bool,
    as_json: bool,
    **_: object,
) -> int:
    """Fetch every byte of the REFs into the cache and verify them. Ends with 0 only when all are complete and right.

    What has landed stays, whatever happens: the same command goes on from there. A running mount on the same cache
    does the work itself, and its readers go first.
    """
    config = load_config(ctx)
    parsed = parse_refs(refs)
    import trio

    from weightfs.app.settings import check_chunks, engine_settings, fetch_settings, with_header_origins
    from weightfs.cli.progress import make_progress
    from weightfs.engine.settings import FillMode

    chunks = ctx.params["chunks"]
    check_chunks(chunks, len(parsed))
    fetch = fetch_settings(config, chunks=chunks)
    settings = engine_settings(config, fetch, mounted=False, fill=FillMode.NEVER)
    settings = with_header_origins(settings, map(str, parsed))
    with make_progress(quiet=quiet or as_json) as progress:
        work = Pull(ctx, config, settings, parsed, refresh, progress)
        signum = trio.run(work.run)
    if signum is not None:
        raise Stopped(signum, work.kept())
    unproven = [] if allow_unverifiable else work.unproven()
    work.tell(unproven, as_json=as_json)
    return IntegrityError.exit_code if unproven else 0


class Pull:
    """One run of the command."""

    def __init__(
        self,
        ctx: click.Context,
        config: Config,
        settings: EngineSettings,
        refs: list[Ref],
        refresh: bool,
        progress: Any,
    ) -> None:
        self._ctx = ctx
        self._config = config
        self._settings = settings
        self._refs = refs
        self._refresh = refresh
        self._progress = progress
        self.present: dict[str, int] = {}
        self.done: dict[str, Document] = {}

    async def run(self) -> int | None:
        """The signal that ended it, or None when all is complete."""
        from weightfs.app.interrupts import run_until_signal

        return await run_until_signal(self._run)

    async def _run(self) -> None:
        from weightfs.app.local import find_operations
        from weightfs.control.client import DaemonGoneError

        for owner in range(OWNERS):
            try:
                async with find_operations(
                    self._config.cache, "pull", self._settings, create=True, serve_control=True
                ) as (operations, is_daemon):
                    if is_daemon:
                        refuse_for_daemon(self._ctx)
                    await self._work(operations)
                    return
            except* DaemonGoneError as gone:
                if owner == OWNERS - 1:
                    raise gone.exceptions[0] from None

    async def _work(self, operations: Operations) -> None:
        from weightfs.logs import redact_url

        jobs: dict[str, Document] = {}
        for ref in self._refs:
            document = await operations.add(str(ref), refresh=self._refresh)
            self._progress.begin(document["ref"], redact_url(document["ref"]), document["size_bytes"])
            self._note(document["ref"], document)
            jobs[document["ref"]] = await operations.start_fill(document["ref"])
        try:
            for name, job in jobs.items():
                await self._follow(operations, name, job, jobs)
        finally:
            await self._cancel(operations, jobs)

    async def _follow(
        self, operations: Operations, name: str, job: Document, jobs: dict[str, Document]
    ) -> None:
        from weightfs.control.documents import error_from_json

        while job["state"] == "running":
            job = jobs[name] = await operations.job(job["job"], wait=POLL)
            self._note(name, job["progress"])
            for other in jobs:
                if other != name and jobs[other]["state"] == "running":
                    jobs[other] = await operations.job(jobs[other]["job"], wait=0)
                    self._note(other, jobs[other]["progress"])
        if job["state"] == "failed":
            raise error_from_json(job["error"])
        if job["state"] == "cancelled":
            raise IntegrityError(f"{name}: somebody cancelled the work; run the command again")
        self._check(name, job["result"])

    def _check(self, name: str, document: Document) -> None:
        self._note(name, document)
        if not document["complete"] or document["trust"] == "quarantined":
            raise IntegrityError(
                f"{name} is not complete and right after all; `weightfs verify --repair` may help"
            )
        self.done[name] = document

    async def _cancel(self, operations: Operations, jobs: dict[str, Document]) -> None:
        import trio

        from weightfs.errors import WeightfsError

        with trio.move_on_after(5, shield=True):
            for job in jobs.values():
                if job["state"] == "running":
                    try:
                        await operations.cancel_job(job["job"])
                    except WeightfsError:
                        return  # the owner has ended, and its jobs with it

    def _note(self, name: str, document: Document) -> None:
        self.present[name] = document["present_bytes"]
        self._progress.update(name, document["present_bytes"], document["size_bytes"])

    def kept(self) -> str:
        """What to say after an interrupt."""
        from weightfs.units import format_size

        present = format_size(sum(self.present.values()))
        return f"stopped; {present} are kept in {self._config.cache}, and the same command goes on from there"

    def tell(self, unproven: list[str], *, as_json: bool) -> None:
        """The result, on stdout; what had to be proven and could not, on stderr."""
        from weightfs.logs import redact_url
        from weightfs.units import format_size

        if as_json:
            click.echo(json.dumps({"refs": list(self.done.values())}, indent=2))
        for name, document in self.done.items():
            if not as_json:
                click.echo(f"{redact_url(name)}: {format_size(document['size_bytes'])}, {document['trust']}")
        for name in unproven:
            say(
                f"{redact_url(name)} is complete, but its origin gives no digest to verify it with; "
                "add #sha256=<hex> to the ref, or --chunks, or accept it with --allow-unverifiable"
            )

    def unproven(self) -> list[str]:
        """Refs that are complete and that nothing can prove."""
        return [name for name, document in self.done.items() if document["trust"] == "unverifiable"]
