"""Safetensors headers: ours beside the `safetensors` library, every prefix, and hostile ones."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from weightfs.core.safetensors import MAX_HEADER, MAX_NOTES, read_safetensors
from weightfs.core.tensors import Header, HeaderError, NeedMore
from weightfs.testing.models import make_safetensors

CODES = "f8 f4 f2 i8 u8 i4 u4 i2 u2 i1 u1 ?"
DTYPES = st.sampled_from([np.dtype(code) for code in CODES.split()])
SHAPES = st.lists(st.integers(0, 4), max_size=4).map(tuple)
ARRAYS = st.builds(np.ones, SHAPES, DTYPES)
NAMES = st.text(st.characters(blacklist_categories=["Cs"]), max_size=8).filter(
    lambda name: name != "__metadata__"
)
NOTES = st.dictionaries(st.text(st.characters(blacklist_categories=["Cs"]), max_size=5), NAMES, max_size=3)
# Of notes without tensors the library (0.8) makes what it cannot read itself.
FILES = st.dictionaries(NAMES, ARRAYS, max_size=6).flatmap(
    lambda arrays: st.builds(save, st.just(arrays), st.none() | NOTES if arrays else st.none())
)


def made(header: object, nbytes: int = 0, *, pad: bytes = b"") -> bytes:
    """A file with this header (an object, or JSON text) and so many bytes of data."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    raw += pad
    return len(raw).to_bytes(8, "little") + raw + bytes(nbytes)


