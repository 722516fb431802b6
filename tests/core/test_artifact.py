"""Manifests of registries: what is read from sound ones, and that nothing else passes or raises anything else."""

from __future__ import annotations

import contextlib
import json
import tracemalloc
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weightfs.core.artifact import (
    DOCKER_INDEX,
    DOCKER_MANIFEST,
    MAX_LAYERS,
    MAX_MANIFEST_BYTES,
    OCI_INDEX,
    OCI_MANIFEST,
    Artifact,
    Descriptor,
    Index,
    choose,
    is_model_type,
    parse_digest,
    parse_manifest,
)
from weightfs.core.artifact_paths import oci_files, ollama_files
from weightfs.core.geometry import MAX_BLOB_SIZE
from weightfs.errors import IntegrityError

A, B = "sha256:" + "a" * 64, "sha256:" + "b" * 64
CONFIG = {"mediaType": "application/vnd.docker.container.image.v1+json", "digest": A, "size": 5}
LAYER = {"mediaType": "application/vnd.ollama.image.model", "digest": B, "size": 9}


def manifest(**changes: Any) -> dict[str, Any]:
    document = {
        "schemaVersion": 2,
        "mediaType": DOCKER_MANIFEST,
        "config": CONFIG,
        "layers": [LAYER],
        **changes,
    }
    return {key: value for key, value in document.items() if value != "absent"}


def layer(**changes: Any) -> dict[str, Any]:
    return {key: value for key, value in {**LAYER, **changes}.items() if value != "absent"}


def parse(document: object, content_type: str = "") -> Artifact | Index:
    return parse_manifest(json.dumps(document).encode(), "M", content_type)


def test_a_manifest_of_ollama_is_read() -> None:
    named = layer(mediaType="application/vnd.ollama.image.tensor; q=1", name="a.weight", **{"from": "/x"})
    artifact = parse(manifest(layers=[LAYER, named], annotations=None, subject={"x": 1}))
    assert isinstance(artifact, Artifact)
    assert artifact.config == Descriptor(CONFIG["mediaType"], bytes.fromhex("a" * 64), 5)  # type: ignore[arg-type]
    first, second = artifact.layers
    assert first.digest_text == B
    assert (second.media_type, second.name) == ("application/vnd.ollama.image.tensor", "a.weight")
    assert artifact.is_model


def test_annotations_name_files_in_their_order() -> None:
    keys = ("org.cncf.model.filepath", "org.cnai.model.filepath", "org.opencontainers.image.title")
    for number, key in enumerate(keys):
        annotations = {later: later for later in keys[number:]}
        artifact = parse(manifest(layers=[layer(annotations=annotations)]))
        assert isinstance(artifact, Artifact)
        assert artifact.layers[0].file_path == key
    artifact = parse(manifest(layers=[layer(annotations={keys[0]: ""})]))
    assert isinstance(artifact, Artifact)
    assert artifact.layers[0].file_path is None


def test_an_index_is_read_and_nested_ones_left_out() -> None:
    kind = "application/vnd.cncf.model.manifest.v1+json"
    item = {"mediaType": OCI_MANIFEST, "digest": A, "size": 1, "artifactType": kind}
    listed = [item, {**item, "mediaType": DOCKER_INDEX}]
    index = parse({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": listed})
    assert isinstance(index, Index)
    (only,) = index.manifests
    assert is_model_type(only.artifact_type)


@pytest.mark.parametrize("kind", [OCI_MANIFEST, OCI_MANIFEST + "; charset=utf-8", "application/json", ""])
def test_the_type_may_be_said_by_the_header_alone(kind: str) -> None:
    assert isinstance(parse(manifest(mediaType="absent"), kind), Artifact)
    assert parse(manifest(mediaType="absent", layers=None), kind) == Artifact("", parse_config(), ())


def parse_config() -> Descriptor:
    artifact = parse(manifest())
    assert isinstance(artifact, Artifact)
    return artifact.config


BAD: list[tuple[object, str]] = [
    ([], "no JSON object"),
    (manifest(schemaVersion=1, fsLayers=[]), "schema version 1"),
    (manifest(schemaVersion=True), "schema version True"),
    (manifest(schemaVersion=2.0), "schema version 2.0"),
    (manifest(schemaVersion="absent"), "schema version None"),
    (manifest(schemaVersion=[]), "schema version of type list"),
    (manifest(manifests=[]), "neither a manifest nor an index"),
    (manifest(layers="absent"), "neither a manifest nor an index"),
    (manifest(fsLayers=[]), "neither a manifest nor an index"),
    (manifest(mediaType=OCI_INDEX), "not what its media type"),
    (manifest(mediaType="application/vnd.oci.artifact.manifest.v1+json"), "which weightfs cannot read"),
    (manifest(mediaType=7), "media type 7, which is none"),
    (manifest(mediaType="no type"), "which is none"),
    (manifest(config="absent"), "config of M is no JSON object"),
    (manifest(layers={}), "layers of M are no JSON list"),
    (manifest(layers=[3]), "layer 0 of M is no JSON object"),
    (manifest(layers=[layer(mediaType="absent")]), "no media type"),
    (manifest(layers=[layer(size=-1)]), "size -1"),
    (manifest(layers=[layer(size=True)]), "size True"),
    (manifest(layers=[layer(size="9")]), "size '9'"),
    (manifest(layers=[layer(size=9.0)]), "size 9.0"),
    (manifest(layers=[layer(size=MAX_BLOB_SIZE + 1)]), "bytes can be"),
    (manifest(layers=[layer(digest="sha512:" + "a" * 128)]), "algorithm 'sha512'"),
    (manifest(layers=[layer(digest="sha256:" + "A" * 64)]), "64 lower-case hex digits"),
    (manifest(layers=[layer(digest="sha256:" + "a" * 63)]), "64 lower-case hex digits"),
    (manifest(layers=[layer(digest=None)]), "digest None"),
    (manifest(layers=[layer(digest="SHA256:" + "a" * 64)]), "64 lower-case hex digits"),
    (manifest(layers=[layer(name=["x"])]), "a name that is no text"),
    (manifest(layers=[layer(annotations=[])]), "annotations of layer 0 of M is no JSON object"),
    (manifest(layers=[layer(annotations={"a": 1})]), "annotation 'a'"),
    (manifest(layers=[layer(annotations={"a": "x" * 20_000})]), "annotation 'a'"),
    (manifest(layers=[LAYER, layer(size=10)]), "two sizes"),
    (manifest(layers=[layer(digest=A)]), "two sizes"),
    (manifest(layers=[LAYER] * (MAX_LAYERS + 1)), f"{MAX_LAYERS} are allowed"),
]


@pytest.mark.parametrize(("document", "words"), BAD, ids=[str(number) for number in range(len(BAD))])
def test_what_is_not_sound_is_refused_with_a_sentence(document: object, words: str) -> None:
    with pytest.raises(IntegrityError) as caught:
        parse(document)
    assert words in str(caught.value)
    assert str(caught.value).endswith(".")
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"", "not JSON"),
        (b'{"schemaVersion":2,', "not JSON"),
        (b"\xff\xfe", "not JSON"),
        (b'{"schemaVersion":2,"schemaVersion":2}', "a key occurs twice"),
        (b'{"schemaVersion":NaN}', "NaN is no JSON number"),
        (b'{"schemaVersion":-Infinity}', "-Infinity is no JSON number"),
        (b'{"schemaVersion":' + b"9" * 5000 + b"}", "not JSON"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (b"[" * 100_000, "nested too deeply"),
        (b" " * (MAX_MANIFEST_BYTES + 1), "bytes"),
    ],
)
def test_bytes_that_are_no_json_are_refused(raw: bytes, words: str) -> None:
    with pytest.raises(IntegrityError, match=words):
        parse_manifest(raw, "M")


