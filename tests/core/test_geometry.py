from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weightfs.core.geometry import (
    GIB,
    KIB,
    MAX_BLOB_SIZE,
    MAX_CHUNKS,
    MIB,
    BlobShape,
    ByteSpan,
    ChunkSpan,
    chunk_length_for,
)

small = st.integers(0, 200)


@st.composite
def byte_spans(draw: st.DrawFn, top: int = 200) -> ByteSpan:
    start = draw(st.integers(0, top))
    return ByteSpan(start, draw(st.integers(start, top)))


@st.composite
def chunk_spans(draw: st.DrawFn, top: int = 200) -> ChunkSpan:
    start = draw(st.integers(0, top))
    return ChunkSpan(start, draw(st.integers(start, top)))


shapes = st.builds(BlobShape, small, st.sampled_from([1, 2, 8, 32]))


@pytest.mark.parametrize(("start", "stop"), [(-1, 0), (2, 1), (-2, -1)])
def test_spans_refuse_what_is_not_one(start: int, stop: int) -> None:
    with pytest.raises(ValueError, match="not a span"):
        ByteSpan(start, stop)
    with pytest.raises(ValueError, match="not a span"):
        ChunkSpan(start, stop)


@given(byte_spans(), small)
def test_clamp_keeps_the_bytes_below_the_end(span: ByteSpan, stop: int) -> None:
    kept = span.clamp(stop)
    assert set(range(kept.start, kept.stop)) == {byte for byte in range(span.start, span.stop) if byte < stop}
    assert len(kept) == kept.stop - kept.start


@given(chunk_spans(), chunk_spans())
def test_intersect_is_set_intersection(a: ChunkSpan, b: ChunkSpan) -> None:
    assert set(a.intersect(b)) == set(a) & set(b)
    assert len(a) == len(set(a))


@given(chunk_spans(), small)
def test_contains_agrees_with_iteration(span: ChunkSpan, chunk: int) -> None:
    assert (chunk in span) == (chunk in list(span))
    assert str(chunk) not in span


@pytest.mark.parametrize(
    ("size", "length"),
    [
        (0, MIB),
        (1, MIB),
        (32 * GIB, MIB),
        (32 * GIB + 1, 2 * MIB),
        (64 * GIB, 2 * MIB),
        (64 * GIB + 1, 4 * MIB),
    ],
)
def test_chunk_length_at_the_documented_boundaries(size: int, length: int) -> None:
    assert chunk_length_for(size) == length


@given(st.integers(0, MAX_BLOB_SIZE))
def test_chunk_length_is_the_smallest_that_will_do(size: int) -> None:
    shape = BlobShape.of(size)
    assert shape.chunk_count <= MAX_CHUNKS
    assert shape.chunk_length == MIB or -(-size // (shape.chunk_length // 2)) > MAX_CHUNKS


@pytest.mark.parametrize(
    ("size", "length"), [(-1, 1), (MAX_BLOB_SIZE + 1, MIB), (1, 0), (1, -2), (1, 3 * KIB)]
)
def test_shapes_refuse_impossible_sizes(size: int, length: int) -> None:
    with pytest.raises(ValueError, match=str(size if size < 0 or size > MAX_BLOB_SIZE else length)):
        BlobShape(size, length)


@given(shapes)
def test_chunks_tile_the_blob(shape: BlobShape) -> None:
    tiles = [shape.span_of(chunk) for chunk in shape.chunks]
    assert [byte for tile in tiles for byte in range(tile.start, tile.stop)] == list(range(shape.size))
    assert all(len(tile) == shape.chunk_length for tile in tiles[:-1])
    assert all(1 <= len(tile) <= shape.chunk_length for tile in tiles)
    for outside in (-1, shape.chunk_count):
        with pytest.raises(IndexError):
            shape.span_of(outside)


@given(shapes, byte_spans())
def test_chunks_covering_is_the_fewest(shape: BlobShape, span: ByteSpan) -> None:
    covering = shape.chunks_covering(span)
    wanted = {byte // shape.chunk_length for byte in range(span.start, min(span.stop, shape.size))}
    assert set(covering) == wanted
    assert covering.stop <= shape.chunk_count  # the engine hands it to a ChunkSet of that count


@given(shapes, chunk_spans())
def test_bytes_of_a_run_are_those_of_its_chunks(shape: BlobShape, chunks: ChunkSpan) -> None:
    run = shape.bytes_of(chunks)
    inside = chunks.intersect(shape.chunks)
    assert len(run) == sum(len(shape.span_of(chunk)) for chunk in inside)
    if len(inside):
        assert run.start == shape.span_of(inside.start).start
