"""The header of a GGUF file, versions 2 and 3, little endian (docs/gguf.md of ggml): metadata and tensor infos. Pure.

Rules: every number is checked against what is left before it is used, so no claim of a header costs more time or memory
than the bytes that are there; lists are stepped over, never built. See `core/tensors.py` for what a parser answers.

The `gguf` library is not used: it maps the whole file, takes the zeros of a hole for data, and trusts the counts that
it finds. The tests compare the two, field by field.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from typing import Final

from weightfs.core.geometry import MIB, ByteSpan
from weightfs.core.tensors import (
    MAX_ELEMENTS,
    MAX_NAME_BYTES,
    MAX_TENSORS,
    Header,
    HeaderError,
    NeedMore,
    Scalar,
    Tensor,
    checked_name,
)

MAX_HEADER: Final = 64 * MIB  # vocabularies of 256,000 tokens with their merges take about 10 MiB
MAX_KEYS: Final = 16_384  # real files have some 50
MAX_KEY_BYTES: Final = 65_535  # the format's own bound
MAX_STRING: Final = 16 * MIB
MAX_LISTED: Final = 1 << 22  # strings and lists in lists, of one header: each is one step of a loop
MAX_NESTING: Final = 4
MAX_KEPT: Final = 4096  # bytes of a string that is kept
MAX_DIMS: Final = 4  # GGML_MAX_DIMS
MAX_ALIGNMENT: Final = MIB
DEFAULT_ALIGNMENT: Final = 32

_MAGIC: Final = b"GGUF"
_U32: Final = struct.Struct("<I")
_U64: Final = struct.Struct("<Q")
_U32_KIND, _BOOL, _STRING, _ARRAY = 4, 7, 8, 9
# gguf_metadata_value_type: how a value of each fixed size is read
_FORMS: Final = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "B", 10: "Q", 11: "q", 12: "d"}
_FIXED: Final = {number: struct.Struct(f"<{code}") for number, code in _FORMS.items()}
_MIN_KEY: Final = 8 + 4 + 1  # an empty key, its type, one byte
_MIN_INFO: Final = 8 + 4 + 4 + 8  # an empty name, no dimensions, type, offset

# ggml_type: name, elements of a block, bytes of a block (ggml-common.h)
TYPES: Final = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22), 7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34), 9: ("Q8_1", 32, 40),
    10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110), 12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210), 15: ("Q8_K", 256, 292), 16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98), 19: ("IQ1_S", 256, 50), 20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82), 23: ("IQ4_XS", 256, 136), 24: ("I8", 1, 1), 25: ("I16", 1, 2),
    26: ("I32", 1, 4), 27: ("I64", 1, 8), 28: ("F64", 1, 8), 29: ("IQ1_M", 256, 56),
    30: ("BF16", 1, 2), 34: ("TQ1_0", 256, 54), 35: ("TQ2_0", 256, 66), 39: ("MXFP4", 32, 17),
    40: ("NVFP4", 64, 36), 41: ("Q1_0", 128, 18),
}  # fmt: skip

# llama_ftype, the value of general.file_type, as people call it (llama.h)
FILE_TYPES: Final = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 7: "Q8_0", 8: "Q5_0", 9: "Q5_1", 10: "Q2_K", 11: "Q3_K_S",
    12: "Q3_K_M", 13: "Q3_K_L", 14: "Q4_K_S", 15: "Q4_K_M", 16: "Q5_K_S", 17: "Q5_K_M", 18: "Q6_K",
    19: "IQ2_XXS", 20: "IQ2_XS", 21: "Q2_K_S", 22: "IQ3_XS", 23: "IQ3_XXS", 24: "IQ1_S", 25: "IQ4_NL",
    26: "IQ3_S", 27: "IQ3_M", 28: "IQ2_S", 29: "IQ2_M", 30: "IQ4_XS", 31: "IQ1_M", 32: "BF16",
    36: "TQ1_0", 37: "TQ2_0", 38: "MXFP4_MOE", 39: "NVFP4", 40: "Q1_0",
}  # fmt: skip


def read_gguf(data: bytes, size: int) -> Header | NeedMore:
    """Read the header of a file of `size` bytes that begins with `data`.

    In `metadata`, `general.file_type` is the name of the quantisation if the number has one (`Q4_K_M`).

    Raises:
        HeaderError: It is no GGUF file, of a version that is not read, or malformed.
    """
    try:
        return _Reader(data, min(size, MAX_HEADER)).header(size)
    except _ShortError as short:
        if short.nbytes > size:
            raise HeaderError(f"the file ends after {size} bytes, inside its header") from None
        if short.nbytes > MAX_HEADER:
            raise HeaderError(f"the header has over {MAX_HEADER} bytes") from None
        return NeedMore(short.nbytes)


class _ShortError(Exception):
    """The bytes end too early: the first `nbytes` are needed."""

    def __init__(self, nbytes: int) -> None:
        super().__init__(nbytes)
        self.nbytes = nbytes


class _Reader:
    """Goes over the bytes once. `limit` is where a header must have ended, whatever it claims."""

    def __init__(self, data: bytes, limit: int) -> None:
        self._data = data
        self._limit = limit
        self._at = 0
        self._listed = 0

    def header(self, size: int) -> Header:
        """The whole."""
        self._begin()
        tensor_count, key_count = self._u64(), self._u64()
        self._check_count(tensor_count, MAX_TENSORS, _MIN_INFO, "tensors")
        self._check_count(key_count, MAX_KEYS, _MIN_KEY, "keys")
        metadata: dict[str, Scalar] = {}
        keys: set[str] = set()
        alignment = DEFAULT_ALIGNMENT
        for _ in range(key_count):
            key, kind = self._key(), self._u32()
            if key in keys:
                raise HeaderError(f"the key {key[:80]!r} is given twice")
            keys.add(key)
            value = self._value(kind)
            if key == "general.alignment":
                alignment = _alignment(kind, value)
            if value is not None:
                metadata[key] = value
        file_type = metadata.get("general.file_type")
        if isinstance(file_type, int) and file_type in FILE_TYPES:
            metadata["general.file_type"] = FILE_TYPES[file_type]
        infos = [self._info(alignment) for _ in range(tensor_count)]
        start = -(-self._at // alignment) * alignment
        return Header("gguf", metadata, _placed(infos, start, size), start if infos else self._at)

    def _begin(self) -> None:
        magic = self._data[:4]
        if magic != _MAGIC[: len(magic)]:
            raise HeaderError("the file does not begin as GGUF does")
        self._take(4)
        version = self._u32()
        if version & 0xFFFF == 0:
            raise HeaderError("it is a big-endian GGUF file; weightfs reads little-endian ones")
        if version not in (2, 3):
            raise HeaderError(f"it is of GGUF version {version}; weightfs reads versions 2 and 3")

    def _check_count(self, count: int, most: int, each: int, what: str) -> None:
        if count > most:
            raise HeaderError(f"it claims {count} {what}; {most} are allowed")
        if self._at + count * each > self._limit:
            raise HeaderError(f"it claims {count} {what}, for which it has no room")

    def _key(self) -> str:
        length = self._u64()
        if length > MAX_KEY_BYTES:
            raise HeaderError(f"a key has {length} bytes; {MAX_KEY_BYTES} are allowed")
        try:
            return self._take(length).decode()
        except UnicodeDecodeError:
            raise HeaderError("a key is not valid UTF-8") from None

    def _value(self, kind: int) -> Scalar | None:
        """A scalar, or a string that is short; None for what is only stepped over."""
        if kind == _ARRAY:
            self._skip_list(1)
            return None
        if kind == _STRING:
            length = self._string_length()
            if length > MAX_KEPT:
                self._skip(length)
                return None
            return self._take(length).decode(errors="replace")
        number: int | float = self._unpack(_fixed(kind))
        return bool(number) if kind == _BOOL else number

    def _string_length(self) -> int:
        length = self._u64()
        if length > MAX_STRING:
            raise HeaderError(f"a string has {length} bytes; {MAX_STRING} are allowed")
        return length

    def _skip_list(self, depth: int) -> None:
        if depth > MAX_NESTING:
            raise HeaderError(f"lists are nested more than {MAX_NESTING} deep")
        kind, count = self._u32(), self._u64()
        if kind not in (_STRING, _ARRAY):
            self._skip(count * _fixed(kind).size)
            return
        self._listed += count
        if self._listed > MAX_LISTED:
            raise HeaderError(f"its lists have over {MAX_LISTED} strings")
        if self._at + count * 8 > self._limit:
            raise HeaderError(f"it claims a list of {count} strings, for which it has no room")
        if kind == _STRING:
            self._skip_strings(count)
            return
        for _ in range(count):
            self._skip_list(depth + 1)

    def _skip_strings(self, count: int) -> None:
        """Hundreds of thousands of tokens: no call for each."""
        data, at, end, unpack = self._data, self._at, len(self._data), _U64.unpack_from
        for _ in range(count):
            if at + 8 > end:
                raise _ShortError(at + 8)
            (length,) = unpack(data, at)
            if length > MAX_STRING:
                raise HeaderError(f"a string has {length} bytes; {MAX_STRING} are allowed")
            at += 8 + length
        if at > end:
            raise _ShortError(at)
        self._at = at

    def _info(self, alignment: int) -> _Info:
        length = self._u64()
        name = checked_name(self._take(min(length, MAX_NAME_BYTES + 1)))
        dims = self._u32()
        if dims > MAX_DIMS:
            raise HeaderError(f"the tensor {name[:80]!r} has {dims} dimensions; {MAX_DIMS} are allowed")
        shape = tuple(self._u64() for _ in range(dims))
        kind, offset = self._u32(), self._u64()
        elements = math.prod(shape)
        if max(elements, *shape, 0) > MAX_ELEMENTS:
            raise HeaderError(f"the tensor {name[:80]!r} has more elements than can be counted")
        if offset % alignment:
            raise HeaderError(
                f"the tensor {name[:80]!r} begins at {offset}, which is not aligned to {alignment}"
            )
        if kind not in TYPES:
            return _Info(name, f"type {kind}", shape, offset, None)
        dtype, block, nbytes = TYPES[kind]
        if (shape[0] if shape else 1) % block:
            raise HeaderError(f"the rows of the tensor {name[:80]!r} are not whole blocks of {dtype}")
        return _Info(name, dtype, shape, offset, elements // block * nbytes)

    def _unpack(self, form: struct.Struct) -> int | float:
        self._require(form.size)
        value: int | float = form.unpack_from(self._data, self._at)[0]
        self._at += form.size
        return value

    def _u32(self) -> int:
        return int(self._unpack(_U32))

    def _u64(self) -> int:
        return int(self._unpack(_U64))

    def _take(self, count: int) -> bytes:
        self._require(count)
        self._at += count
        return self._data[self._at - count : self._at]

    def _skip(self, count: int) -> None:
        self._require(count)
        self._at += count

    def _require(self, count: int) -> None:
        if self._at + count > len(self._data):
            raise _ShortError(self._at + count)


@dataclass(frozen=True, slots=True)
class _Info:
    """A tensor as the header has it: `offset` from the beginning of the data, `nbytes` None if the type is unknown."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int | None


