"""Small models that real runtimes really load: random weights, a byte tokenizer, deterministic for a seed.

Rule: a GGUF and a safetensors file made with the same `ModelShape` hold the same tensors of the same layers,
so what is measured on one can be compared with the other. numpy and gguf are needed here, and only here, of
the shipped code: they come with the development environment.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

LETTERS = [bytes([code]) for code in range(ord("a"), ord("z") + 1)]
TOKENS = [
    b"<unk>",
    b"<s>",
    b"</s>",
    *(b"<0x%02X>" % byte for byte in range(256)),
    "\u2581".encode(),
    *LETTERS,
]
# llama.cpp's token types: 1 normal, 2 unknown, 3 control, 6 byte (gguf.TokenType)
TOKEN_TYPES = [2, 3, 3, *[6] * 256, *[1] * (1 + len(LETTERS))]

# Safetensors: the header is padded so that the data starts aligned, as `safetensors.save_file` does.
HEADER_ALIGNMENT = 64


@dataclass(frozen=True, slots=True)
class ModelShape:
    """A llama-like architecture. The default makes files of about 0.5 MB; `DEMO_SHAPE` of 257 MB."""

    dim: int = 64
    layers: int = 2
    heads: int = 4
    ff: int = 128
    context: int = 512
    half: bool = False  # float16 weights instead of float32
    seed: int = 0

    @property
    def dtype(self) -> type[np.float16 | np.float32]:
        """Of the weight matrices; norms are float32 in the GGUF, as llama.cpp demands."""
        return np.float16 if self.half else np.float32


DEMO_SHAPE = ModelShape(dim=1024, layers=8, heads=16, ff=4096, half=True)


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor by its name in both worlds; a norm is all ones, everything else is random."""

    gguf_name: str
    hf_name: str
    shape: tuple[int, ...]
    norm: bool = False


def tensors_of(shape: ModelShape) -> list[Tensor]:
    """Every tensor, layer after layer, in the order in which both files hold them."""
    dim, ff = shape.dim, shape.ff
    found = [Tensor("token_embd.weight", "model.embed_tokens.weight", (len(TOKENS), dim))]
    for layer in range(shape.layers):
        block, hf = f"blk.{layer}.", f"model.layers.{layer}."
        found += [
            Tensor(f"{block}attn_norm.weight", f"{hf}input_layernorm.weight", (dim,), norm=True),
            Tensor(f"{block}ffn_norm.weight", f"{hf}post_attention_layernorm.weight", (dim,), norm=True),
            Tensor(f"{block}attn_q.weight", f"{hf}self_attn.q_proj.weight", (dim, dim)),
            Tensor(f"{block}attn_k.weight", f"{hf}self_attn.k_proj.weight", (dim, dim)),
            Tensor(f"{block}attn_v.weight", f"{hf}self_attn.v_proj.weight", (dim, dim)),
            Tensor(f"{block}attn_output.weight", f"{hf}self_attn.o_proj.weight", (dim, dim)),
            Tensor(f"{block}ffn_gate.weight", f"{hf}mlp.gate_proj.weight", (ff, dim)),
            Tensor(f"{block}ffn_up.weight", f"{hf}mlp.up_proj.weight", (ff, dim)),
            Tensor(f"{block}ffn_down.weight", f"{hf}mlp.down_proj.weight", (dim, ff)),
        ]
    found += [
        Tensor("output_norm.weight", "model.norm.weight", (dim,), norm=True),
        Tensor("output.weight", "lm_head.weight", (len(TOKENS), dim)),
    ]
    return found


def _values(shape: ModelShape) -> Iterator[tuple[Tensor, Array]]:
    random = np.random.default_rng(shape.seed)
    for tensor in tensors_of(shape):
        if tensor.norm:
            yield tensor, np.ones(tensor.shape, np.float32)
        else:
            yield tensor, (random.standard_normal(tensor.shape, np.float32) * 0.02).astype(shape.dtype)


def make_gguf(path: Path, shape: ModelShape = ModelShape()) -> None:
    """Write a llama-architecture GGUF to `path` that llama.cpp loads and generates from."""
    import gguf

    out = gguf.GGUFWriter(path, "llama")
    out.add_name("tiny-random")
    out.add_vocab_size(len(TOKENS))
    out.add_context_length(shape.context)
    out.add_embedding_length(shape.dim)
    out.add_block_count(shape.layers)
    out.add_feed_forward_length(shape.ff)
    out.add_head_count(shape.heads)
    out.add_head_count_kv(shape.heads)
    out.add_layer_norm_rms_eps(1e-5)
    out.add_rope_dimension_count(shape.dim // shape.heads)
    out.add_tokenizer_model("llama")
    out.add_tokenizer_pre("default")
    out.add_token_list(TOKENS)
    out.add_token_scores([0.0] * len(TOKENS))
    out.add_token_types(TOKEN_TYPES)
    out.add_bos_token_id(1)
    out.add_eos_token_id(2)
    out.add_unk_token_id(0)
    for tensor, values in _values(shape):
        out.add_tensor(tensor.gguf_name, values)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()


def make_safetensors(path: Path, shape: ModelShape = ModelShape()) -> None:
    """Write the same tensors to `path` under their Hugging Face names, one layer after the other."""
    kind, width = ("F16", 2) if shape.half else ("F32", 4)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors_of(shape):
        stop = offset + width * int(np.prod(tensor.shape))
        header[tensor.hf_name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": [offset, stop]}
        offset = stop
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % HEADER_ALIGNMENT)
    with path.open("wb") as out:
        out.write(struct.pack("<Q", len(text)) + text)
        for _, values in _values(shape):
            out.write(np.ascontiguousarray(values, shape.dtype).data)


def layer_names(shape: ModelShape, layer: int) -> list[str]:
    """The Hugging Face names of one layer's tensors, in file order."""
    prefix = f"model.layers.{layer}."
    return [tensor.hf_name for tensor in tensors_of(shape) if tensor.hf_name.startswith(prefix)]
