"""Headers first: what is read of a model before its weights is fetched as soon as a ref is pinned.

That is every small file (configuration, templates, tokenizer parameters) as a whole, and of each GGUF and safetensors
file the header: so that `weightfs ls -l`, and a runtime that lists its models, answer at once and offline.

Rules: pinning neither waits for it nor fails with it. It reads as a reader does (`Reader.read_unseen`): what landed,
trust and policy are the same, what is present is not fetched again, and no more than a few reads are in flight at a
time.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

import trio

from weightfs.core.geometry import KIB, MIB, ByteSpan
from weightfs.core.gguf import read_gguf
from weightfs.core.manifest import Manifest
from weightfs.core.safetensors import read_safetensors
from weightfs.core.tensors import Header, HeaderError, NeedMore, is_model_file
from weightfs.engine.blobs import BlobState
from weightfs.engine.catalog import Catalog
from weightfs.engine.reader import Reader
from weightfs.engine.turns import AT_A_TIME
from weightfs.errors import CacheError, FailureKind, ReadError

SMALL_BYTES: Final = (
    MIB  # a file up to this is fetched whole: no more than the one chunk that any byte of it costs
)
SMALL_TOTAL: Final = 64 * MIB  # of all small files of a ref: a data set has many thousands
MAX_FILES: Final = 1024  # of a ref, small ones and headers: the largest models have some 200 shards
AT_ONCE: Final = 4  # of the 32 requests that are in flight at most: readers find a free one
FILE_SECONDS: Final = 60.0  # for one file; then a reader who needs it may wait for it
MAX_FAILURES: Final = 4  # files of a ref that failed: the rest would take a minute each to fail as well
FIRST_BYTES: Final = 64 * KIB

log = logging.getLogger(__name__)


class NotCachedError(Exception):
    """The header of a file is not in the cache, or not all of it."""


@dataclass(frozen=True, slots=True)
class Part:
    """A file of a ref. `span` is where it lies in its blob: all of it, or a member of a tar."""

    path: str  # inside the manifest
    state: BlobState
    span: ByteSpan

    @property
    def size(self) -> int:
        """Of the file."""
        return len(self.span)

    @property
    def readable(self) -> bool:
        """Whether the policy lets anybody read it as it is: else a read waits until the whole blob is verified."""
        return self.state.policy.allows(self.state.trust)

    def present(self, span: ByteSpan) -> bool:
        """Whether these bytes of the file are in the cache."""
        return self.state.present.covers(self.state.shape.chunks_covering(self.in_blob(span)))

    def in_blob(self, span: ByteSpan) -> ByteSpan:
        """Bytes of the file as bytes of the blob."""
        return ByteSpan(self.span.start + span.start, self.span.start + span.stop).clamp(self.span.stop)

    def head(self) -> int:
        """How many bytes from its beginning on are in the cache, without a hole."""
        shape = self.state.shape
        hole = self.state.present.first_hole(self.span.start // shape.chunk_length)
        stop = self.span.stop if hole is None else min(hole * shape.chunk_length, self.span.stop)
        return max(0, stop - self.span.start)

    def rounded(self, stop: int) -> int:
        """The end of the chunk that has the byte before `stop`: those bytes come with it."""
        length = self.state.shape.chunk_length
        in_blob = -(-(self.span.start + stop) // length) * length
        return min(in_blob, self.span.stop) - self.span.start


@dataclass(slots=True)
class _Run:
    """The fetching of one ref's headers."""

    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    done: trio.Event = field(default_factory=trio.Event)
    failures: int = 0


