"""Bytes that the disk does not take, in memory: one sparse file (memfd_create(2)) for all blobs.

Rules that hold here:

- Every blob gets an address range of its own at its first use, as long as it is, and no range is ever used again (there
  are 8 EiB of them). So a byte's place is arithmetic, and what is written late to a range that was given up is never
  taken for something else.
- Memory is taken by what was written and not yet freed. Whoever uses it holds that within a bound; nothing here does.
- Fetch workers inherit the descriptor. The file has no name, and is gone with the last process that has it open.
"""

from __future__ import annotations

import os
from typing import Final

from weightfs.core.geometry import BlobShape, ByteSpan
from weightfs.core.manifest import BlobId
from weightfs.errors import CacheError
from weightfs.store.disk import punch_hole

_PAGE: Final = 4096  # a hole smaller than a page is zeroed, not freed; chunks begin at multiples of it


class MemoryFile:
    """Every call is of memory, and none waits. Close it when nobody writes any more."""

    def __init__(self) -> None:
        self.descriptor = os.memfd_create("weightfs-uncached", os.MFD_CLOEXEC)
        self._bases: dict[BlobId, int] = {}
        self._end = 0

    def base(self, blob: BlobId, shape: BlobShape) -> int:
        """Where the blob's byte 0 is."""
        if blob not in self._bases:
            self._bases[blob] = self._end
            self._end += _up(shape.size)
        return self._bases[blob]

    def read(self, blob: BlobId, span: ByteSpan) -> bytes:
        """Bytes that were written and not freed; which those are, the caller knows. CacheError past the last one."""
        data = os.pread(self.descriptor, len(span), self._bases[blob] + span.start)
        if len(data) != len(span):
            raise CacheError(f"what was kept in memory of blob {blob} is not there")
        return data

    def free(self, blob: BlobId, shape: BlobShape, chunk: int) -> None:
        """Give the memory of a chunk back."""
        span = shape.span_of(chunk)
        base = self._bases[blob]
        stop = _up(span.stop) if span.stop == shape.size else span.stop
        punch_hole(self.descriptor, ByteSpan(base + span.start, base + stop))

    def forget(self, blob: BlobId) -> None:
        """Nothing more of this blob: it gets another range if it comes again. Its chunks are to be freed before."""
        self._bases.pop(blob, None)

    def close(self) -> None:
        """Give all of it back."""
        os.close(self.descriptor)


def _up(nbytes: int) -> int:
    return -(-nbytes // _PAGE) * _PAGE
