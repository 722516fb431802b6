"""What is known about the models of a ref, and where their tensors lie in the cache: from cached headers.

Rules: tensor data is never fetched, and headers only with `fetch`. Parsing and counting happen in threads, over copies
of the chunk sets. A byte counts as cached if its chunk is there; as verified if its blob is verified or its chunk
equals a trusted chunk list (docs/semantics.md, "Trust"), and it was hashed since the last unclean stop.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Final

import trio

from weightfs.core.chunkset import ChunkSet
from weightfs.core.geometry import ByteSpan, ChunkSpan
from weightfs.core.manifest import BlobId, Manifest, Trust
from weightfs.core.tensors import (
    MAX_JSON_BYTES,
    Coverage,
    Header,
    HeaderError,
    ModelInfo,
    Tensor,
    by_layer,
    describe,
    dominant_dtype,
    is_model_file,
    models_of,
    read_shards,
)
from weightfs.engine.headers import Headers, NotCachedError, Part
from weightfs.engine.turns import AT_A_TIME
from weightfs.errors import CacheError, ReadError

READ_SECONDS: Final = 10.0  # for what is in the cache already
FETCH_SECONDS: Final = 60.0  # for one header that is not
# Of one ref: some 100 MB while they are looked at, and as JSON less than a control client reads. The largest models
# have 90,000.
MAX_TENSORS: Final = 250_000
MAX_RUNS: Final = 100_000  # of chunks, in a map of one ref: some 2 MB of JSON; the largest blob has 16,384
_PROVEN: Final = (Trust.VERIFIED, Trust.ATTESTED)


class HeaderState(enum.StrEnum):
    """Whether a file's header could be read."""

    NONE = "none"  # it is no model file
    READ = "read"
    MISSING = "missing"  # not in the cache
    WITHHELD = "withheld"  # the policy does not let anybody read it yet
    MALFORMED = "malformed"


@dataclass(frozen=True, slots=True)
class FileDetails:
    """One file of a ref. `problem` is a clause that says why its header could not be read, or empty."""

    path: str  # below the mount's root
    size_bytes: int
    cached_bytes: int
    verified_bytes: int
    trust: str
    header: HeaderState
    problem: str
    format: str
    tensor_count: int | None
    parameter_count: int | None


@dataclass(frozen=True, slots=True)
class ModelDetails:
    """One model: all files of it together. `unread` of them have a header that could not be read: the sums lack it."""

    name: str
    info: ModelInfo
    files: tuple[str, ...]
    unread: int


@dataclass(frozen=True, slots=True)
class RefDetails:
    """What `weightfs ls -l REF` shows."""

    ref: str
    revision: str
    models: tuple[ModelDetails, ...]
    files: tuple[FileDetails, ...]


@dataclass(frozen=True, slots=True)
class _Seen:
    """A file and what its header said; copies of its chunk sets, for a thread."""

    part: Part
    header: Header | None
    state: HeaderState
    problem: str
    cached: ChunkSet
    verified: ChunkSet


_Answer = tuple[Header | None, HeaderState, str]


