"""Ollama refs against a real registry, and against one that answers as it should not."""

from __future__ import annotations

import hashlib
import json
import logging
import random
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from trio.testing import MockClock

from weightfs.core.artifact import DOCKER_INDEX, DOCKER_MANIFEST, Descriptor
from weightfs.core.geometry import MIB
from weightfs.core.manifest import Manifest, Policy, Trust
from weightfs.core.mirror_rules import PrefixRule
from weightfs.core.ref import Ref, parse_ref
from weightfs.engine.settings import EngineSettings, FillMode
from weightfs.errors import ChunkListError, FailureKind, IntegrityError, SourceError
from weightfs.sources.base import FetchSettings, Source
from weightfs.sources.ollama import OllamaSource, read_chunksums
from weightfs.testing.engines import running_engine
from weightfs.testing.origin import Fault, FaultKind, Origin, OriginFile, open_origin
from weightfs.testing.registry import (
    OLLAMA,
    Auth,
    DockerRegistry,
    Layer,
    push_ollama,
    write_docker_config,
)
from weightfs.testing.sources import SourceTests, opened, read_entry

GGUF = b"GGUF" + random.Random(5).randbytes(3 * MIB)
PARTS = {"model": GGUF, "template": b"{{ .Prompt }}", "params": b'{"stop":["x"]}', "license": b"free"}
MANIFEST = "/v2/library/m/manifests/latest"


@pytest.fixture
def autojump_clock() -> MockClock:
    return MockClock(autojump_threshold=0.05)


@pytest.fixture(scope="module")
def registry() -> Iterator[DockerRegistry]:
    with DockerRegistry() as running:
        yield running


async def resolve(text: str, **settings: Any) -> Manifest:
    async with opened(OllamaSource, **settings) as source:
        return await source.resolve(parse_ref(text))


