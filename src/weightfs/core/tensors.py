"""Models as their headers describe them: tensors and where each lies, what a model is, how much of it is cached. Pure.

Rule: a `Header` that exists is sound: its tensors are in the order of their bytes, none overlaps another, and each lies
inside the file. `core/gguf.py` and `core/safetensors.py` make them, and share the words and bounds that are here.

A parser is given the first bytes of a file and the file's size. It answers with a `Header`, or with how many bytes it
needs at least (always more than it was given, never more than there are), or raises `HeaderError`. It never reads
by itself, so it can be used on a file of which only the head is there.
"""

from __future__ import annotations

import json
import math
import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from weightfs.core.chunkset import ChunkSet
from weightfs.core.geometry import MIB, BlobShape, ByteSpan

# Of one file. The largest models have some 90,000 tensors in all, spread over many files.
MAX_TENSORS: Final = 131_072
MAX_NAME_BYTES: Final = 1024  # ggml has room for 63; other writers are less modest
MAX_ELEMENTS: Final = (1 << 63) - 1  # ggml and safetensors both count them in 64 bits
MAX_JSON_BYTES: Final = MIB  # of config.json and of a list of shards: as Python objects some 30 times as much

_SHARD: Final = re.compile(r"-\d{5}-of-\d{5}(?=\.(?:gguf|safetensors)$)", re.IGNORECASE)
_LAYER: Final = re.compile(r".*?\.[0-9]+(?=\.)|[0-9]+(?=\.)")

Scalar = str | int | float | bool


class HeaderError(ValueError):
    """A header that is malformed, hostile, or of a kind that weightfs does not read. Its text is one clause."""


@dataclass(frozen=True, slots=True)
class NeedMore:
    """The header is not whole yet: the first `nbytes` of the file are needed, at least."""

    nbytes: int


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor. `shape` is as the file has it: GGUF names the contiguous dimension first, safetensors last.

    `span` counts from the beginning of the file.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    span: ByteSpan

    @property
    def elements(self) -> int:
        """How many there are; 1 for a scalar."""
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class Header:
    """What the head of a model file says. `tensors` are in the order of their bytes; `nbytes` is where data begins.

    `metadata` has the scalars and the short strings; lists, such as a vocabulary, are left out.
    """

    format: str  # gguf or safetensors
    metadata: Mapping[str, Scalar]
    tensors: tuple[Tensor, ...]
    nbytes: int


def checked_name(raw: bytes) -> str:
    """A tensor's name. HeaderError."""
    if len(raw) > MAX_NAME_BYTES:
        raise HeaderError(f"a tensor's name has over {MAX_NAME_BYTES} bytes")
    try:
        return raw.decode()
    except UnicodeDecodeError:
        raise HeaderError("a tensor's name is not valid UTF-8") from None


# ---- which files make a model


def is_model_file(path: str) -> bool:
    """Whether a file has a header that is read here."""
    return path.lower().endswith((".gguf", ".safetensors"))


def models_of(paths: Iterable[str], shards: Mapping[str, Iterable[str]] = {}) -> dict[str, tuple[str, ...]]:
    """Model files by the model that they are part of, whose name is the file's without the number of the shard.

    Args:
        paths: Of one manifest.
        shards: What each list of shards (`read_shards`) names, by the path of the list: those make one model.
    """
    named: dict[str, str] = {}
    for listing, files in shards.items():
        folder = listing.rpartition("/")[0]
        for file in files:
            named[f"{folder}/{file}" if folder else file] = listing.removesuffix(".index.json")
    models: dict[str, list[str]] = {}
    for path in sorted(path for path in paths if is_model_file(path)):
        models.setdefault(named.get(path) or _SHARD.sub("", path), []).append(path)
    return {name: tuple(files) for name, files in models.items()}


def read_shards(data: bytes) -> frozenset[str]:
    """The files that a `*.safetensors.index.json` names; none if it is not one. Never fails."""
    document = _json_object(data)
    listed = document.get("weight_map")
    if not isinstance(listed, dict):
        return frozenset()
    return frozenset(file for file in listed.values() if isinstance(file, str))


def _json_object(data: bytes) -> dict[str, Any]:
    if len(data) > MAX_JSON_BYTES:
        return {}
    try:
        document = json.loads(data)
    except (ValueError, RecursionError):
        return {}
    return document if isinstance(document, dict) else {}