class Details:
    """One per engine; holds nothing but its colleague."""

    def __init__(self, headers: Headers) -> None:
        self._headers = headers

    async def details(self, manifest: Manifest, *, fetch: bool) -> RefDetails:
        """Everything about a pinned ref but its tensors."""
        seen = await self._look(manifest, fetch=fetch)
        small = await self._small(manifest)
        return await trio.to_thread.run_sync(_details, manifest, seen, small)

    async def tensor_map(self, manifest: Manifest, *, layers: bool, fetch: bool) -> dict[str, Any]:
        """Its tensors, or with `layers` its layers, file by file: what `weightfs map --json` prints."""
        seen = [one for one in await self._look(manifest, fetch=fetch) if one.state is not HeaderState.NONE]
        return await trio.to_thread.run_sync(_map, manifest, seen, layers)

    async def chunk_map(
        self, manifest: Manifest, in_flight: Mapping[BlobId, Sequence[ChunkSpan]]
    ) -> dict[str, Any]:
        """Which chunks of its files are there: what `weightfs status REF --json` prints.

        `in_flight`: what is being fetched, by blob.
        """
        seen = await self._look(manifest, fetch=False)
        return await trio.to_thread.run_sync(_chunks, manifest, seen, in_flight)

    async def _look(self, manifest: Manifest, *, fetch: bool) -> list[_Seen]:
        seen = []
        count = 0
        for part in self._headers.parts(manifest):
            header, state, problem = await self._header(part, fetch=fetch, room=count < MAX_TENSORS)
            count += len(header.tensors) if header is not None else 0
            cached = part.state.present.copy()
            verified = cached.copy()
            if part.state.trust in _PROVEN:
                verified.difference(part.state.suspect)
            else:
                verified.clear()
            seen.append(_Seen(part, header, state, problem, cached, verified))
            await trio.lowlevel.checkpoint()  # a data set has many thousands of files
        return seen

    async def _header(self, part: Part, *, fetch: bool, room: bool) -> _Answer:
        if not is_model_file(part.path):
            return None, HeaderState.NONE, ""
        if not part.readable:
            why = f"it is {part.state.trust}, and the policy is {part.state.policy}"
            return None, HeaderState.WITHHELD, why
        if not room:
            return None, HeaderState.MISSING, f"the files before it have over {MAX_TENSORS} tensors"
        seconds = FETCH_SECONDS if fetch else READ_SECONDS
        with trio.move_on_after(seconds):
            return await self._read_header(part, fetch=fetch)
        return None, HeaderState.MISSING, f"the header did not come within {seconds:.0f} s"

    async def _read_header(self, part: Part, *, fetch: bool) -> _Answer:
        try:
            return await self._headers.read_header(part, fetch=fetch), HeaderState.READ, ""
        except HeaderError as error:
            return None, HeaderState.MALFORMED, str(error)
        except NotCachedError:
            return None, HeaderState.MISSING, "header not cached yet"
        except (ReadError, CacheError) as error:
            return None, HeaderState.MISSING, str(error)

    async def _small(self, manifest: Manifest) -> dict[str, bytes]:
        """What is cached of the small files that say something about models, by path."""
        found = {}
        for number, part in enumerate(self._headers.parts(manifest), 1):
            if not number % AT_A_TIME:
                await trio.lowlevel.checkpoint()
            name = part.path.rpartition("/")[2]
            if name != "config.json" and not name.endswith(".safetensors.index.json"):
                continue
            if part.size > MAX_JSON_BYTES or not part.readable:
                continue
            with trio.move_on_after(READ_SECONDS):
                try:
                    found[part.path] = await self._headers.read(part, ByteSpan(0, part.size), fetch=False)
                except (NotCachedError, ReadError, CacheError):
                    continue
        return found


def _details(manifest: Manifest, seen: Sequence[_Seen], small: dict[str, bytes]) -> RefDetails:
    by_path = {one.part.path: one for one in seen}
    shards = {path: read_shards(data) for path, data in small.items() if path.endswith(".index.json")}
    models = []
    for name, paths in models_of(by_path, shards).items():
        headers = [header for path in paths if (header := by_path[path].header) is not None]
        folder = name.rpartition("/")[0]
        config = small.get(f"{folder}/config.json" if folder else "config.json", b"")
        files = tuple(_path(manifest, path) for path in paths)
        models.append(ModelDetails(name, describe(headers, config), files, len(paths) - len(headers)))
    return RefDetails(
        manifest.ref, manifest.revision, tuple(models), tuple(_file_details(manifest, one) for one in seen)
    )


def _file_details(manifest: Manifest, one: _Seen) -> FileDetails:
    cached, verified = _coverages(one)
    header = one.header
    return FileDetails(
        path=_path(manifest, one.part.path),
        size_bytes=one.part.size,
        cached_bytes=cached.within(one.part.span),
        verified_bytes=verified.within(one.part.span),
        trust=one.part.state.trust.value,
        header=one.state,
        problem=one.problem,
        format=header.format if header is not None else "",
        tensor_count=len(header.tensors) if header is not None else None,
        parameter_count=sum(tensor.elements for tensor in header.tensors) if header is not None else None,
    )


