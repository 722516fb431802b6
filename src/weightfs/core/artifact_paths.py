"""Which files the layers of an artifact are: Ollama's, Docker Model Runner's, ModelPack's and ORAS' conventions. Pure.

Rule: every path that leaves here passed `check_path`, and no two of one artifact are the same or lie inside one
another. What a publisher names keeps its name or is refused; what nobody names gets a name made of its media type.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from weightfs.core.artifact import TITLE, Artifact, Descriptor
from weightfs.core.manifest import check_path
from weightfs.errors import IntegrityError

_OLLAMA = "application/vnd.ollama.image."
_OLLAMA_NAMED = frozenset({"tensor", "json"})
_OLLAMA_FILES = {
    "model": "model.gguf",
    "projector": "projector.gguf",
    "adapter": "adapter.gguf",
    "params": "params.json",
    "messages": "messages.json",
}

_DOCKER = "application/vnd.docker.ai."
_DOCKER_FILES = {
    f"{_DOCKER}mmproj": "mmproj.gguf",
    f"{_DOCKER}license": "license",
    f"{_DOCKER}chat.template.jinja": "chat_template.jinja",
}
# Of these there may be several, which are shards: llama.cpp and transformers know them by such names.
_DOCKER_SHARDS = {f"{_DOCKER}gguf.v3": "gguf", f"{_DOCKER}safetensors": "safetensors"}
_EMPTY = "application/vnd.oci.empty.v1+json"

_COMPRESSED = re.compile(r".*(?:[+.](?:gzip|gz|zstd|zst|bzip2|bz2|xz|lz4)|[.+-]tgz|/x-gzip|/gzip|/zstd)")
_TAR = re.compile(r".*[./+-]tar")
_UNSAFE = re.compile(r"[^A-Za-z0-9._-]+")
# What oras sets on a directory that it packed; a single file that it pushed is none, though its media type is a tar's.
_UNPACK = "io.deis.oras.content.unpack"
_MAX_MADE_NAME = 80


class Packing(enum.Enum):
    """How a layer holds its files."""

    RAW = enum.auto()
    TAR = enum.auto()
    COMPRESSED = enum.auto()


@dataclass(frozen=True, slots=True)
class LayerFile:
    """A layer and where it is shown; `path` is None for a plain tar, whose members have paths of their own."""

    layer: Descriptor
    path: str | None


def ollama_files(artifact: Artifact, what: str) -> tuple[LayerFile, ...]:
    """The layers of an Ollama model in their order, and its config. IntegrityError for paths that cannot be."""
    paths = Paths(what)
    # First what has a name: a safetensors model has a config.json of its own, and then the image's gives way.
    named = {
        number: paths.take(layer.name)
        for number, layer in enumerate(artifact.layers)
        if layer.media_type.removeprefix(_OLLAMA) in _OLLAMA_NAMED and layer.name
    }
    files = [
        LayerFile(layer, named.get(number) or paths.make(_ollama_name(layer)))
        for number, layer in enumerate(artifact.layers)
    ]
    return (*files, LayerFile(artifact.config, paths.make("config.json")))


def oci_files(artifact: Artifact, what: str) -> tuple[LayerFile, ...]:
    """The layers of an OCI artifact in their order. IntegrityError for compressed layers and impossible paths.

    Paths of tar members are not known here: check them, together with these, in one more `Paths`. A model that Ollama
    made keeps Ollama's names: its manifests lie in any registry.
    """
    if any(layer.media_type.startswith(_OLLAMA) for layer in artifact.layers):
        return ollama_files(artifact, what)
    layers = [layer for layer in artifact.layers if layer.media_type != _EMPTY]
    for layer in layers:
        if packing(layer) is Packing.COMPRESSED:
            raise IntegrityError(
                f"{what} has the compressed layer {layer.digest_text} ({layer.media_type}), of which no part can be "
                "read by itself; ask the publisher for files that are not packed (ModelPack's .raw, oras push FILE) "
                "or for a plain .tar."
            )
    paths = Paths(what)
    given = {
        number: paths.take(layer.file_path)
        for number, layer in enumerate(layers)
        if packing(layer) is Packing.RAW and layer.file_path is not None
    }
    shards = {
        kind: _shard_names(
            ending, sum(1 for n, one in enumerate(layers) if one.media_type == kind and n not in given)
        )
        for kind, ending in _DOCKER_SHARDS.items()
    }
    return tuple(
        LayerFile(
            layer, None if packing(layer) is Packing.TAR else given.get(number) or _made(layer, shards, paths)
        )
        for number, layer in enumerate(layers)
    )


def packing(layer: Descriptor) -> Packing:
    """How a layer holds its files, by its media type and annotations."""
    kind = layer.media_type.lower()
    if _COMPRESSED.fullmatch(kind):
        return Packing.COMPRESSED
    if not _TAR.fullmatch(kind):
        return Packing.RAW
    single = bool(layer.annotations.get(TITLE)) and layer.annotations.get(_UNPACK) != "true"
    return Packing.RAW if single and ".image.layer." in kind else Packing.TAR


class Paths:
    """The paths of one artifact so far."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._files: set[str] = set()
        self._folders: set[str] = set()
        self._counts: dict[str, int] = {}

    def take(self, path: str) -> str:
        """Use this very path. IntegrityError if it is unsafe, or in the way of another."""
        try:
            check_path(path)
        except ValueError as error:
            raise IntegrityError(
                f"{self._what} names a file {_shown(path)}, which is refused: {error}."
            ) from None
        if not self._free(path):
            raise IntegrityError(
                f"{self._what} names the path {_shown(path)} twice, or as a file and a folder."
            )
        self._add(path)
        return path

    def make(self, name: str) -> str:
        """Use this name, or the first of `stem-2.ending`, `stem-3.ending`, … that is free."""
        stem, dot, ending = name.partition(".")
        number = self._counts.get(name, 1)
        path = name
        while number > 1 or not self._free(path):
            number += 1
            path = f"{stem}-{number}{dot}{ending}"
            if self._free(path):
                break
        self._counts[name] = number
        self._add(path)
        return path

    def _free(self, path: str) -> bool:
        return path not in self._files and path not in self._folders and not self._below_file(path)

    def _below_file(self, path: str) -> bool:
        return any(folder in self._files for folder in _folders(path))

    def _add(self, path: str) -> None:
        self._files.add(path)
        self._folders.update(_folders(path))


