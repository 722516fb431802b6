"""GGUF headers: ours beside the `gguf` library, every prefix, and hostile ones."""

from __future__ import annotations

import struct
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from weightfs.core.geometry import ByteSpan
from weightfs.core.gguf import FILE_TYPES, MAX_HEADER, TYPES, read_gguf
from weightfs.core.tensors import MAX_TENSORS, Header, HeaderError, NeedMore, Tensor
from weightfs.testing.models import make_gguf

# ---- files made by hand


def u32(number: int) -> bytes:
    return struct.pack("<I", number)


def u64(number: int) -> bytes:
    return struct.pack("<Q", number)


def text(value: bytes) -> bytes:
    return u64(len(value)) + value


def head(*, magic: bytes = b"GGUF", version: int = 3, tensors: int = 0, keys: int = 0) -> bytes:
    return magic + u32(version) + u64(tensors) + u64(keys)


def key(name: bytes, kind: int, value: bytes) -> bytes:
    return text(name) + u32(kind) + value


def info(
    name: bytes = b"t", dims: tuple[int, ...] = (4,), kind: int = 0, offset: int = 0, count: int | None = None
) -> bytes:
    sizes = b"".join(u64(dim) for dim in dims)
    return text(name) + u32(len(dims) if count is None else count) + sizes + u32(kind) + u64(offset)


def padded(data: bytes, alignment: int = 32) -> bytes:
    return data + bytes(-len(data) % alignment)


def read(data: bytes, size: int | None = None) -> Header:
    header = read_gguf(data, len(data) if size is None else size)
    assert isinstance(header, Header)
    return header


def refusal(data: bytes, size: int | None = None) -> str:
    with pytest.raises(HeaderError) as caught:
        read_gguf(data, len(data) if size is None else size)
    return str(caught.value)


# ---- beside the library

SCALARS: dict[gguf.GGUFValueType, st.SearchStrategy[Any]] = {
    gguf.GGUFValueType.UINT8: st.integers(0, 2**8 - 1),
    gguf.GGUFValueType.INT8: st.integers(-(2**7), 2**7 - 1),
    gguf.GGUFValueType.UINT16: st.integers(0, 2**16 - 1),
    gguf.GGUFValueType.INT16: st.integers(-(2**15), 2**15 - 1),
    gguf.GGUFValueType.UINT32: st.integers(0, 2**32 - 1),
    gguf.GGUFValueType.INT32: st.integers(-(2**31), 2**31 - 1),
    gguf.GGUFValueType.FLOAT32: st.floats(width=32, allow_nan=False),
    gguf.GGUFValueType.UINT64: st.integers(0, 2**64 - 1),
    gguf.GGUFValueType.INT64: st.integers(-(2**63), 2**63 - 1),
    gguf.GGUFValueType.FLOAT64: st.floats(allow_nan=False),
    gguf.GGUFValueType.BOOL: st.booleans(),
    gguf.GGUFValueType.STRING: st.text(max_size=20),
}
LISTS: list[st.SearchStrategy[list[Any]]] = [
    st.lists(st.text(max_size=8), min_size=1, max_size=20),
    st.lists(st.integers(-100, 100), min_size=1, max_size=20),
    st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=20),
]
NAMES = st.text(st.characters(min_codepoint=97, max_codepoint=122), min_size=1, max_size=12)
DTYPES = st.sampled_from([np.float32, np.float16, np.float64, np.int8, np.int16, np.int32, np.int64])
QUANTISED = st.sampled_from(
    [kind for kind in gguf.GGMLQuantizationType if gguf.GGML_QUANT_SIZES[kind][0] > 1]
)