def sha256(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def layer(data: bytes, kind: str = "model", **more: Any) -> dict[str, Any]:
    return {"mediaType": OLLAMA + kind, "digest": sha256(data), "size": len(data), **more}


def manifest(*layers: dict[str, Any], **changes: Any) -> bytes:
    config = {
        "mediaType": "application/vnd.docker.container.image.v1+json",
        "digest": sha256(b"{}"),
        "size": 2,
    }
    document = {
        "schemaVersion": 2,
        "mediaType": DOCKER_MANIFEST,
        "config": config,
        "layers": layers,
        **changes,
    }
    return json.dumps(document).encode()


@asynccontextmanager
async def serving(raw: bytes | OriginFile, **files: bytes) -> AsyncIterator[tuple[Origin, str]]:
    """An origin with one manifest; `files` by digest."""
    document = raw if isinstance(raw, OriginFile) else OriginFile(raw, content_type=DOCKER_MANIFEST)
    blobs = {f"/v2/library/m/blobs/{sha256(data)}": OriginFile(data) for data in files.values()}
    async with open_origin({MANIFEST: document, **blobs}) as origin:
        yield origin, f"ollama://127.0.0.1:{origin.port}/library/m:latest"


class TestConformance(SourceTests):
    """The engine's contract; a registry has at least the config beside the model, so that is left out here."""

    @asynccontextmanager
    async def serving(self, data: bytes, tmp_path: Path) -> AsyncIterator[tuple[Source, Ref]]:
        with DockerRegistry() as registry:
            push_ollama(registry, "library/m:latest", [Layer(data, OLLAMA + "model")])
            async with opened(OllamaSource) as source:
                yield OnlyModel(source), parse_ref(f"ollama://{registry.host}/library/m")


class OnlyModel:
    """A source that leaves all but the first file out."""

    def __init__(self, inner: OllamaSource) -> None:
        self.open_range = inner.open_range
        self.aclose = inner.aclose
        self._inner = inner

    async def resolve(self, ref: Ref) -> Manifest:
        found = await self._inner.resolve(ref)
        return Manifest(found.ref, found.revision, found.tree, found.entries[:1], found.raw)


async def test_a_model_is_its_layers_and_its_id_is_the_digest_of_the_manifest(
    registry: DockerRegistry,
) -> None:
    digest = push_ollama(registry, "ns/tiny:8b", PARTS)
    async with opened(OllamaSource) as source:
        found = await source.resolve(parse_ref(f"ollama://{registry.host}/ns/tiny:8b"))
        assert found.ref == f"ollama://{registry.host}/ns/tiny:8b"
        assert found.tree == f"ollama/{registry.host}/ns/tiny/8b"
        assert found.revision == digest == sha256(found.raw)
        assert [entry.path for entry in found.entries] == [
            "model.gguf", "template", "params.json", "license", "config.json",
        ]  # fmt: skip
        model = found.entries[0]
        assert model.blob.digest == sha256(GGUF)
        assert model.blob.mirrors[0].url == f"{registry.base}/v2/ns/tiny/blobs/{sha256(GGUF)}"
        assert model.blob.initial_trust is Trust.PROVISIONAL
        assert await read_entry(source, model, MIB - 5, MIB + 5) == GGUF[MIB - 5 : MIB + 5]
        assert await read_entry(source, found.entries[1]) == PARTS["template"]
    assert not [line for line in registry.requests() if line.startswith("HEAD")]


async def test_one_digest_is_one_blob(registry: DockerRegistry) -> None:
    push_ollama(
        registry,
        "ns/twice:latest",
        [Layer(b"same", OLLAMA + kind) for kind in ("license", "license", "system")],
    )
    found = await resolve(f"ollama://{registry.host}/ns/twice")
    assert [entry.path for entry in found.entries] == ["license", "license-2", "system", "config.json"]
    assert found.entries[0].blob is found.entries[1].blob is found.entries[2].blob


async def test_tensors_have_their_names(registry: DockerRegistry) -> None:
    layers = [Layer(b"t", OLLAMA + "tensor", more={"name": "model.embed.weight"}),
              Layer(b"{}\n", OLLAMA + "json", more={"name": "config.json"})]  # fmt: skip
    push_ollama(registry, "ns/tensors:latest", layers)
    found = await resolve(f"ollama://{registry.host}/ns/tensors")
    assert [entry.path for entry in found.entries] == ["model.embed.weight", "config.json", "config-2.json"]


async def test_a_tag_that_moved_is_another_revision(registry: DockerRegistry) -> None:
    ref = f"ollama://{registry.host}/ns/moving"
    first = push_ollama(registry, "ns/moving:latest", {"model": b"one"})
    assert (await resolve(ref)).revision == first
    second = push_ollama(registry, "ns/moving:latest", {"model": b"two"})
    assert (await resolve(ref)).revision == second != first


async def test_strict_takes_what_has_a_digest(registry: DockerRegistry) -> None:
    push_ollama(registry, "ns/strict:latest", PARTS)
    found = await resolve(f"ollama://{registry.host}/ns/strict", policy=Policy.STRICT)
    assert {entry.blob.policy for entry in found.entries} == {Policy.STRICT}


@pytest.mark.parametrize(
    ("name", "words"),
    [("ns/known:nothing", "has no tag nothing of ns/known"), ("ns/unknown:latest", "check")],
)
async def test_unknown_names_are_not_found(registry: DockerRegistry, name: str, words: str) -> None:
    push_ollama(registry, "ns/known:latest", {"model": b"x"})
    with pytest.raises(SourceError, match=words) as caught:
        await resolve(f"ollama://{registry.host}/{name}")
    assert caught.value.kind is FailureKind.NOT_FOUND


async def test_a_page_instead_of_a_manifest(autojump_clock: MockClock) -> None:
    async with serving(manifest(layer(GGUF))) as (origin, ref):
        origin.always[MANIFEST] = Fault(FaultKind.HTML_200)
        with pytest.raises(SourceError, match="HTML page instead of a manifest") as caught:
            await resolve(ref, retry=2)
        assert caught.value.kind is FailureKind.PROTOCOL
        assert len(origin.seen) == 3
        origin.always.clear()
        origin.script(MANIFEST, Fault(FaultKind.HTML_200))  # a captive portal that is gone a moment later
        assert (await resolve(ref, retry=2)).entries


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (manifest(layer(GGUF))[:-5], "is not JSON"),
        (b'{"schemaVersion":2}' + b" " * (17 << 20), "manifest of over 16777216 bytes"),
        (b'{"schemaVersion":2,"config":{},"layers":[' + b"{}," * 1_000_000 + b"{}]}", "are allowed"),
        (manifest(layer(GGUF, size=-1)), "has the size -1"),
        (manifest(layer(GGUF, digest="sha512:" + "a" * 128)), "algorithm 'sha512'"),
        (manifest(layer(GGUF, digest="sha256:" + "A" * 64)), "lower-case"),
        (manifest(layer(GGUF, "tensor", name="../../etc/passwd")), "which is refused"),
        (manifest(layer(GGUF, "json", name="a"), layer(b"", "json", name="a")), "twice"),
        (json.dumps({"schemaVersion": 2, "manifests": []}).encode(), "try oci://"),
    ],
)
async def test_manifests_that_cannot_be_are_refused_with_a_sentence(raw: bytes, words: str) -> None:
    kind = DOCKER_INDEX if b'"manifests"' in raw else DOCKER_MANIFEST
    async with serving(OriginFile(raw, content_type=kind)) as (_, ref):
        with pytest.raises(IntegrityError, match=words) as caught:
            await resolve(ref)
        assert len(str(caught.value)) < 500