def _fixed(kind: int) -> struct.Struct:
    form = _FIXED.get(kind)
    if form is None:
        raise HeaderError(f"it has a value of the unknown type {kind}")
    return form


def _alignment(kind: int, value: Scalar | None) -> int:
    if kind != _U32_KIND or not isinstance(value, int):
        raise HeaderError("its alignment is not a number of 32 bits")
    if not 0 < value <= MAX_ALIGNMENT or value & (value - 1):
        raise HeaderError(f"its alignment is {value}; a power of two up to {MAX_ALIGNMENT} is needed")
    return value


def _placed(infos: list[_Info], start: int, size: int) -> tuple[Tensor, ...]:
    """The tensors where they lie in the file; one of an unknown type reaches to the next one, or to the end."""
    if len({info.name for info in infos}) < len(infos):
        raise HeaderError("two of its tensors have the same name")
    infos = sorted(infos, key=lambda info: (info.offset, info.nbytes or 0))
    tensors = []
    for index, info in enumerate(infos):
        begin = start + info.offset
        following = start + infos[index + 1].offset if index + 1 < len(infos) else size
        end = begin + info.nbytes if info.nbytes is not None else max(begin, following)
        if end > size:
            raise HeaderError(f"the tensor {info.name[:80]!r} ends at {end}, and the file at {size}")
        if end > following:
            raise HeaderError(f"the tensor {info.name[:80]!r} overlaps the next one")
        tensors.append(Tensor(info.name, info.dtype, info.shape, ByteSpan(begin, end)))
    return tuple(tensors)
