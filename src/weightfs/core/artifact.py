"""The manifests of container registries, read strictly: what an artifact is made of. Pure.

Rule: an `Artifact` or `Index` that exists is sound: digests are SHA-256, sizes are within bounds, one digest has one
size. Everything else is an `IntegrityError` of one sentence, whatever the bytes were. Unknown fields are ignored, as
the OCI image specification asks ("Extensibility"); so are `urls` and `data` of a descriptor: bytes come from the
registry.

Read are Docker's image manifest version 2, schema 2 and manifest list, and OCI's image manifest and image index.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Final

from weightfs.core.geometry import MAX_BLOB_SIZE, MIB
from weightfs.errors import IntegrityError

MAX_MANIFEST_BYTES: Final = 16 * MIB
# Ollama keeps a safetensors model as a layer per tensor: the largest published ones have some ten thousands.
MAX_LAYERS: Final = 32_768
MAX_MANIFESTS: Final = 1_000  # of an index: one per platform or variant
# Objects and lists, and values, of a document: several times what MAX_LAYERS layers with annotations have. Counted
# before anything is made of them: 16 MiB of "{}," would become 400 MB of empty objects.
MAX_OBJECTS: Final = 4 * MAX_LAYERS
MAX_VALUES: Final = 32 * MAX_LAYERS
MAX_ANNOTATION_CHARS: Final = 16_384  # of one value; ModelPack puts a file's metadata into one

DOCKER_MANIFEST: Final = "application/vnd.docker.distribution.manifest.v2+json"
DOCKER_INDEX: Final = "application/vnd.docker.distribution.manifest.list.v2+json"
OCI_MANIFEST: Final = "application/vnd.oci.image.manifest.v1+json"
OCI_INDEX: Final = "application/vnd.oci.image.index.v1+json"

_MANIFESTS = frozenset({DOCKER_MANIFEST, OCI_MANIFEST})
_INDEXES = frozenset({DOCKER_INDEX, OCI_INDEX})
_MEDIA_TYPE = re.compile(r"[A-Za-z0-9][A-Za-z0-9!#$&^_.+-]{0,126}/[A-Za-z0-9][A-Za-z0-9!#$&^_.+-]{0,126}")
_ALGORITHM = re.compile(r"([a-z0-9]+(?:[+._-][a-z0-9]+)*):.*", re.DOTALL)
_SHA256 = re.compile(r"sha256:([0-9a-f]{64})")

# What says that an artifact is a model: the type of the artifact, of its config, or of a layer begins so.
_MODEL_TYPES = (
    "application/vnd.docker.ai.",
    "application/vnd.cncf.model.",
    "application/vnd.cnai.model.",
    "application/vnd.ollama.image.",
)
_MODEL_FILES = (".gguf", ".safetensors")
TITLE: Final = "org.opencontainers.image.title"
FILE_PATHS: Final = ("org.cncf.model.filepath", "org.cnai.model.filepath", TITLE)
_NOTHING: Mapping[str, str] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Descriptor:
    """One blob of an artifact, or one manifest of an index. `digest`: the 32 bytes of a SHA-256; `size` in bytes.

    `name` is what Ollama gives to tensors and JSON files. The media type is without parameters.
    """

    media_type: str
    digest: bytes
    size: int
    annotations: Mapping[str, str] = field(default_factory=lambda: _NOTHING)
    artifact_type: str = ""
    name: str = ""

    @property
    def digest_text(self) -> str:
        """`sha256:<hex>`."""
        return f"sha256:{self.digest.hex()}"

    @property
    def file_path(self) -> str | None:
        """The path that the annotations give it, unchecked; None if they give none."""
        return next((self.annotations[key] for key in FILE_PATHS if self.annotations.get(key)), None)


@dataclass(frozen=True, slots=True)
class Artifact:
    """A manifest: layers in their order, and the config."""

    artifact_type: str
    config: Descriptor
    layers: tuple[Descriptor, ...]

    @property
    def is_model(self) -> bool:
        """Whether its types, or the names of its files, say that it is a model."""
        types = (self.artifact_type, self.config.media_type, *(layer.media_type for layer in self.layers))
        return any(kind.startswith(_MODEL_TYPES) for kind in types) or any(
            (layer.file_path or "").endswith(_MODEL_FILES) for layer in self.layers
        )


@dataclass(frozen=True, slots=True)
class Index:
    """A list of manifests of one name; nested indexes are left out."""

    manifests: tuple[Descriptor, ...]


def parse_digest(value: object, what: str) -> bytes:
    """The 32 bytes of `sha256:<64 lower-case hex digits>`. IntegrityError, which names another algorithm."""
    text = value if isinstance(value, str) else ""
    found = _SHA256.fullmatch(text)
    if found is not None:
        return bytes.fromhex(found[1])
    algorithm = _ALGORITHM.fullmatch(text)
    if algorithm is not None and algorithm[1] != "sha256":
        raise IntegrityError(
            f"{what} has a digest of the algorithm {algorithm[1][:40]!r}; weightfs can check sha256 only."
        )
    raise IntegrityError(
        f"{what} has the digest {_shown(value)}; it must be sha256: and 64 lower-case hex digits."
    )


def parse_manifest(raw: bytes, what: str, content_type: str = "") -> Artifact | Index:
    """Read a manifest's bytes. IntegrityError, which begins with `what`.

    `content_type` is the registry's header: it counts where the document does not say its type, which OCI allows.
    """
    document = _object(_json(raw, what), what)
    version = document.get("schemaVersion")
    if type(version) is not int or version != 2:
        raise IntegrityError(f"{what} has the schema version {_shown(version)}; only 2 can be read.")
    kind = _media_type(document.get("mediaType"), what) or content_type.partition(";")[0].strip()
    has_layers, has_manifests = "layers" in document, "manifests" in document
    # Both: readers would disagree about what it is (CVE-2021-41190).
    if has_layers == has_manifests or "fsLayers" in document:
        raise IntegrityError(
            f"{what} is neither a manifest nor an index: one of layers and manifests belongs in it."
        )
    if kind in _MANIFESTS | _INDEXES and (kind in _INDEXES) != has_manifests:
        raise IntegrityError(f"{what} is not what its media type {kind} says.")
    if document.get("mediaType") is not None and kind not in _MANIFESTS | _INDEXES:
        raise IntegrityError(f"{what} has the media type {kind[:100]!r}, which weightfs cannot read.")
    return _index(document, what) if has_manifests else _artifact(document, what)


def choose(candidates: Iterable[Descriptor], what: str) -> Descriptor:
    """The one model of an index. IntegrityError if there is none, or if several make it the user's choice."""
    models = {candidate.digest: candidate for candidate in candidates}
    if not models:
        raise IntegrityError(
            f"{what} is an index with no usable artifact: none of its manifests is a model; name another tag."
        )
    if len(models) > 1:
        listed = ", ".join(model.digest_text for model in list(models.values())[:16])
        raise IntegrityError(
            f"{what} is an index of {len(models)} models; name one by its digest, as in name@{listed}."
        )
    return next(iter(models.values()))