async def test_what_the_registry_says_about_the_digest_must_hold() -> None:
    raw = manifest(layer(GGUF))
    for said, words in (
        (sha256(b"other"), "differs from the header"),
        ("sha512:" + "a" * 128, "algorithm 'sha512'"),
    ):
        async with serving(OriginFile(raw, headers=(("Docker-Content-Digest", said),))) as (_, ref):
            with pytest.raises(IntegrityError, match=words):
                await resolve(ref)
    async with serving(OriginFile(raw, headers=(("Docker-Content-Digest", sha256(raw)),))) as (_, ref):
        assert (await resolve(ref)).raw == raw


async def test_something_else_than_json_and_a_bad_request(autojump_clock: MockClock) -> None:
    async with serving(b"hello") as (origin, ref):
        with pytest.raises(SourceError, match="something else than a manifest"):
            await resolve(ref)
        origin.always[MANIFEST] = Fault(FaultKind.STATUS, status=400)
        with pytest.raises(SourceError, match="refuses the request") as caught:
            await resolve(ref)
        assert caught.value.kind is FailureKind.PROTOCOL


async def test_a_registry_that_limits_says_so(autojump_clock: MockClock) -> None:
    async with serving(manifest(layer(GGUF))) as (origin, ref):
        limited = Fault(FaultKind.STATUS, status=429, headers=(("Retry-After", "7"),))
        origin.script(MANIFEST, limited)
        assert (await resolve(ref, retry=1)).entries
        origin.always[MANIFEST] = limited
        with pytest.raises(SourceError, match="log in with docker login") as caught:
            await resolve(ref, retry=1)
        assert (caught.value.kind, caught.value.retry_after) == (FailureKind.BUSY, 7.0)


async def test_endpoints_say_where_a_registry_is() -> None:
    async with serving(manifest(layer(GGUF))) as (origin, _):
        endpoints = (("registry.ollama.ai", origin.url("").rstrip("/")),)
        found = await resolve("ollama://m", endpoints=endpoints)
        assert found.tree == "ollama/library/m/latest"
        assert found.entries[0].blob.mirrors[0].url.startswith(origin.url("v2/library/m/blobs/sha256:"))
        (seen,) = origin.requests(MANIFEST)
        assert seen.headers["accept"] == DOCKER_MANIFEST
        assert seen.method == "GET"


# ---- chunk lists that a registry may offer

BIG = 200 * MIB
PIECES = [hashlib.sha256(b"%d" % number).hexdigest() for number in range(4)]


def chunksums(length: int = 64 * MIB, size: int = BIG) -> bytes:
    starts = range(0, size, length)
    lines = [f"sha256:{PIECES[n]} {at}-{min(at + length, size) - 1}" for n, at in enumerate(starts)]
    return "\n".join(lines).encode()


def big(size: int = BIG) -> Descriptor:
    return Descriptor(OLLAMA + "model", bytes(32), size)


async def big_manifest(sums: bytes | None, **settings: Any) -> Manifest:
    more = [
        {"mediaType": OLLAMA + "adapter", "digest": f"sha256:{n}" + "1" * 63, "size": BIG} for n in range(3)
    ]
    raw = manifest({"mediaType": OLLAMA + "model", "digest": "sha256:" + "0" * 64, "size": BIG}, *more)
    async with serving(raw) as (origin, ref):
        path = f"/v2/library/m/chunksums/sha256:{'0' * 64}"
        if sums is not None:
            origin.files[path] = OriginFile(sums)
        found = await resolve(ref, **settings)
        assert len(origin.requests(path)) == 1
        assert not origin.requests(f"/v2/library/m/chunksums/{sha256(b'{}')}")
        # None is asked for after one that is not there.
        usable = found.entries[0].blob.chunk_list is not None
        assert len([seen for seen in origin.seen if "/chunksums/" in seen.path]) == 1 + usable
        return found


