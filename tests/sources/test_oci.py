"""OCI refs against a real registry: artifacts of all conventions, indexes, tars by offset."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import random
import tarfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from weightfs.core.artifact import OCI_MANIFEST
from weightfs.core.geometry import MIB
from weightfs.core.manifest import Manifest, Policy
from weightfs.core.ref import Ref, parse_ref
from weightfs.errors import FailureKind, IntegrityError, SourceError
from weightfs.sources import oci
from weightfs.sources.base import Source
from weightfs.sources.oci import OciSource
from weightfs.testing.origin import open_origin
from weightfs.testing.registry import DockerRegistry, Layer, push_index, push_oci
from weightfs.testing.sources import SourceTests, opened, read_entry

GGUF = b"GGUF" + random.Random(6).randbytes(2 * MIB)
DOCKER = "application/vnd.docker.ai."
CNCF = "application/vnd.cncf.model."
TAR = "application/vnd.oci.image.layer.v1.tar"
FILEPATH = "org.cncf.model.filepath"
MODEL = "application/vnd.cncf.model.manifest.v1+json"


@pytest.fixture(scope="module")
def registry() -> Iterator[DockerRegistry]:
    with DockerRegistry() as running:
        yield running


async def resolve(registry: DockerRegistry, name: str, **settings: Any) -> Manifest:
    async with opened(OciSource, **settings) as source:
        return await source.resolve(parse_ref(f"oci://{registry.host}/{name}"))


def paths(found: Manifest) -> list[str]:
    return [entry.path for entry in found.entries]


def tar(files: dict[str, bytes], *, links: bool = False) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
        if links:
            info = tarfile.TarInfo("link")
            info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
            archive.addfile(info)
    return buffer.getvalue()


class TestConformance(SourceTests):
    @asynccontextmanager
    async def serving(self, data: bytes, tmp_path: Path) -> AsyncIterator[tuple[Source, Ref]]:
        with DockerRegistry() as registry:
            push_oci(registry, "ai/m:latest", [Layer(data, DOCKER + "gguf.v3")])
            async with opened(OciSource) as source:
                yield source, parse_ref(f"oci://{registry.host}/ai/m")


async def test_modelpack(registry: DockerRegistry) -> None:
    layers = [
        Layer(GGUF, CNCF + "weight.v1.raw", {FILEPATH: "w/m.gguf"}),
        Layer(b"{}", CNCF + "weight.config.v1.raw", {FILEPATH: "config.json"}),
        Layer(b"doc", "application/vnd.cnai.model.doc.v1.raw", {"org.cnai.model.filepath": "README.md"}),
    ]
    digest = push_oci(registry, "ns/pack:v1", layers)
    async with opened(OciSource) as source:
        found = await source.resolve(parse_ref(f"oci://{registry.host}/ns/pack:v1"))
        assert (found.revision, found.tree) == (digest, f"oci/{registry.host}/ns/pack/v1")
        assert digest == f"sha256:{hashlib.sha256(found.raw).hexdigest()}"
        assert paths(found) == ["w/m.gguf", "config.json", "README.md"]
        assert await read_entry(source, found.entries[0]) == GGUF
        pinned = await source.resolve(parse_ref(f"oci://{registry.host}/ns/pack@{digest}"))
        assert (pinned.revision, pinned.raw) == (found.revision, found.raw)
        assert pinned.tree == f"oci/{registry.host}/ns/pack/{digest.replace(':', '-')}"


async def test_docker_model_runner(registry: DockerRegistry) -> None:
    layers = [Layer(GGUF, DOCKER + "gguf.v3"), Layer(b"free", DOCKER + "license")]
    push_oci(
        registry, "ai/tiny:latest", layers, artifact_type="", config_type=DOCKER + "model.config.v0.1+json"
    )
    assert paths(await resolve(registry, "ai/tiny")) == ["model.gguf", "license"]


async def test_files_of_oras_and_one_digest_in_two_places(registry: DockerRegistry) -> None:
    layers = [Layer.titled("a/m.gguf", GGUF, TAR), Layer.titled("b/m.gguf", GGUF)]
    push_oci(registry, "ns/oras:1", layers, artifact_type="application/vnd.unknown.artifact.v1")
    found = await resolve(registry, "ns/oras:1", policy=Policy.STRICT)
    assert paths(found) == ["a/m.gguf", "b/m.gguf"]
    assert found.entries[0].blob is found.entries[1].blob
    assert all(entry.span is None for entry in found.entries)


async def test_files_in_a_plain_tar_are_read_by_their_place(
    registry: DockerRegistry, caplog: pytest.LogCaptureFixture
) -> None:
    raw = tar({"./w/m.gguf": GGUF, "config.json": b"{}", "empty": b""}, links=True)
    push_oci(registry, "ns/tar:1", [Layer(raw, CNCF + "weight.v1.tar"), Layer.titled("notes", b"n")])
    async with opened(OciSource) as source:
        with caplog.at_level(logging.WARNING):
            found = await source.resolve(parse_ref(f"oci://{registry.host}/ns/tar:1"))
        assert "1 links or sparse files" in caplog.text
        assert paths(found) == ["w/m.gguf", "config.json", "empty", "notes"]
        model, config, empty, notes = found.entries
        assert model.blob is config.blob
        assert model.blob.digest == f"sha256:{hashlib.sha256(raw).hexdigest()}"
        assert await read_entry(source, model) == GGUF
        assert await read_entry(source, model, MIB, MIB + 7) == GGUF[MIB : MIB + 7]
        assert await read_entry(source, config) == b"{}"
        assert await read_entry(source, empty) == b""
        assert notes.span is None


async def test_only_the_headers_of_a_tar_are_read(registry: DockerRegistry) -> None:
    raw = tar({"a": GGUF, "b": GGUF})
    push_oci(registry, "ns/two:1", [Layer(raw, TAR)])
    before = len(registry.requests())
    await resolve(registry, "ns/two:1")
    assert len([line for line in registry.requests()[before:] if "/blobs/" in line]) == 3


@pytest.mark.parametrize(("bound", "value"), [("MAX_TARS", 1), ("MAX_MEMBERS", 1)])
async def test_how_much_there_may_be_in_tars_is_bounded(
    registry: DockerRegistry, monkeypatch: pytest.MonkeyPatch, bound: str, value: int
) -> None:
    monkeypatch.setattr(oci, bound, value)
    push_oci(registry, "ns/tars:1", [Layer(tar({f"{n}": b"", f"{n}b": b""}), TAR) for n in range(2)])
    with pytest.raises(IntegrityError, match="no model needs so many"):
        await resolve(registry, "ns/tars:1")


@pytest.mark.parametrize(
    ("layers", "words"),
    [
        ([Layer(b"x", TAR + "+gzip")], "compressed layer"),
        ([Layer(b"x", "application/vnd.docker.image.rootfs.diff.tar.gzip")], "compressed layer"),
        ([Layer(b"x", CNCF + "weight.v1.tar+zstd", {FILEPATH: "a"})], "compressed layer"),
        ([Layer.titled("../x", b"x")], "which is refused"),
        ([Layer.titled("/x", b"x")], "which is refused"),
        ([Layer.titled("x", b"1"), Layer.titled("x", b"2")], "the path 'x' twice"),
        (
            [Layer.titled("w/x", b"1"), Layer(tar({"w": b"2"}), TAR)],
            "the path 'w' twice, or as a file and a folder",
        ),
        ([Layer(tar({"x": b"1"}), TAR), Layer(tar({"x": b"2"}), TAR)], "the path 'x' twice"),
        ([Layer(tar({"../x": b"1"}), TAR)], "which is refused"),
        ([Layer(b"not a tar" * 100, TAR)], "no tar"),
        ([Layer(b"{}", "application/vnd.oci.empty.v1+json")], "without files"),
    ],
)
async def test_what_cannot_be_shown_is_refused_with_a_sentence(
    registry: DockerRegistry, layers: list[Layer], words: str
) -> None:
    push_oci(registry, "ns/bad:1", layers)
    with pytest.raises(IntegrityError, match=words):
        await resolve(registry, "ns/bad:1")


# ---- indexes


def image(registry: DockerRegistry, repository: str) -> str:
    return push_oci(registry, repository, [Layer(b"z", TAR + "+gzip")], artifact_type="")


async def test_of_an_index_the_model_is_taken_whatever_the_platform(registry: DockerRegistry) -> None:
    model = push_oci(registry, "ns/index", [Layer(GGUF, DOCKER + "gguf.v3")], artifact_type="")
    other = image(registry, "ns/index")
    listed = [{"digest": other, "platform": {"architecture": "amd64", "os": "linux"}},
              {"digest": model, "platform": {"architecture": "s390x", "os": "plan9"}}]  # fmt: skip
    index = push_index(registry, "ns/index:1", listed)
    found = await resolve(registry, "ns/index:1")
    assert (found.revision, paths(found)) == (model, ["model.gguf"])
    assert f"sha256:{hashlib.sha256(found.raw).hexdigest()}" == model != index


async def test_an_index_that_says_its_types_is_not_read_through(registry: DockerRegistry) -> None:
    model = push_oci(registry, "ns/typed", [Layer.titled("m", b"x")])
    other = image(registry, "ns/typed")
    push_index(registry, "ns/typed:1", [{"digest": other, "artifactType": "application/vnd.other"},
                                        {"digest": model, "artifactType": MODEL}])  # fmt: skip
    before = len(registry.requests())
    assert (await resolve(registry, "ns/typed:1")).revision == model
    assert len([line for line in registry.requests()[before:] if "/manifests/" in line]) == 2


async def test_several_models_are_the_users_choice(registry: DockerRegistry) -> None:
    digests = [
        push_oci(registry, "ns/many", [Layer.titled("m.gguf", data)], artifact_type="")
        for data in (b"1", b"2")
    ]
    push_index(registry, "ns/many:1", [{"digest": digest} for digest in digests])
    with pytest.raises(IntegrityError, match="an index of 2 models") as caught:
        await resolve(registry, "ns/many:1")
    assert all(digest in str(caught.value) for digest in digests)
    assert (await resolve(registry, f"ns/many@{digests[1]}")).revision == digests[1]


async def test_an_index_with_no_usable_artifact(registry: DockerRegistry) -> None:
    push_index(registry, "ns/none:1", [{"digest": image(registry, "ns/none")}])
    with pytest.raises(IntegrityError, match="an index with no usable artifact"):
        await resolve(registry, "ns/none:1")
    push_index(registry, "ns/none:2", [])
    with pytest.raises(IntegrityError, match="an index with no usable artifact"):
        await resolve(registry, "ns/none:2")


async def test_how_far_an_index_is_read_is_bounded(
    registry: DockerRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(oci, "MAX_LOOKED_AT", 3)
    digests = [
        push_oci(registry, "ns/long", [Layer(b"z%d" % number, TAR + "+gzip")], artifact_type="")
        for number in range(5)
    ]
    push_index(registry, "ns/long:1", [{"digest": digest} for digest in digests])
    before = len(registry.requests())
    with pytest.raises(IntegrityError, match="no usable artifact"):
        await resolve(registry, "ns/long:1")
    assert len([line for line in registry.requests()[before:] if "/manifests/" in line]) == 4


async def test_a_digest_in_the_ref_must_be_that_of_an_artifact(registry: DockerRegistry) -> None:
    model = push_oci(registry, "ns/inner", [Layer.titled("m", b"x")])
    inner = push_index(registry, "ns/inner", [{"digest": model, "artifactType": MODEL}])
    assert (await resolve(registry, f"ns/inner@{inner}")).revision == model
    missing = "sha256:" + "0" * 64
    with pytest.raises(SourceError, match=f"no manifest {missing}") as caught:
        await resolve(registry, f"ns/inner@{missing}")
    assert caught.value.kind is FailureKind.NOT_FOUND


async def test_bytes_that_are_not_those_of_the_digest_are_refused() -> None:
    asked = "sha256:" + "0" * 64
    path = f"/v2/ns/m/manifests/{asked}"
    config = {"mediaType": "application/vnd.oci.empty.v1+json", "digest": asked, "size": 2}
    document = {"schemaVersion": 2, "mediaType": OCI_MANIFEST, "config": config, "layers": []}
    async with open_origin({path: json.dumps(document).encode()}) as origin, opened(OciSource) as source:
        with pytest.raises(IntegrityError, match="another digest than was asked for"):
            await source.resolve(parse_ref(f"oci://127.0.0.1:{origin.port}/ns/m@{asked}"))