def is_model_type(artifact_type: str) -> bool:
    """Whether an `artifactType` is that of a model."""
    return artifact_type.startswith(_MODEL_TYPES)


def _artifact(document: dict[str, Any], what: str) -> Artifact:
    layers = _list(document["layers"], f"the layers of {what}", MAX_LAYERS)
    artifact = Artifact(
        _media_type(document.get("artifactType"), what),
        _descriptor(document.get("config"), f"the config of {what}"),
        tuple(_descriptor(layer, f"layer {number} of {what}") for number, layer in enumerate(layers)),
    )
    sizes: dict[bytes, int] = {}
    for part in (artifact.config, *artifact.layers):
        if sizes.setdefault(part.digest, part.size) != part.size:
            raise IntegrityError(f"{what} gives two sizes to {part.digest_text}.")
    return artifact


def _index(document: dict[str, Any], what: str) -> Index:
    listed = _list(document["manifests"], f"the manifests of {what}", MAX_MANIFESTS)
    found = [_descriptor(item, f"manifest {number} of {what}") for number, item in enumerate(listed)]
    return Index(tuple(item for item in found if item.media_type in _MANIFESTS))


def _descriptor(value: object, what: str) -> Descriptor:
    fields = _object(value, what)
    media_type = _media_type(fields.get("mediaType"), what)
    if not media_type:
        raise IntegrityError(f"{what} has no media type.")
    size = fields.get("size")
    if type(size) is not int or not 0 <= size <= MAX_BLOB_SIZE:
        raise IntegrityError(f"{what} has the size {_shown(size)}; 0 to {MAX_BLOB_SIZE} bytes can be.")
    name = fields.get("name") or ""
    if not isinstance(name, str):
        raise IntegrityError(f"{what} has a name that is no text.")
    return Descriptor(
        media_type,
        parse_digest(fields.get("digest"), what),
        size,
        _annotations(fields.get("annotations"), what),
        _media_type(fields.get("artifactType"), what),
        name,
    )


def _annotations(value: object, what: str) -> Mapping[str, str]:
    if value is None:
        return _NOTHING
    annotations = _object(value, f"the annotations of {what}")
    for key, text in annotations.items():
        if not isinstance(text, str) or len(text) > MAX_ANNOTATION_CHARS:
            raise IntegrityError(f"{what} has an annotation {_shown(key)} that is no text, or too long.")
    return MappingProxyType(annotations)


def _media_type(value: object, what: str) -> str:
    """Without parameters; empty where there is none."""
    if value is None or value == "":
        return ""
    text = value.partition(";")[0].strip() if isinstance(value, str) else ""
    if not _MEDIA_TYPE.fullmatch(text):
        raise IntegrityError(f"{what} has the media type {_shown(value)}, which is none.")
    return text


def _object(value: object, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise IntegrityError(f"{what} is no JSON object.")
    return value


def _list(value: object, what: str, most: int) -> list[Any]:
    items = [] if value is None else value  # Go writes an empty list as null
    if not isinstance(items, list):
        raise IntegrityError(f"{what} are no JSON list.")
    if len(items) > most:
        raise IntegrityError(f"{what} are {len(items)}; {most} are allowed.")
    return items


def _json(raw: bytes, what: str) -> object:
    if len(raw) > MAX_MANIFEST_BYTES:
        raise IntegrityError(f"{what} has {len(raw)} bytes; {MAX_MANIFEST_BYTES} are allowed.")
    if raw.count(b"{") + raw.count(b"[") > MAX_OBJECTS or raw.count(b",") > MAX_VALUES:
        raise IntegrityError(f"{what} has more parts than {MAX_LAYERS} layers need; so many are allowed.")
    try:
        return json.loads(raw.decode(), object_pairs_hook=_pairs, parse_constant=_no_constant)
    except RecursionError:
        raise IntegrityError(f"{what} is nested too deeply.") from None
    except ValueError as error:  # UnicodeDecodeError and JSONDecodeError are such
        raise IntegrityError(f"{what} is not JSON: {str(error)[:100]}.") from None


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise ValueError("a key occurs twice in one object")
    return fields


def _no_constant(name: str) -> object:
    raise ValueError(f"{name} is no JSON number")


def _shown(value: object) -> str:
    if isinstance(value, int | float | str | None):
        text = value[:80] if isinstance(value, str) else value
        return ascii(text)[:100]
    return f"of type {type(value).__name__}"
