"""Which chunks of a blob are there: a mutable set of chunk numbers below a fixed count.

Invariant: `_marks` has exactly `count` bytes, each 0 or 1, and `_present` is the number of ones.

One *byte* per chunk, although a bitmap would be an eighth of it: `bytearray.find` of one byte is `memchr`, so
a hole or a run is found at memory speed wherever it is (about a microsecond for all 32,768 chunks of a big
blob), without the copies of 4 KiB that shifting an `int` bitmap makes, and `add` and `in` touch one byte. It
costs 32 KiB for the biggest blob. Only the form that is stored is packed to bits.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import compress, islice

from weightfs.core.geometry import BlobShape, ChunkSpan

_TO_DIGITS = bytes([ord("0"), ord("1")]) + bytes(254)  # marks → the digits that int(…, 2) reads
_TO_MARKS = bytes(ord("0")) + bytes([0, 1]) + bytes(254 - ord("0"))  # and back


class ChunkSet:  # noqa: PLW1641 - mutable, so not hashable: Python sets __hash__ to None beside __eq__
    """A set of chunk numbers in `[0, count)`. Chunks and spans that reach outside raise IndexError."""

    __slots__ = ("_marks", "_present", "count")

    def __init__(self, count: int, chunks: Iterable[int] = ()) -> None:
        if count < 0:
            raise ValueError(f"a set of chunks has room for 0 or more, not {count}")
        self.count = count
        self._marks = bytearray(count)
        self._present = 0
        for chunk in chunks:
            self.add(chunk)

    def __len__(self) -> int:
        return self._present

    def __contains__(self, chunk: object) -> bool:
        return isinstance(chunk, int) and 0 <= chunk < self.count and self._marks[chunk] == 1

    def __iter__(self) -> Iterator[int]:
        return compress(range(self.count), self._marks)

    def __eq__(self, other: object) -> bool:
        return self._marks == other._marks if isinstance(other, ChunkSet) else NotImplemented

    def __repr__(self) -> str:
        runs = [f"{run.start}..{run.stop}" for run in islice(self.runs(), 9)]
        shown = " ".join(runs[:8] + ["…"] * (len(runs) == 9))
        return f"<ChunkSet {len(self)} of {self.count}: [{shown}]>"

    @property
    def full(self) -> bool:
        """Whether every chunk is present; True for a count of 0."""
        return self._present == self.count

    def copy(self) -> ChunkSet:
        """An independent set with the same chunks."""
        twin = ChunkSet(0)
        twin.count, twin._marks, twin._present = self.count, self._marks[:], self._present
        return twin

    def add(self, chunk: int) -> None:
        """Put one chunk in; nothing happens if it is there."""
        if not 0 <= chunk < self.count:
            raise IndexError(f"chunk {chunk} of {self.count}")
        self._present += 1 - self._marks[chunk]
        self._marks[chunk] = 1

    def discard(self, chunk: int) -> None:
        """Take one chunk out; nothing happens if it is not there."""
        if not 0 <= chunk < self.count:
            raise IndexError(f"chunk {chunk} of {self.count}")
        self._present -= self._marks[chunk]
        self._marks[chunk] = 0

    def add_span(self, span: ChunkSpan) -> None:
        """Put a run of chunks in."""
        self._mark(span, 1)

    def discard_span(self, span: ChunkSpan) -> None:
        """Take a run of chunks out."""
        self._mark(span, 0)

    def clear(self) -> None:
        """Take every chunk out."""
        self._marks = bytearray(self.count)
        self._present = 0

    def covers(self, span: ChunkSpan) -> bool:
        """Whether every chunk of `span` is present; True for an empty span."""
        self._check(span)
        return self._marks.find(0, span.start, span.stop) < 0

    def holes(self, span: ChunkSpan) -> Iterator[ChunkSpan]:
        """The maximal absent runs inside `span`, ascending. Each is looked up when it is asked for."""
        self._check(span)
        return self._spans_of(0, span)

    def runs(self, span: ChunkSpan | None = None) -> Iterator[ChunkSpan]:
        """The maximal present runs inside `span` (default: everywhere), ascending."""
        span = ChunkSpan(0, self.count) if span is None else span
        self._check(span)
        return self._spans_of(1, span)

    def first_hole(self, start: int = 0) -> int | None:
        """The lowest absent chunk at or after `start`; None if there is none."""
        self._check(ChunkSpan(start, start))
        chunk = self._marks.find(0, start)
        return None if chunk < 0 else chunk

    def union(self, other: ChunkSet) -> None:
        """Put in what is in `other`. ValueError if the counts differ."""
        mine, theirs = self._number(), self._other_number(other)
        self._set_number(mine | theirs)

    def difference(self, other: ChunkSet) -> None:
        """Take out what is in `other`. ValueError if the counts differ."""
        mine, theirs = self._number(), self._other_number(other)
        self._set_number(mine ^ (mine & theirs))

    def to_bytes(self) -> bytes:
        """The set as a bitmap of ceil(count / 8) bytes: chunk `i` is bit `i % 8` of byte `i // 8`."""
        digits = self._marks[::-1].translate(_TO_DIGITS) or b"0"
        return int(digits, 2).to_bytes(-(-self.count // 8), "little")

    @classmethod
    def from_bytes(cls, count: int, data: bytes) -> ChunkSet:
        """The inverse of `to_bytes`. ValueError if the length is wrong or a bit past `count` is set."""
        made = cls(count)
        if len(data) != -(-count // 8):
            raise ValueError(f"a bitmap of {count} chunks has {-(-count // 8)} bytes, not {len(data)}")
        bits = int.from_bytes(data, "little")
        if bits >> count:
            raise ValueError(f"the bitmap has a chunk past the last of {count}")
        if count:
            made._marks = bytearray(f"{bits:0{count}b}"[::-1].encode().translate(_TO_MARKS))
            made._present = bits.bit_count()
        return made

    def byte_count(self, shape: BlobShape) -> int:
        """How many bytes the chunks cover, the last at its true length. ValueError: another blob's shape."""
        if shape.chunk_count != self.count:
            raise ValueError(f"the shape has {shape.chunk_count} chunks, the set {self.count}")
        total = self._present * shape.chunk_length
        if self.count and self._marks[-1]:
            total -= self.count * shape.chunk_length - shape.size
        return total

    def _check(self, span: ChunkSpan) -> None:
        if span.stop > self.count:
            raise IndexError(f"chunks {span.start} to {span.stop} of {self.count}")

    def _mark(self, span: ChunkSpan, mark: int) -> None:
        self._check(span)
        before = self._marks.count(1, span.start, span.stop)
        self._marks[span.start : span.stop] = bytes([mark]) * len(span)
        self._present += mark * len(span) - before

    def _spans_of(self, mark: int, span: ChunkSpan) -> Iterator[ChunkSpan]:
        start = self._marks.find(mark, span.start, span.stop)
        while start >= 0:
            stop = self._marks.find(1 - mark, start, span.stop)
            if stop < 0:
                stop = span.stop
            yield ChunkSpan(start, stop)
            start = self._marks.find(mark, stop, span.stop)

    def _number(self) -> int:
        return int.from_bytes(self._marks, "little")

    def _other_number(self, other: ChunkSet) -> int:
        if other.count != self.count:
            raise ValueError(f"a set of {self.count} chunks and one of {other.count} are of different blobs")
        return other._number()

    def _set_number(self, number: int) -> None:
        self._marks = bytearray(number.to_bytes(self.count, "little"))
        self._present = number.bit_count()