def _folders(path: str) -> Iterator[str]:
    at = path.find("/")
    while at >= 0:
        yield path[:at]
        at = path.find("/", at + 1)


def _ollama_name(layer: Descriptor) -> str:
    kind = layer.media_type.removeprefix(_OLLAMA)
    return _OLLAMA_FILES.get(kind) or _safe(kind)


def _made(layer: Descriptor, shards: dict[str, Iterator[str]], paths: Paths) -> str:
    kind = layer.media_type
    if kind in shards:
        return paths.make(next(shards[kind]))
    known = _DOCKER_FILES.get(kind)
    if known is not None:
        return paths.make(known)
    # application/vnd.cncf.model.weight.config.v1.raw without a path becomes weight.config
    tail = re.sub(r"application/vnd\.(?:cncf|cnai)\.model\.(.+)\.v1\.raw", r"\1", kind)
    return paths.make(_safe(tail.removeprefix(_DOCKER)))


def _shard_names(ending: str, count: int) -> Iterator[str]:
    names: Iterable[str] = (f"model-{number:05}-of-{count:05}.{ending}" for number in range(1, count + 1))
    return iter([f"model.{ending}"] if count == 1 else names)


def _safe(text: str) -> str:
    """A name made of what a publisher wrote: one component, of harmless characters."""
    return _UNSAFE.sub("-", text)[:_MAX_MADE_NAME].strip(".-") or "layer"


def _shown(path: str) -> str:
    return ascii(path if len(path) <= 100 else path[:100] + "…")
