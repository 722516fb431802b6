"""What a source is: it resolves refs of its schemes to manifests, and streams exact byte spans of a blob.

Rule of this package: a source never yields a byte that is not exactly the byte asked for, at the offset asked for,
as far as the protocol can tell; everything else is a `SourceError` with a `FailureKind`. It keeps no state about
chunks, and it never retries inside `open_range` (the planner does); `resolve` retries by `core.retry`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import Protocol

from weightfs.core.geometry import BlobShape, ByteSpan
from weightfs.core.manifest import Manifest, Mirror, Policy
from weightfs.core.ref import Ref


@dataclass(frozen=True, slots=True)
class FetchSettings:
    """How to reach origins; the same in the daemon and in its fetch workers. Times in seconds."""

    connect_timeout: float = 10.0
    timeout: float = 30.0  # for response headers, and for whole small bodies (manifests)
    stall_timeout: float = 30.0  # no byte for so long ends a body
    retry: int = 5  # retries after the first attempt, of resolve requests
    retry_delay: float = 0.5  # base of the full-jitter back-off
    proxy: str | None = field(default=None, repr=False)  # may hold a password
    # Sent to the ref's own host only, never after a redirect to another.
    headers: tuple[tuple[str, str], ...] = field(default=(), repr=False)
    ca_file: str | None = None
    private_hosts: tuple[
        str, ...
    ] = ()  # hosts to which a public host may redirect although their address is private
    trusted_keys: tuple[str, ...] = ()  # minisign public keys (base64 line)
    chunks: str | None = None  # --chunks FILE|URL: where the .meta4 is, instead of beside the file
    policy: Policy = Policy.PROVISIONAL
    # Origins ("https://host:port", or any URL there) that get `headers`, besides those of refs that the same
    # Source resolved: a fetch worker resolves nothing, and needs it.
    header_origins: tuple[str, ...] = ()
    hf_endpoint: str = "https://huggingface.co"  # without a slash at the end
    hf_token: str = field(default="", repr=False)  # sent to the origin of `hf_endpoint` only
    # (host as in refs, base URL): where a registry's API is, if not at https://<host> (http for loopback hosts).
    endpoints: tuple[tuple[str, str], ...] = ()
    docker_config: str | None = None  # config.json with the credentials of registries; None: none are used


class Source(Protocol):
    """One per scheme family. Bound to one trio run; use as an async context manager so that connections close."""

    async def resolve(self, ref: Ref) -> Manifest:
        """Ask the origin what `ref` is, now. SourceError, ChunkListError, SignatureError."""
        ...

    def open_range(
        self, mirror: Mirror, shape: BlobShape, span: ByteSpan, *, whole: bool = False
    ) -> AbstractAsyncContextManager[AsyncIterator[bytes]]:
        """Stream `span` of a blob with `shape` from `mirror`: pieces of any size, `len(span)` bytes in all.

        With `whole`, the origin is known to have no ranges: the request carries none, `span` must be everything,
        and a 200 with the exact length is what is wanted. Raises SourceError on entry and while iterating.
        """
        ...

    async def aclose(self) -> None:
        """Close every connection."""
        ...
