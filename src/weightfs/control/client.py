"""A daemon's operations from another process: the same documents, the same errors.

Rule: nothing waits without a bound. A daemon that is gone or silent is a DaemonError with the way out.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote, urlencode

import httpx

from weightfs.control.address import socket_path, usable_address
from weightfs.control.documents import error_from_json
from weightfs.control.ports import Document
from weightfs.errors import DaemonError

CONNECT_TIMEOUT: Final = 2.0
ANSWER_TIMEOUT: Final = 15.0  # for what a daemon answers from memory
ADD_TIMEOUT: Final = 310.0  # the daemon's own bound on resolving a ref, and some
REMOVE_TIMEOUT: Final = 120.0  # removing large sparse files takes the disk a while
HEADERS_TIMEOUT: Final = 310.0  # the daemon's own bound on fetching headers, and some
LOCAL_HEADERS_TIMEOUT: Final = 60.0  # two hundred headers are read from the disk and parsed
MAX_ANSWER: Final = 64 * 1024 * 1024

_FLAGS: Final = {True: "true", False: "false"}


class ControlClient:
    """See `ports.Operations`. Made by `find_daemon`."""

    def __init__(self, http: httpx.AsyncClient, cache: Path, process: Document) -> None:
        self._http = http
        self._cache = cache
        self.process = process

    async def status(self) -> Document:
        """Everything."""
        return await _ask(self._http, self._cache, "GET", "/v1/status")

    async def health(self) -> Document:
        """Who answers."""
        return await _ask(self._http, self._cache, "GET", "/v1/health")

    async def inflight(self) -> Document:
        """What waits, and for what."""
        return await _ask(self._http, self._cache, "GET", "/v1/inflight")

    async def stacks(self) -> Document:
        """Where everything is."""
        return await _ask(self._http, self._cache, "GET", "/v1/stacks")

    async def refs(self) -> list[Document]:
        """The refs."""
        answer = await _ask(self._http, self._cache, "GET", "/v1/refs")
        refs: list[Document] = answer["refs"]
        return refs

    async def add(self, ref: str, *, refresh: bool = False) -> Document:
        """Resolve and pin."""
        body = {"ref": ref, "refresh": refresh}
        return await _ask(self._http, self._cache, "POST", "/v1/refs", body, timeout=ADD_TIMEOUT)

    async def update(self, ref: str) -> Document:
        """Follow a tag."""
        return await _ask(self._http, self._cache, "POST", "/v1/update", {"ref": ref}, timeout=ADD_TIMEOUT)

    async def pin(self, ref: str, *, pinned: bool) -> Document:
        """Keep whole, or no longer."""
        return await _ask(self._http, self._cache, "POST", "/v1/pin", {"ref": ref, "pinned": pinned})

    async def set_fill(self, ref: str, mode: str) -> Document:
        """Complete in the background."""
        return await _ask(self._http, self._cache, "POST", "/v1/mode", {"ref": ref, "mode": mode})

    async def pause(self, ref: str | None, *, paused: bool) -> Document:
        """Hold background fetching back."""
        body = {"paused": paused} if ref is None else {"ref": ref, "paused": paused}
        return await _ask(self._http, self._cache, "POST", "/v1/pause", body)

    async def remove(self, ref: str) -> Document:
        """Forget."""
        return await _ask(self._http, self._cache, "DELETE", "/v1/refs", {"ref": ref}, timeout=REMOVE_TIMEOUT)

    async def gc(self, *, dry_run: bool) -> Document:
        """Evict."""
        return await _ask(
            self._http, self._cache, "POST", "/v1/gc", {"dry_run": dry_run}, timeout=REMOVE_TIMEOUT
        )

    async def reload(self) -> Document:
        """Read the configuration again."""
        return await _ask(self._http, self._cache, "POST", "/v1/reload", {})

    async def start_fill(self, ref: str) -> Document:
        """Begin to complete."""
        return await _ask(self._http, self._cache, "POST", "/v1/fill", {"ref": ref})

    async def start_verify(self, refs: Sequence[str], *, repair: bool) -> Document:
        """Begin to re-hash."""
        return await _ask(
            self._http, self._cache, "POST", "/v1/verify", {"refs": list(refs), "repair": repair}
        )

    async def start_repair(self, refs: Sequence[str]) -> Document:
        """Begin to repair."""
        return await _ask(self._http, self._cache, "POST", "/v1/repair", {"refs": list(refs)})

    async def headers(self, ref: str, *, wait: float) -> Document:
        """Wait for them."""
        query = urlencode({"ref": ref, "wait": f"{wait:g}"})
        return await _ask(
            self._http, self._cache, "GET", f"/v1/headers?{query}", timeout=wait + ANSWER_TIMEOUT
        )

    async def details(self, ref: str, *, fetch: bool = False) -> Document:
        """Look into headers."""
        query = urlencode({"ref": ref, "fetch": _FLAGS[fetch]})
        limit = HEADERS_TIMEOUT if fetch else LOCAL_HEADERS_TIMEOUT
        return await _ask(self._http, self._cache, "GET", f"/v1/details?{query}", timeout=limit)

    async def tensor_map(self, ref: str, *, layers: bool = False, fetch: bool = False) -> Document:
        """Look into headers and chunk sets."""
        query = urlencode({"ref": ref, "by": "layer" if layers else "tensor", "fetch": _FLAGS[fetch]})
        limit = HEADERS_TIMEOUT if fetch else LOCAL_HEADERS_TIMEOUT
        return await _ask(self._http, self._cache, "GET", f"/v1/map?{query}", timeout=limit)

    async def chunk_map(self, ref: str) -> Document:
        """Look at chunk sets."""
        path = f"/v1/chunks?{urlencode({'ref': ref})}"
        return await _ask(self._http, self._cache, "GET", path, timeout=LOCAL_HEADERS_TIMEOUT)

    async def job(self, job_id: str, *, wait: float) -> Document:
        """Poll."""
        path = f"/v1/jobs/{quote(job_id, safe='')}?wait={wait:g}"
        return await _ask(self._http, self._cache, "GET", path, timeout=wait + ANSWER_TIMEOUT)

    async def cancel_job(self, job_id: str) -> Document:
        """Stop."""
        return await _ask(self._http, self._cache, "DELETE", f"/v1/jobs/{quote(job_id, safe='')}")


@contextlib.asynccontextmanager
async def find_daemon(cache: Path) -> AsyncIterator[ControlClient | None]:
    """The daemon that owns `cache`, None if nobody listens there, DaemonError if it does not answer."""
    path = socket_path(cache)
    with contextlib.ExitStack() as stack:
        try:
            address = stack.enter_context(usable_address(path))
            there = path.is_socket()
        except OSError:
            there = False
        if not there:
            yield None
            return
        transport = httpx.AsyncHTTPTransport(uds=address, retries=0)
        limits = httpx.Timeout(ANSWER_TIMEOUT, connect=CONNECT_TIMEOUT)
        async with httpx.AsyncClient(
            transport=transport,
            base_url="http://weightfs",
            timeout=limits,
            trust_env=False,
            # A kept connection could be closed by the daemon at the moment when the next request is sent.
            headers={"Connection": "close"},
        ) as http:
            try:
                process = await _ask(http, cache, "GET", "/v1/health")
            except DaemonGoneError:
                yield None
            else:
                yield ControlClient(http, cache, process)


class DaemonGoneError(DaemonError):
    """Nobody listens any more, or the daemon ended amid an answer: the cache is free, or will be in a moment."""


async def _ask(
    http: httpx.AsyncClient,
    cache: Path,
    method: str,
    path: str,
    body: Document | None = None,
    *,
    timeout: float = ANSWER_TIMEOUT,  # noqa: ASYNC109  # handed to httpx, whose bounds are per step
) -> Document:
    """One request. The daemon's own error, or DaemonError."""
    content = None if body is None else json.dumps(body).encode()
    limits = httpx.Timeout(timeout, connect=CONNECT_TIMEOUT)
    try:
        async with http.stream(method, path, content=content, timeout=limits) as response:
            answer = _parse(await _read(response, cache))
            if response.is_success and isinstance(answer, dict):
                return answer
            raise error_from_json(answer)
    except httpx.ConnectError:
        raise DaemonGoneError(
            f"the daemon on {cache} is gone; run the command again, and it works on the cache by itself"
        ) from None
    except httpx.TimeoutException:
        raise DaemonError(
            f"the daemon on {cache} does not answer; look into its log, or end it and run the command again"
        ) from None
    except httpx.HTTPError as error:
        raise DaemonGoneError(
            f"the daemon on {cache} ended before it answered ({type(error).__name__}); run the command again"
        ) from None


async def _read(response: httpx.Response, cache: Path) -> bytes:
    data = bytearray()
    async for piece in response.aiter_bytes():
        if len(data) <= MAX_ANSWER:
            data += piece
    if len(data) > MAX_ANSWER:
        raise DaemonError(f"the daemon on {cache} sent an answer over {MAX_ANSWER} bytes")
    return bytes(data)


def _parse(data: bytes) -> Any:
    try:
        return json.loads(data)
    except ValueError:
        return None