@st.composite
def files(draw: st.DrawFn) -> bytes:
    """A file made by the library, with every kind of value, and tensors of plain and quantised types."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "m.gguf"
        out = gguf.GGUFWriter(path, "llama")
        if draw(st.booleans()):
            out.add_custom_alignment(draw(st.sampled_from([8, 16, 64, 128])))
        for number, kind in enumerate(draw(st.lists(st.sampled_from(sorted(SCALARS)), max_size=6))):
            out.add_key_value(f"s.{number}", draw(SCALARS[kind]), kind)
        for number, values in enumerate(draw(st.lists(st.one_of(LISTS), max_size=3))):
            out.add_array(f"l.{number}", values)
        for name in draw(st.lists(NAMES, max_size=5, unique=True)):
            shape = tuple(draw(st.lists(st.integers(1, 5), min_size=1, max_size=4)))
            if draw(st.booleans()):
                out.add_tensor(name, np.ones(shape, draw(DTYPES)))
            else:
                dtype = draw(QUANTISED)
                _, nbytes = gguf.GGML_QUANT_SIZES[dtype]
                raw = np.zeros((*shape[:-1], shape[-1] * nbytes), np.uint8)
                out.add_tensor(name, raw, raw_dtype=dtype)
        out.write_header_to_file()
        out.write_kv_data_to_file()
        out.write_tensors_to_file()
        out.close()
        return path.read_bytes()


def library_says(data: bytes) -> tuple[dict[str, Any], list[Tensor]]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "m.gguf"
        path.write_bytes(data)
        theirs = gguf.GGUFReader(path)
        values = {
            name: field.contents()
            for name, field in theirs.fields.items()
            if not name.startswith("GGUF.") and field.types[0] != gguf.GGUFValueType.ARRAY
        }
        tensors = [
            Tensor(
                one.name,
                one.tensor_type.name,
                tuple(int(dim) for dim in one.shape),
                ByteSpan(int(one.data_offset), int(one.data_offset) + int(one.n_bytes)),
            )
            for one in theirs.tensors
        ]
        del theirs  # it has the file mapped
        return values, sorted(tensors, key=lambda tensor: tensor.span)


@given(files())
def test_it_says_what_the_library_says(data: bytes) -> None:
    header = read(data)
    values, tensors = library_says(data)
    assert dict(header.metadata) == values
    assert sorted(header.tensors, key=lambda tensor: tensor.span) == tensors
    assert header.format == "gguf"


@settings(max_examples=20)
@given(files(), st.integers(1, 7))
def test_every_prefix_needs_more_and_says_how_much(data: bytes, step: int) -> None:
    whole = read(data)
    for length in range(0, whole.nbytes, step):
        answer = read_gguf(data[:length], len(data))
        if isinstance(answer, NeedMore):
            assert length < answer.nbytes <= whole.nbytes
        else:  # only the padding before the data is not there yet
            assert answer == whole
            assert whole.nbytes - length < 128
    assert read_gguf(data[: whole.nbytes], len(data)) == whole


@given(files(), st.data())
def test_a_mutated_header_is_read_or_refused(data: bytes, draws: st.DataObject) -> None:
    mutated = bytearray(data)
    for _ in range(draws.draw(st.integers(1, 4))):
        at = draws.draw(st.integers(0, len(data) - 1))
        mutated[at] = draws.draw(st.integers(0, 255))
    try:
        answer = read_gguf(bytes(mutated), len(data))
    except HeaderError:
        return
    assert isinstance(answer, Header), "all of the file is there"
    spans = [tensor.span for tensor in answer.tensors]
    assert all(first.stop <= second.start for first, second in pairwise(spans))
    assert all(answer.nbytes <= span.start and span.stop <= len(data) for span in spans)


@given(st.binary(max_size=200), st.integers(0, 2**50))
@example(b"", 0)
def test_any_bytes(data: bytes, size: int) -> None:
    for start in (b"", head(keys=3), head(tensors=3)):
        try:
            answer = read_gguf(start + data, max(size, len(start + data)))
        except HeaderError:
            continue
        assert isinstance(answer, Header) or answer.nbytes > len(start + data)


def test_types_are_the_librarys() -> None:
    sizes = {kind.value: (kind.name, *gguf.GGML_QUANT_SIZES[kind]) for kind in gguf.GGMLQuantizationType}
    assert sizes == TYPES
    names = {
        kind.value: kind.name.removeprefix("MOSTLY_").removeprefix("ALL_") for kind in gguf.LlamaFileType
    }
    assert {number: name for number, name in names.items() if name != "GUESSED"} == FILE_TYPES


def test_a_model_of_the_kind_that_runtimes_load(tmp_path: Path) -> None:
    make_gguf(tmp_path / "m.gguf")
    data = (tmp_path / "m.gguf").read_bytes()
    header = read(data)
    assert header.metadata["general.architecture"] == "llama"
    assert "tokenizer.ggml.tokens" not in header.metadata, "lists are stepped over"
    assert header.tensors[-1].span.stop <= len(data)


# ---- what a hand can do


def test_a_large_vocabulary_is_stepped_over() -> None:
    tokens = b"".join(text(b"token %d" % number) for number in range(100_000))
    data = head(keys=1) + key(b"t", 9, u32(8) + u64(100_000) + tokens)
    assert dict(read(data).metadata) == {}
    for length in (30, 100_000, len(data) - 1):
        assert read_gguf(data[:length], len(data)) != read(data)


def test_lists_in_lists_and_long_strings_are_stepped_over() -> None:
    inner = u32(4) + u64(3) + bytes(12)
    strings = u32(8) + u64(2) + text(b"a") + text(b"b")
    nested = u32(9) + u64(2) + inner + strings
    data = head(keys=3, version=2)
    data += key(b"n", 9, u32(9) + u64(1) + nested) + key(b"long", 8, text(bytes(5000))) + key(b"b", 7, b"\2")
    assert dict(read(data).metadata) == {"b": True}


def test_a_file_type_that_has_a_name() -> None:
    def of(number: int) -> object:
        return read(head(keys=1) + key(b"general.file_type", 4, u32(number))).metadata["general.file_type"]

    assert of(15) == "Q4_K_M"
    assert of(999) == 999


def test_a_type_of_tomorrow_reaches_to_the_next_tensor() -> None:
    data = head(tensors=3)
    data += info(b"c", kind=77, offset=64) + info(b"a", kind=78, offset=0) + info(b"b", (8,), offset=32)
    data = padded(data)
    header = read(data, len(data) + 100)
    spans = [
        (tensor.name, tensor.dtype, tensor.span.start - len(data), len(tensor.span))
        for tensor in header.tensors
    ]
    assert spans == [("a", "type 78", 0, 32), ("b", "F32", 32, 32), ("c", "type 77", 64, 36)]


def test_a_scalar_and_an_empty_tensor() -> None:
    data = padded(head(tensors=2) + info(b"scalar", ()) + info(b"empty", (0, 3)))
    header = read(data, len(data) + 4)
    assert [(tensor.name, tensor.elements, len(tensor.span)) for tensor in header.tensors] == [
        ("empty", 0, 0),
        ("scalar", 1, 4),
    ]


HOSTILE = [
    (b"GGML" + bytes(60), "does not begin as GGUF"),
    (b"<html>", "does not begin as GGUF"),
    (b"GGUF" + (3).to_bytes(4, "big") + bytes(60), "big-endian"),
    (head(version=1), "version 1"),
    (head(version=4), "version 4"),
    (head(tensors=MAX_TENSORS + 1) + bytes(10**6), f"claims {MAX_TENSORS + 1} tensors"),
    (head(tensors=10**5), "no room"),
    (head(keys=10**6), "claims 1000000 keys"),
    (head(keys=10**4), "no room"),
    (head(keys=1) + u64(65_536) + bytes(80), "a key has 65536 bytes"),
    (head(keys=1) + key(b"\xff", 4, u32(1)), "a key is not valid UTF-8"),
    (head(keys=2) + 2 * key(b"k", 4, u32(1)), "'k' is given twice"),
    (head(keys=1) + key(b"k", 13, u32(1)), "unknown type 13"),
    (head(keys=1) + key(b"k", 9, u32(13) + u64(1) + bytes(8)), "unknown type 13"),
    (head(keys=1) + key(b"k", 8, u64(2**63)), "a string has 9223372036854775808 bytes"),
    (head(keys=1) + key(b"k", 9, u32(8) + u64(1) + u64(2**40)), "a string has 1099511627776 bytes"),
    (head(keys=1) + key(b"k", 9, u32(8) + u64(10**6)), "a list of 1000000 strings"),
    (head(keys=1) + key(b"k", 9, u32(8) + u64(2**40)), "over 4194304 strings"),
    (head(keys=1) + key(b"k", 9, (u32(9) + u64(1)) * 5), "nested more than 4 deep"),
    (head(keys=1) + key(b"k", 9, u32(10) + u64(2**60)), "ends after"),
    (head(keys=1) + key(b"general.alignment", 10, u64(32)), "not a number of 32 bits"),
    (head(keys=1) + key(b"general.alignment", 8, text(b"32")), "not a number of 32 bits"),
    (head(keys=1) + key(b"general.alignment", 4, u32(0)), "alignment is 0"),
    (head(keys=1) + key(b"general.alignment", 4, u32(48)), "alignment is 48"),
    (head(keys=1) + key(b"general.alignment", 4, u32(2**31)), "alignment is 2147483648"),
    (head(tensors=1) + info(b"x" * 2000), "a tensor's name has over 1024 bytes"),
    (head(tensors=1) + u64(2**62) + bytes(80), "ends after"),
    (head(tensors=1) + info(b"\xff"), "name is not valid UTF-8"),
    (head(tensors=1) + info(dims=(1,) * 5), "has 5 dimensions"),
    (head(tensors=1) + info(count=2**31), "has 2147483648 dimensions"),
    (head(tensors=1) + info(dims=(2**32, 2**32)), "more elements than can be counted"),
    (head(tensors=1) + info(dims=(2**63, 0)), "more elements than can be counted"),
    (head(tensors=1) + info(offset=16), "not aligned to 32"),
    (head(tensors=1) + info(dims=(33,), kind=2), "not whole blocks of Q4_0"),
    (head(tensors=1) + info(dims=(), kind=2), "not whole blocks of Q4_0"),
    (head(tensors=1) + info(dims=(100,)), "and the file at"),
    (head(tensors=1) + info(offset=32 * 2**40), "and the file at"),
    (head(tensors=1) + info(kind=77, offset=32 * 2**40), "and the file at"),
    (padded(head(tensors=2) + info() + info(offset=32)) + bytes(64), "same name"),
    (padded(head(tensors=2) + info(dims=(9,)) + info(b"u", offset=32)) + bytes(64), "overlaps the next one"),
    (padded(head(tensors=2) + info() + info(b"u", (5,))) + bytes(64), "overlaps the next one"),
]


@pytest.mark.parametrize(
    ("data", "says"), HOSTILE, ids=lambda value: value[:40] if isinstance(value, str) else ""
)
def test_what_is_refused(data: bytes, says: str) -> None:
    assert says in refusal(data)


def test_lists_are_bounded_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("weightfs.core.gguf.MAX_LISTED", 3)
    two = u32(8) + u64(2) + text(b"a") + text(b"b")
    assert read(head(keys=1) + key(b"k", 9, two)).metadata == {}
    assert "over 3 strings" in refusal(head(keys=2) + key(b"k", 9, two) + key(b"l", 9, two))


def test_a_header_that_never_ends() -> None:
    data = head(keys=1) + key(b"k", 9, u32(10) + u64(MAX_HEADER // 8))
    assert refusal(data, 2**40) == f"the header has over {MAX_HEADER} bytes"
    assert "no room" in refusal(head(tensors=MAX_TENSORS), 100_000)
