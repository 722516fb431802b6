"""What the engine and its fetch workers say to each other: one JSON object a line, each a dataclass here.

Rule: a line is at most `MAX_LINE` bytes; both ends are the same version of weightfs, so an unknown message is a bug.
Settings with secrets (headers) travel only here, never in argv or in the environment.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import trio

from weightfs.core.manifest import Policy
from weightfs.sources.base import FetchSettings

UNKNOWN = "-"  # 64 of these stand for a digest that nobody knows
# A whole stream's job names every chunk of the longest chunk list (core.metalink: 131,072) by 64 hex digits and number.
MAX_LINE = 16 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Hello:
    """First to the worker: how to fetch, how much to buffer, and how often to say that it lives (seconds)."""

    fetch: dict[str, Any] = field(repr=False)  # with secrets
    buffer_bytes: int
    beat_seconds: float = 5.0


@dataclass(frozen=True, slots=True)
class Settings:
    """How to fetch from here on, as in `Hello`; what is in flight goes on as it began."""

    fetch: dict[str, Any] = field(repr=False)  # with secrets


@dataclass(frozen=True, slots=True)
class FetchJob:
    """Fetch chunks `[start, stop)` into the sparse file at `path`. `digests`: 64 characters per chunk.

    `whole`: no ranges; of the stream write only the chunks in `wanted`. `file`: device and inode that `path` must have;
    another file, or one that is shorter than `size`, is not written to. `memory`: write to the memory file that every
    worker has inherited instead, where the blob's byte 0 has this offset. `paced`: it says `Received`.
    """

    job: int
    path: str
    size: int
    chunk_length: int
    start: int
    stop: int
    url: str
    validator: str
    digests: str = ""
    whole: bool = False
    wanted: list[int] = field(default_factory=list)
    file: list[int] = field(default_factory=list)
    memory: int | None = None
    paced: bool = False


@dataclass(frozen=True, slots=True)
class TrimJob:
    """Do not begin chunks from `at` on."""

    job: int
    at: int


@dataclass(frozen=True, slots=True)
class GoOn:
    """The answer to `Received`."""

    job: int


@dataclass(frozen=True, slots=True)
class StopJob:
    """End the job now."""

    job: int


@dataclass(frozen=True, slots=True)
class HashJob:
    """Read chunks `[start, stop)` of the file and compare each with `digests` (hex; empty: compare nothing).

    With `running`, also feed them to the running SHA-256 with state `state` (hex; empty: a new one), and stop at the
    first that differs or cannot be read. With `git`, that is git's SHA-1 instead, which has no state: over everything.
    """

    job: int
    path: str
    size: int
    chunk_length: int
    start: int
    stop: int
    digests: str
    running: bool = False
    state: str = ""
    git: bool = False


@dataclass(frozen=True, slots=True)
class ChunkLanded:
    """Verified against the list where there is one, and written."""

    job: int
    chunk: int
    digest: str


@dataclass(frozen=True, slots=True)
class ChunkMismatched:
    """Not written: `actual` (hex) is not the listed digest."""

    job: int
    chunk: int
    actual: str


@dataclass(frozen=True, slots=True)
class JobTrimmed:
    """Chunks from `stop` on are no longer this job's."""

    job: int
    stop: int


@dataclass(frozen=True, slots=True)
class Received:
    """So many bytes came since the last one; the job takes no more before `GoOn`."""

    job: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class JobDone:
    """The job ended well."""

    job: int


@dataclass(frozen=True, slots=True)
class JobFailed:
    """The job ended badly. `kind` is a FailureKind; the rest as in `core.plan.Failure`."""

    job: int
    kind: str
    text: str
    mirror: str = ""
    retry_after: float | None = None
    chunk: int = -1


@dataclass(frozen=True, slots=True)
class Hashed:
    """Answer to HashJob.

    `stop`: the chunks before it were read; `bad`: chunks that differ from their record (or that could not be read);
    `state`: the running state after `stop` (hex), `total`: the digest of the whole (hex) if `stop` is the end.
    """

    job: int
    stop: int
    bad: list[int]
    state: str = ""
    total: str = ""


@dataclass(frozen=True, slots=True)
class Alive:
    """Sent every few seconds: a worker that is silent for long is stopped or stuck, and is replaced."""


ToWorker = Hello | Settings | FetchJob | TrimJob | GoOn | StopJob | HashJob
FromWorker = ChunkLanded | ChunkMismatched | JobTrimmed | Received | JobDone | JobFailed | Hashed | Alive
Message = ToWorker | FromWorker


class BadMessageError(ValueError):
    """The other end said what no version of ourselves says: it is out of its mind, and is replaced."""


_TYPES: dict[str, type[Any]] = {
    cls.__name__: cls
    for cls in (
        Hello,
        Settings,
        FetchJob,
        TrimJob,
        GoOn,
        StopJob,
        HashJob,
        ChunkLanded,
        ChunkMismatched,
        JobTrimmed,
        Received,
        JobDone,
        JobFailed,
        Hashed,
        Alive,
    )
}


def encode(message: Message) -> bytes:
    """One line."""
    fields = {f.name: getattr(message, f.name) for f in dataclasses.fields(message)}
    return json.dumps([type(message).__name__, fields], separators=(",", ":")).encode() + b"\n"


def decode(line: bytes) -> Message:
    """The inverse of `encode`. BadMessageError if it is not one of ours."""
    try:
        name, fields = json.loads(line)
        message: Message = _TYPES[name](**fields)
    except (ValueError, TypeError, KeyError, RecursionError):
        # It is not quoted, and what was made of it is not shown: there may be secrets in it.
        raise BadMessageError(f"not a worker message ({len(line)} bytes)") from None
    return message


def fetch_settings_to_wire(settings: FetchSettings) -> dict[str, Any]:
    """For `Hello`."""
    return dataclasses.asdict(settings)


def fetch_settings_from_wire(fields: dict[str, Any]) -> FetchSettings:
    """The inverse."""
    tuples = {
        "headers": tuple((key, value) for key, value in fields["headers"]),
        "private_hosts": tuple(fields["private_hosts"]),
        "trusted_keys": tuple(fields["trusted_keys"]),
        "header_origins": tuple(fields["header_origins"]),
        "endpoints": tuple((host, url) for host, url in fields["endpoints"]),
        "policy": Policy(fields["policy"]),
    }
    return FetchSettings(**{**fields, **tuples})


async def read_messages(stream: trio.abc.ReceiveStream) -> AsyncIterator[Message]:
    """Messages until the other end closes. BadMessageError on a line that is too long or not ours."""
    line = (
        bytearray()
    )  # the one that is still incomplete; what comes is searched once, however long the line gets
    async for data in stream:
        *ends, tail = data.split(b"\n")
        for end in ends:
            line += end
            if len(line) > MAX_LINE:
                break
            yield decode(bytes(line))
            line.clear()
        else:
            line += tail
        if len(line) > MAX_LINE:
            raise BadMessageError(f"a worker message exceeds {MAX_LINE} bytes")