@pytest.mark.parametrize("part", [b"{},", b"[],", b"1.5,", b'"ab",'])
def test_a_million_layers_are_refused_before_anything_is_made_of_them(part: bytes) -> None:
    raw = b'{"schemaVersion":2,"config":{},"layers":[' + part * 1_100_000 + b"{}]}"
    tracemalloc.start()
    try:
        with pytest.raises(IntegrityError, match="so many are allowed"):
            parse_manifest(raw, "M")
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_the_one_model_of_an_index_is_chosen() -> None:
    one, other = (Descriptor("x/y", bytes([number]) * 32, 1) for number in (1, 2))
    assert choose([one, one], "M") == one
    with pytest.raises(IntegrityError, match="no usable artifact"):
        choose([], "M")
    with pytest.raises(IntegrityError) as caught:
        choose([one, other], "M")
    assert one.digest_text in str(caught.value)
    assert other.digest_text in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "model"),
    [
        ({"artifactType": "application/vnd.cncf.model.manifest.v1+json"}, True),
        ({"config": {**CONFIG, "mediaType": "application/vnd.docker.ai.model.config.v0.1+json"}}, True),
        ({"layers": [layer(mediaType="application/vnd.cnai.model.weight.v1.raw")]}, True),
        (
            {"layers": [layer(mediaType="x/y", annotations={"org.opencontainers.image.title": "m.gguf"})]},
            True,
        ),
        ({"layers": [layer(mediaType="application/vnd.oci.image.layer.v1.tar+gzip")]}, False),
    ],
)
def test_what_a_model_is(changes: dict[str, Any], model: bool) -> None:
    artifact = parse(manifest(**changes))
    assert isinstance(artifact, Artifact)
    assert artifact.is_model is model


def test_digests_of_what_is_no_text_are_refused() -> None:
    assert parse_digest(A, "D") == b"\xaa" * 32
    values: list[object] = [None, 3, [], "", "a" * 64, f"{A}\n", f" {A}"]
    for value in values:
        with pytest.raises(IntegrityError):
            parse_digest(value, "D")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
VALUE = JSON | st.sampled_from([A, B, 0, 2, OCI_MANIFEST, OCI_INDEX, "application/vnd.ollama.image.model"])
DESCRIPTORS = st.fixed_dictionaries(
    {},
    optional=dict.fromkeys(("mediaType", "digest", "size", "annotations", "name", "artifactType"), VALUE),
) | st.just(LAYER)
DOCUMENTS = st.fixed_dictionaries(
    {"schemaVersion": st.just(2) | VALUE},
    optional={
        "mediaType": VALUE,
        "config": DESCRIPTORS | VALUE,
        "layers": st.lists(DESCRIPTORS, max_size=3) | VALUE,
        "manifests": st.lists(DESCRIPTORS, max_size=3) | VALUE,
        "artifactType": VALUE,
    },
)


@given(st.binary(max_size=200) | JSON.map(lambda value: json.dumps(value).encode()))
def test_any_bytes_are_read_or_refused(raw: bytes) -> None:
    with contextlib.suppress(IntegrityError):
        parse_manifest(raw, "M")


@given(DOCUMENTS)
def test_any_document_is_sound_or_refused(document: dict[str, Any]) -> None:
    try:
        found = parse(document)
    except IntegrityError:
        return
    if isinstance(found, Artifact):
        for files in (ollama_files, oci_files):
            with contextlib.suppress(IntegrityError):
                files(found, "M")
    parts = found.manifests if isinstance(found, Index) else (found.config, *found.layers)
    for part in parts:
        assert len(part.digest) == 32
        assert 0 <= part.size <= MAX_BLOB_SIZE
        assert "/" in part.media_type