class Headers:
    """One per engine. Runs in the engine's nursery."""

    def __init__(self, catalog: Catalog, reader: Reader, nursery: trio.Nursery) -> None:
        self._catalog = catalog
        self._reader = reader
        self._nursery = nursery
        self._running: dict[str, _Run] = {}

    def start(self, manifest: Manifest) -> None:
        """Begin to fetch what is missing of a pinned ref. Never waits, never fails."""
        before = self._running.get(manifest.ref)
        if before is not None:
            before.scope.cancel()
        run = self._running[manifest.ref] = _Run()
        self._nursery.start_soon(self._run, manifest, run)

    async def ready(self, ref: str) -> None:
        """Return when nothing of a ref is being fetched here; at once if nothing was begun."""
        while run := self._running.get(ref):
            await run.done.wait()

    @property
    def busy(self) -> bool:
        """Whether anything is being fetched here."""
        return bool(self._running)

    def parts(self, manifest: Manifest) -> Iterator[Part]:
        """Its files, as they are when they come up, without those whose blob is being removed."""
        for entry in manifest.entries:
            state = self._catalog.get(entry.blob.id)
            if state is not None:
                whole = ByteSpan(0, entry.blob.size)
                yield Part(entry.path, state, whole if entry.span is None else entry.span)

    async def read(self, part: Part, span: ByteSpan, *, fetch: bool) -> bytes:
        """Bytes of a file. NotCachedError unless they are there or may be fetched; ReadError."""
        if not len(span):
            return b""
        if not fetch and not part.present(span):
            raise NotCachedError
        return await self._reader.read_unseen(part.state, part.in_blob(span))

    async def read_header(self, part: Part, *, fetch: bool) -> Header:
        """The header of a model file. HeaderError, NotCachedError, ReadError."""
        parse = read_gguf if part.path.lower().endswith(".gguf") else read_safetensors
        data = b""
        need = stop = min(FIRST_BYTES, part.size)
        while True:
            stop = part.rounded(stop) if fetch else max(need, min(stop, part.head()))
            data += await self.read(part, ByteSpan(len(data), stop), fetch=fetch)
            answer = await trio.to_thread.run_sync(parse, data, part.size)
            if not isinstance(answer, NeedMore):
                return answer
            # A vocabulary does not say how long it is. A quarter more each time is few steps, and little past its end.
            need = answer.nbytes
            stop = min(max(need, len(data) * 5 // 4, len(data) + MIB), part.size)

    async def _run(self, manifest: Manifest, run: _Run) -> None:
        try:
            with run.scope:
                work = self._wanted(manifest)
                async with trio.open_nursery() as nursery:
                    for _ in range(AT_ONCE):
                        nursery.start_soon(self._work, manifest.ref, work, run)
        except Exception:  # whatever a header does, the readers are served
            log.exception("the headers of %s were not fetched, by a fault of weightfs itself", manifest.ref)
        finally:
            if self._running.get(manifest.ref) is run:
                del self._running[manifest.ref]
            run.done.set()

    def _wanted(self, manifest: Manifest) -> Iterator[Part | None]:
        """The small files, as far as the bound goes, then those with headers. None: others may come between."""
        total = count = 0
        headed = []
        for number, part in enumerate(self.parts(manifest), 1):
            if not number % AT_A_TIME:
                yield None
            if count >= MAX_FILES:
                log.info(
                    "%s has more files than headers are fetched of at once (%d)", manifest.ref, MAX_FILES
                )
                break
            if part.size <= SMALL_BYTES:
                total += part.size
                # A small member of a tar is not worth the whole tar, which a strict policy would fetch for it.
                wanted = total <= SMALL_TOTAL and (part.readable or part.state.shape.size <= SMALL_BYTES)
                if wanted and part.size and not part.present(ByteSpan(0, part.size)):
                    count += 1
                    yield part
            elif is_model_file(part.path) and part.readable:
                count += 1
                headed.append(part)
        yield from headed

    async def _work(self, ref: str, work: Iterator[Part | None], run: _Run) -> None:
        for part in work:
            if part is None:
                await trio.lowlevel.checkpoint()
                continue
            try:
                with trio.fail_after(FILE_SECONDS):
                    await self._fetch(part)
            except HeaderError as error:
                log.info("%s of %s has no header that can be read: %s", part.path, ref, error)
            except ReadError as error:
                if error.kind is FailureKind.CANCELLED:  # the ref was removed, or everything ends
                    return
                told = not error.mirror or error.mirror in str(error)
                self._failed(ref, part, run, str(error) if told else f"{error} (from {error.mirror})")
            except CacheError as error:
                self._failed(ref, part, run, str(error))
            except trio.TooSlowError:
                self._failed(ref, part, run, f"nothing came within {FILE_SECONDS:.0f} s")

    async def _fetch(self, part: Part) -> None:
        if part.size <= SMALL_BYTES:
            await self.read(part, ByteSpan(0, part.size), fetch=True)
        else:
            await self.read_header(part, fetch=True)

    def _failed(self, ref: str, part: Part, run: _Run, why: str) -> None:
        """Told once: whoever reads the file hears the rest. It is no warning, since nothing is lost but time."""
        if not run.failures:
            log.info(
                "the header of %s of %s is not there yet: %s; it is fetched when it is read",
                part.path,
                ref,
                why,
            )
        run.failures += 1
        if run.failures >= MAX_FAILURES:
            run.scope.cancel()