def _map(manifest: Manifest, seen: Sequence[_Seen], layers: bool) -> dict[str, Any]:
    """Plain values: a hundred thousand of them are not to be turned into JSON's terms in the trio thread."""
    files = []
    for one in seen:
        cached, verified = _coverages(one)
        tensors = one.header.tensors if one.header is not None else ()
        base = one.part.span.start
        file = {
            "path": _path(manifest, one.part.path),
            "size_bytes": one.part.size,
            "cached_bytes": cached.within(one.part.span),
            "verified_bytes": verified.within(one.part.span),
            "header": one.state.value,
            "problem": one.problem,
            "header_bytes": one.header.nbytes if one.header is not None else None,
        }
        if layers:
            file["layers"] = [
                _layer(name, them, base, cached, verified) for name, them in by_layer(tensors).items()
            ]
        else:
            file["tensors"] = [_tensor(tensor, base, cached, verified) for tensor in tensors]
        files.append(file)
    return {"ref": manifest.ref, "by": "layer" if layers else "tensor", "files": files}


def _chunks(
    manifest: Manifest, seen: Sequence[_Seen], in_flight: Mapping[BlobId, Sequence[ChunkSpan]]
) -> dict[str, Any]:
    """Runs are half-open pairs of the blob's chunk numbers. A file for which there was no room has None for them."""
    files = []
    room = MAX_RUNS
    for one in seen:
        state = one.part.state
        window = state.shape.chunks_covering(one.part.span) if one.part.size else ChunkSpan(0, 0)
        bad = state.trust is Trust.QUARANTINED
        cached = [[run.start, run.stop] for run in islice(one.cached.runs(window), room + 1)]
        flying = [
            [max(run.start, window.start), min(run.stop, window.stop)]
            for run in sorted(in_flight.get(state.id, ()), key=lambda run: run.start)
            if max(run.start, window.start) < min(run.stop, window.stop)
        ]
        room = max(-1, room - len(cached) - len(flying))
        runs = {"present": [] if bad else cached, "quarantined": cached if bad else [], "in_flight": flying}
        files.append(
            {
                "path": _path(manifest, one.part.path),
                "blob": str(state.id),
                "size_bytes": one.part.size,
                "cached_bytes": Coverage(one.cached, state.shape).within(one.part.span),
                "trust": state.trust.value,
                "header_bytes": one.header.nbytes if one.header is not None else None,
                "chunk_length": state.shape.chunk_length,
                "first_chunk": window.start,
                "chunk_count": len(window),
                "runs": runs if room >= 0 else None,
            }
        )
    return {"ref": manifest.ref, "files": files}


def _tensor(tensor: Tensor, base: int, cached: Coverage, verified: Coverage) -> dict[str, Any]:
    span = ByteSpan(base + tensor.span.start, base + tensor.span.stop)
    return {
        "name": tensor.name,
        "dtype": tensor.dtype,
        "shape": list(tensor.shape),
        "offset": tensor.span.start,
        "size_bytes": len(span),
        "cached_bytes": cached.within(span),
        "verified_bytes": verified.within(span),
    }


def _layer(
    name: str, tensors: Sequence[Tensor], base: int, cached: Coverage, verified: Coverage
) -> dict[str, Any]:
    rows = [_tensor(tensor, base, cached, verified) for tensor in tensors]
    return {
        "name": name,
        "dtype": dominant_dtype(tensors),
        "tensor_count": len(rows),
        "offset": rows[0]["offset"],
        **{key: sum(row[key] for row in rows) for key in ("size_bytes", "cached_bytes", "verified_bytes")},
    }


def _coverages(one: _Seen) -> tuple[Coverage, Coverage]:
    shape = one.part.state.shape
    return Coverage(one.cached, shape), Coverage(one.verified, shape)


def _path(manifest: Manifest, path: str) -> str:
    return f"models/{manifest.tree}/{path}"
