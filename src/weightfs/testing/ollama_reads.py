"""What `ollama serve` reads of its models' directory at start and for `ollama list`, done again: run it on a mount.

Rule: it does what the server does, in its order, and nothing else; it never writes. Where the server would write, make
a directory or rename, that is a failure here. Facts are from Ollama's source (server/routes.go `Serve`, fixblobs.go,
manifest/manifest.go and paths.go, server/images.go `GetModel`, fs/gguf), as of 0.40, with OLLAMA_NOPRUNE=1. Of weights
only the GGUF header is read: metadata, the tokenizer included, and tensor infos, through a buffer of 32 KiB.

    python -m weightfs.testing.ollama_reads DIR
"""

from __future__ import annotations

import hashlib
import io
import json
import struct
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final

BUFFER: Final = 32 << 10
LAYER: Final = "application/vnd.ollama.image."
WHOLE: Final = ("template", "prompt", "system", "params", "messages", "license")
_SCALARS: Final = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True, slots=True)
class Header:
    """Of a GGUF file; positions in bytes. `tokenizer` is where the first key of that name begins."""

    architecture: str
    tensors: int
    tokenizer: int
    end: int


@dataclass(frozen=True, slots=True)
class Model:
    """As `ollama list` shows it, and what was read of its weights."""

    name: str
    id: str
    size: int
    headers: tuple[Header, ...]


def read_all(root: Path) -> list[Model]:
    """Every model below an OLLAMA_MODELS. AssertionError, OSError or ValueError: the server would fail, or skip it."""
    blobs = _made(root / "blobs")
    for path in blobs.rglob("*"):
        assert ":" not in path.name, f"{path} would be renamed"
    models: dict[str, Model] = {}
    for directory in ("manifests-v2", "manifests"):
        place = _made(root / directory)
        for path in sorted(place.glob("*/*/*/*")):
            if not path.is_dir():
                model = _model(blobs, place, path)
                models.setdefault(model.name, model)
    return list(models.values())


def _made(path: Path) -> Path:
    assert path.is_dir(), f"{path} would be made"
    return path


def _model(blobs: Path, place: Path, path: Path) -> Model:
    assert path.resolve().is_relative_to(place.resolve()), f"{path} leads out of the directory"
    raw = path.read_bytes()
    manifest: dict[str, Any] = json.loads(raw)
    headers = []
    layers = [*manifest["layers"], manifest["config"]]
    for layer in layers:
        blob = blobs / layer["digest"].replace(":", "-")
        assert blob.stat().st_size == layer["size"], f"{blob} has another size than {path} says"
        kind = str(layer["mediaType"]).removeprefix(LAYER)
        if kind in WHOLE:
            text = blob.read_bytes()
            assert len(text) == layer["size"]
            if kind in ("params", "messages"):
                json.loads(text)
        elif kind in ("model", "projector", "adapter"):
            headers.append(read_header(blob))
    config = blobs / manifest["config"]["digest"].replace(":", "-")
    json.loads(config.read_bytes())
    size = sum(layer["size"] for layer in layers)
    name = "/".join(path.relative_to(place).parts)
    return Model(name, hashlib.sha256(raw).hexdigest()[:12], size, tuple(headers))


def read_header(path: Path) -> Header:
    """The metadata and tensor infos of a GGUF file (ggml-org/ggml, docs/gguf.md)."""
    with path.open("rb", buffering=0) as raw:
        file: BinaryIO = io.BufferedReader(raw, BUFFER)
        magic, _, tensors, pairs = _unpack(file, "<4sIQQ")
        assert magic == b"GGUF", f"{path} is no GGUF file"
        first, architecture = 0, ""
        for _ in range(pairs):
            at = file.tell()
            key = _string(file)
            if key.startswith("tokenizer.") and not first:
                first = at
            value = _value(file, *_unpack(file, "<I"))
            architecture = str(value) if key == "general.architecture" else architecture
        for _ in range(tensors):
            _string(file)
            (dimensions,) = _unpack(file, "<I")
            _unpack(file, f"<{dimensions}QIQ")
        return Header(architecture, tensors, first, file.tell())


def _unpack(file: BinaryIO, form: str) -> tuple[Any, ...]:
    return struct.unpack(form, _exactly(file, struct.calcsize(form)))


def _exactly(file: BinaryIO, count: int) -> bytes:
    data = file.read(count)
    assert len(data) == count, "the file ends early"
    return data


def _string(file: BinaryIO) -> str:
    return _exactly(file, *_unpack(file, "<Q")).decode(errors="replace")


def _value(file: BinaryIO, kind: int) -> object:
    if kind == _STRING:
        return _string(file)
    if kind == _ARRAY:
        inner, count = _unpack(file, "<IQ")
        for _ in range(count):
            _value(file, inner)
        return None
    return _unpack(file, f"<{_SCALARS[kind]}")[0]


def _told(models: Sequence[Model]) -> Iterator[dict[str, Any]]:
    for model in models:
        yield asdict(model)


if __name__ == "__main__":
    sys.stdout.write(json.dumps(list(_told(read_all(Path(sys.argv[1]))))) + "\n")