def one(dtype: object = "F32", shape: object = (1,), offsets: object = (0, 4)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def deserialize(data: bytes) -> list[tuple[str, dict[str, Any]]]:
    """The library's word."""
    found: list[tuple[str, dict[str, Any]]] = safetensors.deserialize(data)  # type: ignore[no-untyped-call]  # has no types
    return found


def read(data: bytes) -> Header:
    header = read_safetensors(data, len(data))
    assert isinstance(header, Header)
    return header


def seen(header: Header) -> dict[str, tuple[str, tuple[int, ...], int]]:
    return {tensor.name: (tensor.dtype, tensor.shape, len(tensor.span)) for tensor in header.tensors}


# ---- beside the library


@given(FILES)
def test_it_says_what_the_library_says(data: bytes) -> None:
    header = read(data)
    theirs = {
        name: (str(info["dtype"]), tuple(info["shape"]), len(info["data"]))
        for name, info in deserialize(data)
    }
    assert seen(header) == theirs
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "m.safetensors"
        path.write_bytes(data)
        with safe_open(path, framework="np") as file:
            assert dict(header.metadata) == (file.metadata() or {})
            assert sorted(file.keys()) == sorted(theirs)


@given(FILES)
def test_every_prefix_needs_more_and_says_how_much(data: bytes) -> None:
    whole = read(data)
    assert read_safetensors(b"", len(data)) == NeedMore(8)
    for length in range(whole.nbytes):
        answer = read_safetensors(data[:length], len(data))
        assert answer == NeedMore(8 if length < 8 else whole.nbytes)
    assert read_safetensors(data[: whole.nbytes], len(data)) == whole


@given(FILES, st.data())
def test_a_mutated_header_is_refused_or_read_as_the_library_reads_it(
    data: bytes, draws: st.DataObject
) -> None:
    mutated = bytearray(data)
    for _ in range(draws.draw(st.integers(1, 3))):
        mutated[draws.draw(st.integers(0, len(data) - 1))] = draws.draw(st.integers(0, 255))
    try:
        header = read(bytes(mutated))
    except HeaderError:
        return
    try:
        theirs = deserialize(bytes(mutated))
    except SafetensorError:  # they know fewer types
        return
    assert sorted(seen(header)) == sorted({name for name, _ in theirs})


@given(st.binary(max_size=200), st.integers(0, 2**50))
@example(b"", 0)
def test_any_bytes(data: bytes, size: int) -> None:
    for start in (b"", len(data).to_bytes(8, "little"), made(b"{" + data)):
        try:
            answer = read_safetensors(start + data, max(size, len(start + data)))
        except HeaderError:
            continue
        assert isinstance(answer, Header) or answer.nbytes > len(start + data)


def test_a_model_of_the_kind_that_runtimes_load(tmp_path: Path) -> None:
    make_safetensors(tmp_path / "m.safetensors")
    header = read((tmp_path / "m.safetensors").read_bytes())
    assert header.metadata == {"format": "pt"}
    assert header.tensors[0].name == "model.embed_tokens.weight"
    assert header.tensors[0].span.start == header.nbytes


# ---- what a hand can do


def test_white_space_escapes_and_small_types() -> None:
    raw = b'{ "__metadata__" : { } ,\n"\\u0061\\n": {"shape": [3, 2], "dtype":"F4", "data_offsets":[0,3], "x": null}}\t'
    assert seen(read(made(raw, 3))) == {"a\n": ("F4", (3, 2), 3)}
    assert seen(read(made(b"{}", pad=b"   "))) == {}
    assert read(made(b"{\n}")).nbytes == 11


def test_long_notes_are_stepped_over() -> None:
    assert read(made({"__metadata__": {"a": "x" * 5000, "b": "y"}})).metadata == {"b": "y"}


def named(count: int) -> Mapping[str, Any]:
    return {str(number): one(offsets=[4 * number, 4 * number + 4]) for number in range(count)}


ONE = json.dumps(one()).encode()
HOSTILE = [
    (b"", "too few"),
    (bytes(8), "not a JSON object"),
    ((MAX_HEADER + 1).to_bytes(8, "little") + bytes(100), "100000001 bytes; 100000000"),
    (b"<!DOCTYPE html><html></html>", "claims a header"),
    ((1000).to_bytes(8, "little") + bytes(100), "claims a header of 1000 bytes, and the file has 108"),
    (made(b"[]"), "not a JSON object"),
    (made(b" {}"), "not a JSON object"),
    (made(b"{"), "no string"),
    (made(b"{]"), "no string"),
    (made(b"{}{}"), "something follows"),
    (made(b'{"a"}'), "not well-formed"),
    (made(b'{"a":1}'), "no description of a tensor"),
    (made(b'{"a":{"b":{}}}'), "no description of a tensor"),
    (made(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"), "no description of a tensor"),
    (made(b'{"a":{"shape":' + b"[" * 2000 + b"]" * 2000 + b"}}"), "not well-formed"),
    (made(b'{"a":{\x00}}'), "not well-formed"),
    (made(b'{"a":{"dtype":"F32","shape":[' + b"9" * 4090 + b']}}'), "no description"),
    (made(b'{"a":{"dtype":"F32","shape":[' + b"9" * 4050 + b']}}'), "no proper shape"),
    (made(b'{"\xff":{}}'), "not well-formed"),
    (made(b'{"\\ud800":{}}'), "not valid Unicode"),
    (made(b'{"\\x":{}}'), "not well-formed"),
    (made(b'{"a":{}} x'), "unknown type"),
    (made({"a": one()}, 4)[:-5] + b" " + bytes(4), "not well-formed"),
    (made({"a": one()}, 4).replace(b"}}", b"};"), "not well-formed"),
    (made(b'{"a":{"dtype":"F32","dtype":"F32","shape":[1],"data_offsets":[0,4]}}', 4), "given twice"),
    (made(b'{"a":%b,"a":%b}' % (ONE, ONE), 4), "'a' is given twice"),
    (made(b'{"__metadata__":{},"__metadata__":{}}'), "'__metadata__' is given twice"),
    (made(b'{"__metadata__":{"a":"b","a":"c"}}'), "metadata 'a' is given twice"),
    (made(b'{"__metadata__":{"a":1}}'), "no string"),
    (made(b'{"__metadata__":[]}'), "not well-formed"),
    (made({"__metadata__": {str(number): "" for number in range(MAX_NOTES + 1)}}), "entries of metadata"),
    (made({"x" * 2000: one()}, 4), "name has over 1024 bytes"),
    (made({"a": one("F33")}, 4), "unknown type 'F33'"),
    (made({"a": one(["F32"])}, 4), "unknown type"),
    (made({"a": one(shape=None)}, 4), "no proper shape"),
    (made({"a": one(shape=[-1])}, 4), "no proper shape"),
    (made({"a": one(shape=[True])}, 4), "no proper shape"),
    (made({"a": one(shape=[1.0])}, 4), "no proper shape"),
    (made({"a": one(shape=[1] * 65)}, 4), "no proper shape"),
    (made({"a": one(shape=[2**62, 4])}, 4), "more elements"),
    (made({"a": one(offsets=[0])}, 4), "no proper data offsets"),
    (made({"a": one(offsets=[4, 0])}, 4), "no proper data offsets"),
    (made({"a": one(shape=[2])}, 4), "other bytes than"),
    (made({"a": one("F4", [1], [0, 1])}, 1), "other bytes than"),
    (made({"a": one(offsets=[4, 8])}, 8), "begins at 4, where 0"),
    (made({"a": one(), "b": one()}, 4), "begins at 0, where 4"),
    (made({"a": one(), "b": one(offsets=[8, 12])}, 12), "begins at 8, where 4"),
    (made({"a": one()}, 3), "and the file at"),
    (made({"a": one()}, 5), "its tensors end at"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("data", "says"), HOSTILE, ids=lambda value: value[:40] if isinstance(value, str) else ""
)
def test_what_is_refused(data: bytes, says: str) -> None:
    with pytest.raises(HeaderError) as caught:
        read_safetensors(data, len(data))
    assert says in str(caught.value)


def test_more_tensors_than_a_model_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("weightfs.core.safetensors.MAX_TENSORS", 1000)
    assert len(read(made(named(1000), 4000)).tensors) == 1000
    with pytest.raises(HeaderError, match="over 1000 tensors"):
        read(made(named(1001), 4004))