# ---- what a model is


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """A model, over all its files that have been looked at. Empty texts and None: nobody says.

    `parameter_count` counts the elements of its tensors. Where several weights are packed into one element (GPTQ, AWQ),
    there are more weights than that.
    """

    format: str
    architecture: str
    quantisation: str
    context_length: int | None
    parameter_count: int
    tensor_count: int
    tensor_bytes: int


def describe(headers: Sequence[Header], config: bytes = b"") -> ModelInfo:
    """What the headers of one model's files say together; of safetensors also its `config.json`, if it is there.

    GGUF: `general.architecture`, `general.file_type` and `<architecture>.context_length`, from the first shard
    that says so. Where no file type is given, and for safetensors, the quantisation is the type that most bytes have.
    """
    formats = sorted({header.format for header in headers})
    found = (_from_metadata(headers) if formats == ["gguf"] else None) or _from_config(_json_object(config))
    architecture, quantisation, context = found
    tensors = [tensor for header in headers for tensor in header.tensors]
    return ModelInfo(
        format=" ".join(formats),
        architecture=architecture,
        quantisation=quantisation or dominant_dtype(tensors),
        context_length=context,
        parameter_count=sum(tensor.elements for tensor in tensors),
        tensor_count=len(tensors),
        tensor_bytes=sum(len(tensor.span) for tensor in tensors),
    )


def dominant_dtype(tensors: Iterable[Tensor]) -> str:
    """The type that most bytes have; empty if there is none."""
    counts: Counter[str] = Counter()
    for tensor in tensors:
        counts[tensor.dtype] += len(tensor.span)
    return min(counts, key=lambda dtype: (-counts[dtype], dtype), default="")


_Found = tuple[str, str, int | None]


def _from_metadata(headers: Sequence[Header]) -> _Found | None:
    for header in headers:
        architecture = _text(header.metadata.get("general.architecture"))
        if architecture:
            quantisation = _text(header.metadata.get("general.file_type"))
            context = _count(header.metadata.get(f"{architecture}.context_length"))
            return architecture, quantisation, context
    return None


def _from_config(document: Mapping[str, Any]) -> _Found:
    architectures = document.get("architectures")
    first = architectures[0] if isinstance(architectures, list) and architectures else None
    architecture = _text(first) or _text(document.get("model_type"))
    # Models that also see or hear keep what concerns text apart.
    inner = document.get("text_config")
    context = _count(document.get("max_position_embeddings"))
    if context is None and isinstance(inner, dict):
        context = _count(inner.get("max_position_embeddings"))
    return architecture, "", context


def _text(value: object) -> str:
    """A short text that can be printed and encoded, else an empty one."""
    return value if isinstance(value, str) and len(value) <= 200 and value.isprintable() else ""


def _count(value: object) -> int | None:
    good = isinstance(value, int) and not isinstance(value, bool) and 0 < value < 1 << 63
    return value if good else None  # type: ignore[return-value]  # `good` says that it is an int


# ---- by layer


def layer_of(name: str) -> str:
    """A tensor's layer: its name up to the first number (`blk.3`, `model.layers.3`), else without its last part."""
    found = _LAYER.match(name)
    if found is not None:
        return found[0]
    return name.rpartition(".")[0] or name


def by_layer(tensors: Iterable[Tensor]) -> dict[str, list[Tensor]]:
    """Tensors by layer, in the order in which the layers begin."""
    layers: dict[str, list[Tensor]] = {}
    for tensor in tensors:
        layers.setdefault(layer_of(tensor.name), []).append(tensor)
    return layers


# ---- how much of it is there


class Coverage:
    """How many bytes of any span of a blob are in chunks of a set: two binary searches over the set's runs each."""

    def __init__(self, chunks: ChunkSet, shape: BlobShape) -> None:
        self._starts: list[int] = []
        self._stops: list[int] = []
        self._before: list[int] = []  # bytes in the runs before each
        total = 0
        for run in chunks.runs():
            span = shape.bytes_of(run)
            self._starts.append(span.start)
            self._stops.append(span.stop)
            self._before.append(total)
            total += len(span)

    def within(self, span: ByteSpan) -> int:
        """The bytes of `span` that are there."""
        return self._below(span.stop) - self._below(span.start)

    def _below(self, offset: int) -> int:
        run = bisect_right(self._starts, offset) - 1
        if run < 0:
            return 0
        return self._before[run] + min(offset, self._stops[run]) - self._starts[run]
