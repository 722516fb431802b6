"""What headers say about a model, and how much of any span is there."""

from __future__ import annotations

import json
from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weightfs.core.chunkset import ChunkSet
from weightfs.core.geometry import BlobShape, ByteSpan
from weightfs.core.tensors import (
    Coverage,
    Header,
    ModelInfo,
    Scalar,
    Tensor,
    by_layer,
    describe,
    dominant_dtype,
    is_model_file,
    layer_of,
    models_of,
    read_shards,
)


def tensor(
    name: str, dtype: str = "F32", shape: tuple[int, ...] = (4,), start: int = 0, nbytes: int = 16
) -> Tensor:
    return Tensor(name, dtype, shape, ByteSpan(start, start + nbytes))


def header(*tensors: Tensor, kind: str = "gguf", metadata: Mapping[str, Scalar] | None = None) -> Header:
    return Header(kind, metadata or {}, tensors, 0)


LLAMA: dict[str, Scalar] = {
    "general.architecture": "llama",
    "general.file_type": "Q4_K_M",
    "llama.context_length": 8192,
}


def test_a_gguf_file() -> None:
    info = describe([header(tensor("a", "Q4_K", (256, 2), nbytes=288), tensor("b"), metadata=LLAMA)])
    assert info == ModelInfo("gguf", "llama", "Q4_K_M", 8192, 516, 2, 304)


def test_shards_are_one_model_and_the_first_that_knows_tells() -> None:
    info = describe([header(tensor("b")), header(tensor("a"), metadata=LLAMA), header(tensor("c"))])
    assert info == ModelInfo("gguf", "llama", "Q4_K_M", 8192, 12, 3, 48)


def test_without_a_file_type_the_most_bytes_say_it() -> None:
    tensors = (tensor("a", "F16", nbytes=10), tensor("b", "Q8_0", nbytes=30), tensor("c", "F32", nbytes=20))
    assert (
        describe(
            [header(*tensors, metadata={"general.architecture": "x", "general.file_type": 77})]
        ).quantisation
        == "Q8_0"
    )
    assert describe([header(*tensors)]) == ModelInfo("gguf", "", "Q8_0", None, 12, 3, 60)
    assert dominant_dtype([]) == ""
    assert dominant_dtype([tensor("a", "B"), tensor("b", "A")]) == "A"


CONFIGS = [
    ({"architectures": ["LlamaForCausalLM"], "max_position_embeddings": 4096}, "LlamaForCausalLM", 4096),
    ({"architectures": [], "model_type": "qwen3"}, "qwen3", None),
    ({"model_type": "m", "text_config": {"max_position_embeddings": 99}}, "m", 99),
    ({"text_config": 5, "architectures": 5, "model_type": "a\x1b[2J"}, "", None),
    ({"model_type": "x" * 201, "max_position_embeddings": True}, "", None),
    ({"max_position_embeddings": 2**70}, "", None),
    ({"max_position_embeddings": -1}, "", None),
    ([], "", None),
]


@pytest.mark.parametrize(("config", "architecture", "context"), CONFIGS)
def test_safetensors_with_a_config(config: object, architecture: str, context: int | None) -> None:
    info = describe([header(tensor("a", "BF16"), kind="safetensors")], json.dumps(config).encode())
    assert (info.format, info.architecture, info.quantisation) == ("safetensors", architecture, "BF16")
    assert info.context_length == context


@pytest.mark.parametrize("config", [b"", b"{", b"[" * 100_000, b" " * (1 << 21) + b"{}", b"\xff\xfe"])
def test_a_config_that_is_none(config: bytes) -> None:
    assert describe([header(kind="safetensors")], config) == ModelInfo("safetensors", "", "", None, 0, 0, 0)
    assert read_shards(config) == frozenset()


def test_which_files_make_a_model() -> None:
    paths = ["README.md", "b-00002-of-00002.gguf", "b-00001-of-00002.gguf", "mmproj.GGUF", "x/m.safetensors"]
    assert models_of(paths) == {
        "b.gguf": ("b-00001-of-00002.gguf", "b-00002-of-00002.gguf"),
        "mmproj.GGUF": ("mmproj.GGUF",),
        "x/m.safetensors": ("x/m.safetensors",),
    }
    assert not is_model_file("m.gguf.meta4")


def test_a_list_of_shards_says_what_belongs_together() -> None:
    listed = read_shards(
        json.dumps({"weight_map": {"t": "one.safetensors", "u": "two.safetensors", "v": 3}}).encode()
    )
    assert listed == {"one.safetensors", "two.safetensors"}
    assert read_shards(b'{"weight_map": []}') == frozenset()
    paths = ["one.safetensors", "two.safetensors", "d/one.safetensors", "d/three.safetensors"]
    shards = {"model.safetensors.index.json": listed, "d/model.safetensors.index.json": listed}
    assert models_of(paths, shards) == {
        "d/model.safetensors": ("d/one.safetensors",),
        "d/three.safetensors": ("d/three.safetensors",),
        "model.safetensors": ("one.safetensors", "two.safetensors"),
    }


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("blk.12.attn_q.weight", "blk.12"),
        ("v.blk.3.ln1.bias", "v.blk.3"),
        ("model.layers.7.mlp.experts.5.up_proj.weight", "model.layers.7"),
        ("transformer.h.0.attn.bias", "transformer.h.0"),
        ("token_embd.weight", "token_embd"),
        ("model.embed_tokens.weight", "model.embed_tokens"),
        ("0.weight", "0"),
        ("scales.1", "scales"),
        ("weight", "weight"),
        ("", ""),
    ],
)
def test_layers(name: str, layer: str) -> None:
    assert layer_of(name) == layer


def test_layers_come_in_the_order_of_their_bytes() -> None:
    names = ["embd.weight", "blk.10.a", "blk.9.a", "blk.10.b"]
    assert {layer: [one.name for one in them] for layer, them in by_layer(map(tensor, names)).items()} == {
        "embd": ["embd.weight"],
        "blk.10": ["blk.10.a", "blk.10.b"],
        "blk.9": ["blk.9.a"],
    }
    assert list(by_layer(map(tensor, names))) == ["embd", "blk.10", "blk.9"]


@given(st.integers(0, 100), st.sampled_from([1, 2, 4, 8]), st.data())
def test_coverage_counts_bytes(size: int, length: int, draws: st.DataObject) -> None:
    shape = BlobShape(size, length)
    chunks = draws.draw(st.sets(st.integers(0, max(0, shape.chunk_count - 1)), max_size=shape.chunk_count))
    coverage = Coverage(ChunkSet(shape.chunk_count, chunks), shape)
    present = {byte for chunk in chunks for byte in range(chunk * length, min(size, (chunk + 1) * length))}
    start = draws.draw(st.integers(0, size))
    stop = draws.draw(st.integers(start, size))
    assert coverage.within(ByteSpan(start, stop)) == sum(byte in present for byte in range(start, stop))