async def test_a_regular_chunk_list_is_used() -> None:
    blob = (await big_manifest(chunksums())).entries[0].blob
    assert blob.shape.chunk_length == 64 * MIB
    assert blob.initial_trust is Trust.ATTESTED
    assert blob.chunk_list is not None
    assert blob.chunk_list.digest_of(3).hex() == PIECES[3]


@pytest.mark.parametrize("sums", [None, b"", b"<html>", chunksums()[:-3], chunksums(63 * MIB, 3 * 63 * MIB)])
async def test_any_other_chunk_list_is_not_missed(
    sums: bytes | None, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        blob = (await big_manifest(sums, policy=Policy.STRICT)).entries[0].blob
    assert blob.chunk_list is None
    assert not caplog.records


async def test_a_chunk_list_from_elsewhere_is_not_trusted() -> None:
    raw = manifest({"mediaType": OLLAMA + "model", "digest": "sha256:" + "0" * 64, "size": BIG})
    async with serving(raw) as (origin, ref), open_origin({"/sums": chunksums()}) as away:
        path = f"/v2/library/m/chunksums/sha256:{'0' * 64}"
        origin.always[path] = Fault(FaultKind.REDIRECT, location=away.url("/sums"))
        blob = (await resolve(ref)).entries[0].blob
        assert blob.chunk_list is not None
        assert blob.initial_trust is Trust.PROVISIONAL
        assert (await resolve(ref, policy=Policy.STRICT)).entries[0].blob.chunk_list is None


def test_what_a_regular_chunk_list_is() -> None:
    shuffled = b"\n".join(reversed(chunksums().splitlines())) + b"\r\n\n"
    assert read_chunksums(shuffled, big()) == read_chunksums(chunksums(), big()) is not None
    assert read_chunksums(chunksums() + b"\nx", big()) is None
    assert read_chunksums(chunksums(), big(BIG + 1)) is None
    assert read_chunksums(chunksums(BIG), big()) is None
    first, *rest = chunksums().splitlines()
    assert read_chunksums(b"\n".join(rest), big()) is None
    assert read_chunksums(b"\n".join([first, first, *rest]), big()) is None
    with pytest.raises(ChunkListError):
        read_chunksums(chunksums(60 * MIB), big())


# ---- through the whole engine


async def test_a_mirror_rule_holds_for_layers(tmp_path: Path) -> None:
    with DockerRegistry() as gone, DockerRegistry(auth=Auth.TOKEN) as mirror:
        for one in (gone, mirror):
            push_ollama(one, "library/x:latest", PARTS)
        rule = PrefixRule(f"{gone.base}/v2/", f"{mirror.base}/v2/")
        settings = EngineSettings(workers=0, fill=FillMode.NEVER, mirrors=(rule,))
        async with running_engine(tmp_path / "cache", settings) as engine:
            ref = parse_ref(f"ollama://{gone.host}/library/x:latest")
            await engine.add(ref)
            gone.stop()
            await engine.complete(str(ref))


@pytest.mark.parametrize("workers", [0, 2])
async def test_a_private_model_is_fetched_whole_by_worker_processes(workers: int, tmp_path: Path) -> None:
    with DockerRegistry(auth=Auth.TOKEN, accounts={"ann": "secret"}) as registry:
        registry.tokens.public = False
        push_ollama(registry, "library/x:latest", PARTS)
        config = write_docker_config(tmp_path / "config.json", registry.host, "ann", "secret")
        fetch = FetchSettings(retry=1, docker_config=str(config))
        settings = EngineSettings(workers=workers, fill=FillMode.NEVER, fetch=fetch)
        async with running_engine(tmp_path / "cache", settings) as engine:
            ref = parse_ref(f"ollama://{registry.host}/library/x:latest")
            found = await engine.add(ref)
            await engine.complete(str(ref))
            for entry, data in zip(found.entries, PARTS.values(), strict=False):
                status = engine.blob_status(entry.blob.id)
                assert (status.present_bytes, status.trust) == (len(data), Trust.VERIFIED)
