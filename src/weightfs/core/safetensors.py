"""The header of a safetensors file: its length in 8 bytes, then JSON (its README, section "Format"). Pure.

Rules: the JSON is taken apart tensor by tensor, so that a hostile one is never built as a whole (100 MB of brackets
would be gigabytes of Python objects); what the format forbids is refused, since two readers that differ would read
different tensors: keys that are given twice, gaps, overlaps. See `core/tensors.py` for what a parser answers.

The `safetensors` library is not used: it maps the whole file, and takes the zeros of a hole for data. The tests compare
the two, field by field.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from typing import Any, Final

from weightfs.core.geometry import ByteSpan
from weightfs.core.tensors import (
    MAX_ELEMENTS,
    MAX_TENSORS,
    Header,
    HeaderError,
    NeedMore,
    Scalar,
    Tensor,
    checked_name,
)

MAX_HEADER: Final = 100_000_000  # the format's own bound
MAX_DIMS: Final = 64  # numpy's
MAX_NOTES: Final = 16_384  # entries of __metadata__
MAX_KEPT: Final = 4096  # bytes of one that is kept

# Bits of an element: `Dtype` of the reference implementation.
DTYPE_BITS: Final = {
    "BOOL": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32,
    "F32": 32, "C64": 64, "F64": 64, "I64": 64, "U64": 64,
}  # fmt: skip

_PREFIX: Final = 8
_SPACE: Final = re.compile(rb"[ \t\n\r]*+")
_STRING: Final = re.compile(rb'"(?:[^"\\\x00-\x1f]++|\\.)*+"')
_INFO: Final = re.compile(
    rb"\{[^{}]{0,4096}\}"
)  # of one tensor: it has no object in it, and no brace in a string
_METADATA: Final = "__metadata__"

_Info = tuple[str, tuple[int, ...], int, int]  # dtype, shape, data offsets


def read_safetensors(data: bytes, size: int) -> Header | NeedMore:
    """Read the header of a file of `size` bytes that begins with `data`.

    Raises:
        HeaderError: It is no safetensors file, or malformed.
    """
    if size < _PREFIX:
        raise HeaderError(f"the file has {size} bytes, too few for safetensors")
    if len(data) < _PREFIX:
        return NeedMore(_PREFIX)
    length = int.from_bytes(data[:_PREFIX], "little")
    stop = _PREFIX + length
    if length > MAX_HEADER:
        raise HeaderError(f"it claims a header of {length} bytes; {MAX_HEADER} are allowed")
    if stop > size:
        raise HeaderError(f"it claims a header of {length} bytes, and the file has {size}")
    if len(data) < stop:
        return NeedMore(stop)
    if data[_PREFIX : _PREFIX + 1] != b"{":
        raise HeaderError("its header is not a JSON object")
    metadata, tensors = _Walker(data, _PREFIX, stop).header()
    return Header("safetensors", metadata, _placed(tensors, stop, size), stop)


class _Walker:
    """Goes over the JSON between `at` and `stop` once."""

    def __init__(self, data: bytes, at: int, stop: int) -> None:
        self._data = data
        self._at = at
        self._stop = stop
        self._metadata: dict[str, Scalar] = {}

    def header(self) -> tuple[dict[str, Scalar], dict[str, _Info]]:
        """The metadata, and dtype, shape and data offsets by name."""
        tensors: dict[str, _Info] = {}
        seen_metadata = False

        def take() -> None:
            nonlocal seen_metadata
            name = checked_name(self._string().encode())
            self._expect(b":")
            if name in tensors or (name == _METADATA and seen_metadata):
                raise HeaderError(f"the name {name[:80]!r} is given twice")
            if name == _METADATA:
                seen_metadata = True
                self._read_metadata()
            elif len(tensors) >= MAX_TENSORS:
                raise HeaderError(f"it has over {MAX_TENSORS} tensors")
            else:
                tensors[name] = _info(name, self._token(_INFO, "description of a tensor"))

        self._members(take)
        self._skip_space()
        if self._at != self._stop:
            raise HeaderError("something follows the JSON of its header")
        return self._metadata, tensors

    def _read_metadata(self) -> None:
        seen: set[str] = set()

        def take() -> None:
            key = self._string()
            self._expect(b":")
            self._skip_space()
            value = self._string()
            if key in seen:
                raise HeaderError(f"the metadata {key[:80]!r} is given twice")
            seen.add(key)
            if len(seen) > MAX_NOTES:
                raise HeaderError(f"it has over {MAX_NOTES} entries of metadata")
            if len(value) <= MAX_KEPT:
                self._metadata[key] = value

        self._members(take)

    def _members(self, take: Callable[[], None]) -> None:
        """An object; `take` is called where each member begins."""
        self._expect(b"{")
        self._skip_space()
        if self._next() == b"}":
            self._at += 1
            return
        while True:
            self._skip_space()
            take()
            self._skip_space()
            mark = self._next()
            self._at += 1
            if mark == b"}":
                return
            if mark != b",":
                raise HeaderError("its header is not well-formed JSON")

    def _string(self) -> str:
        text: str = _parsed(self._token(_STRING, "string"))
        try:
            text.encode()
        except UnicodeEncodeError:  # half a surrogate pair, as an escape
            raise HeaderError("a string of its header is not valid Unicode") from None
        return text

    def _token(self, form: re.Pattern[bytes], what: str) -> bytes:
        self._skip_space()
        found = form.match(self._data, self._at, self._stop)
        if found is None:
            raise HeaderError(f"its header has no {what} where one belongs")
        self._at = found.end()
        return found[0]

    def _expect(self, mark: bytes) -> None:
        self._skip_space()
        if self._next() != mark:
            raise HeaderError("its header is not well-formed JSON")
        self._at += 1

    def _next(self) -> bytes:
        return self._data[self._at : min(self._at + 1, self._stop)]

    def _skip_space(self) -> None:
        found = _SPACE.match(self._data, self._at, self._stop)
        assert found is not None, "no space is a match, too"
        self._at = found.end()


def _parsed(token: bytes) -> Any:
    """A string, or an object without objects in it. HeaderError."""
    try:
        return _DECODER.decode(token.decode())
    except HeaderError:
        raise
    except (ValueError, RecursionError):
        raise HeaderError("its header is not well-formed JSON") from None


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise HeaderError("a field of a tensor is given twice")
    return found


_DECODER: Final = json.JSONDecoder(object_pairs_hook=_distinct)  # made once: there may be 100,000 tensors


def _info(name: str, token: bytes) -> _Info:
    fields = _parsed(token)
    dtype, shape, offsets = fields.get("dtype"), fields.get("shape"), fields.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise HeaderError(f"the tensor {name[:80]!r} has the unknown type {str(dtype)[:40]!r}")
    if not _is_counts(shape) or len(shape) > MAX_DIMS:
        raise HeaderError(f"the tensor {name[:80]!r} has no proper shape")
    if not _is_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise HeaderError(f"the tensor {name[:80]!r} has no proper data offsets")
    elements = math.prod(shape)
    if elements > MAX_ELEMENTS:
        raise HeaderError(f"the tensor {name[:80]!r} has more elements than can be counted")
    if elements * DTYPE_BITS[dtype] != 8 * (offsets[1] - offsets[0]):
        raise HeaderError(f"the tensor {name[:80]!r} has other bytes than its shape and type need")
    return dtype, tuple(shape), offsets[0], offsets[1]


def _is_counts(value: object) -> bool:
    return isinstance(value, list) and all(type(one) is int and 0 <= one <= MAX_ELEMENTS for one in value)


def _placed(infos: dict[str, _Info], start: int, size: int) -> tuple[Tensor, ...]:
    """The tensors where they lie in the file, which they fill from the header's end on, without gaps."""
    tensors = []
    at = 0
    for name, (dtype, shape, begin, end) in sorted(infos.items(), key=lambda item: item[1][2:]):
        if begin != at:
            raise HeaderError(f"the tensor {name[:80]!r} begins at {begin}, where {at} is expected")
        if start + end > size:
            raise HeaderError(f"the tensor {name[:80]!r} ends at {start + end}, and the file at {size}")
        tensors.append(Tensor(name, dtype, shape, ByteSpan(start + begin, start + end)))
        at = end
    if start + at != size:
        raise HeaderError(f"its tensors end at {start + at}, and the file at {size}")
    return tuple(tensors)
