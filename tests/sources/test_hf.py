"""What hf refs resolve to at a local Hub: revisions, files, digests, lists, refusals, and who is told the token."""

from __future__ import annotations

import hashlib
import json
import logging
import random
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import trio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from weightfs.core.geometry import MIB, ByteSpan
from weightfs.core.hubtree import MAX_ENTRIES, MAX_PAGE_BYTES, MAX_PAGES, git_oid, read_raw
from weightfs.core.manifest import Blob, BlobId, Manifest, Mirror, Policy, Trust
from weightfs.core.ref import Ref, parse_ref
from weightfs.engine.settings import EngineSettings, FillMode
from weightfs.errors import (
    ChunkListError,
    FailureKind,
    IntegrityError,
    RefError,
    SignatureError,
    SourceError,
)
from weightfs.sources import hf, open_source
from weightfs.sources._client import HttpClient, parse_url
from weightfs.sources.base import FetchSettings, Source
from weightfs.sources.hf import HfSource
from weightfs.sources.minisign import sign
from weightfs.testing.engines import running_engine
from weightfs.testing.hub import Answer, Hub, page
from weightfs.testing.hubrepos import Repo
from weightfs.testing.origin import Seen
from weightfs.testing.published import CHUNK, chunk_list
from weightfs.testing.sources import Elsewhere, SourceTests

TOKEN = "hf_wHbTestTokenNobodyElseHas"
WEIGHTS = random.Random(11).randbytes(2_500_000)
FILES = {
    "README.md": b"# A model\n",
    "config.json": b'{"model_type": "llama"}',
    "model.gguf": WEIGHTS,
    "parts/a b#1.bin": b"first",
    "parts/b.bin": b"second",
}


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub(tokens={TOKEN}) as running:
        yield running


@pytest.fixture
def repo(hub: Hub) -> Repo:
    repo = hub.repo("org/name")
    repo.commit(FILES)
    return repo


def fetch_settings(hub: Hub, **more: object) -> FetchSettings:
    return replace(FetchSettings(hf_endpoint=hub.endpoint, retry=0, retry_delay=0.001), **more)  # type: ignore[arg-type]  # by name


@asynccontextmanager
async def source_for(hub: Hub, **more: object) -> AsyncIterator[HfSource]:
    source = open_source("hf", fetch_settings(hub, **more))
    assert isinstance(source, HfSource)
    async with source:
        yield source


async def resolved(hub: Hub, text: str, **more: object) -> Manifest:
    async with source_for(hub, **more) as source:
        return await source.resolve(parse_ref(f"hf://{text}"))


async def refused(hub: Hub, text: str, **more: object) -> SourceError:
    with pytest.raises(SourceError) as caught:
        await resolved(hub, text, **more)
    assert TOKEN not in str(caught.value)
    return caught.value


async def read(source: Source, blob: Blob, span: ByteSpan | None = None) -> bytes:
    whole = span or ByteSpan(0, blob.size)
    async with source.open_range(blob.mirrors[0], blob.shape, whole) as pieces:
        return b"".join([piece async for piece in pieces])


def by_path(manifest: Manifest) -> dict[str, Blob]:
    return {entry.path: entry.blob for entry in manifest.entries}


def told_the_token(requests: list[Seen]) -> list[str]:
    return [seen.target for seen in requests if TOKEN in str(seen)]


class TestConformance(SourceTests):
    @asynccontextmanager
    async def serving(self, data: bytes, tmp_path: Path) -> AsyncIterator[tuple[Source, Ref]]:
        with Hub() as hub:
            hub.repo("org/name").commit({"m.gguf": data, "README.md": b"other"})
            async with source_for(hub) as source:
                yield source, parse_ref("hf://org/name/m.gguf")


class TestConformanceOfFilesInGit(SourceTests):
    @asynccontextmanager
    async def serving(self, data: bytes, tmp_path: Path) -> AsyncIterator[tuple[Source, Ref]]:
        with Hub() as hub:
            hub.repo("org/name", "datasets").commit({"m.txt": data}, lfs=False)
            async with source_for(hub) as source:
                yield source, parse_ref("hf://datasets/org/name")


async def test_a_revision_is_pinned_with_sizes_digests_and_paths(hub: Hub, repo: Repo) -> None:
    sha = repo.refs["refs/heads/main"]
    manifest = await resolved(hub, "org/name")
    assert (manifest.ref, manifest.revision) == ("hf://org/name@main", sha)
    assert manifest.tree == "hf/org/name/main"
    blobs = by_path(manifest)
    assert list(blobs) == sorted(FILES)
    weights, config = blobs["model.gguf"], blobs["config.json"]
    digest = hashlib.sha256(WEIGHTS).digest()
    assert (weights.sha256, weights.git_sha1, weights.size) == (digest, None, len(WEIGHTS))
    assert weights.id == BlobId.of_digest(digest)
    assert weights.initial_trust is Trust.PROVISIONAL
    oid = bytes.fromhex(git_oid(FILES["config.json"]))
    assert (config.sha256, config.git_sha1) == (None, oid)
    assert config.id == BlobId.of_git(oid, len(FILES["config.json"]))
    assert config.initial_trust is Trust.PROVISIONAL
    assert weights.mirrors == (Mirror(f"{hub.endpoint}/org/name/resolve/{sha}/model.gguf", 1),)
    assert blobs["parts/a b#1.bin"].mirrors[0].url.endswith(f"/{sha}/parts/a%20b%231.bin")


async def test_nothing_is_asked_per_file(hub: Hub, repo: Repo) -> None:
    repo.commit({f"dir/{number}.bin": b"%d" % number for number in range(40)})
    assert len((await resolved(hub, "org/name")).entries) == 40
    sha = repo.refs["refs/heads/main"]
    assert [seen.target for seen in hub.seen] == [
        "/api/models/org/name/revision/main",
        f"/api/models/org/name/tree/{sha}?recursive=true",
    ]
    assert not hub.cdn_seen


async def test_every_page_is_read_and_raw_has_all_files(hub: Hub, repo: Repo) -> None:
    hub.page_entries = 2
    manifest = await resolved(hub, "org/name/model.gguf")
    assert [entry.path for entry in manifest.entries] == ["model.gguf"]
    assert len(hub.requests("/tree/")) == 3
    tree = read_raw(manifest.raw)
    assert tree.sha == manifest.revision
    stored = repo.commits[tree.sha]
    assert {file.path: (file.etag, file.content_size) for file in tree.files} == {
        path: (file.etag, len(file.data)) for path, file in stored.items()
    }
    document = json.loads(manifest.raw)
    assert list(document) == ["sha", "files"]
    assert document["files"]["model.gguf"] == {
        "size": len(WEIGHTS),
        "blob_id": stored["model.gguf"].oid,
        "lfs_sha256": stored["model.gguf"].sha256,
        "lfs_size": len(WEIGHTS),
        "xet_hash": stored["model.gguf"].xet_hash,
    }
    assert document["files"]["README.md"] == {"size": 10, "blob_id": git_oid(FILES["README.md"])}


@pytest.mark.parametrize(
    ("path", "selected"),
    [
        ("/model.gguf", ["model.gguf"]),
        ("/parts", ["parts/a b#1.bin", "parts/b.bin"]),
        ("/*.bin", ["parts/a b#1.bin", "parts/b.bin"]),
        ("/*.[gj]*", ["config.json", "model.gguf"]),
        ("", sorted(FILES)),
    ],
)
async def test_what_a_path_selects(hub: Hub, repo: Repo, path: str, selected: list[str]) -> None:
    assert list(by_path(await resolved(hub, f"org/name{path}"))) == selected


async def test_nothing_selected_says_what_is_near(hub: Hub, repo: Repo) -> None:
    error = await refused(hub, "org/name/modle.gguf")
    assert error.kind is FailureKind.NOT_FOUND
    assert "did you mean model.gguf?" in str(error)
    assert "did you mean parts/b.bin?" in str(await refused(hub, "org/name/b.bin"))
    assert "did you mean model.gguf?" in str(await refused(hub, "org/name/*.GGUF"))
    for path in ("*Q4_K_M*", "x" * 201):
        assert "it has README.md, config.json, model.gguf" in str(await refused(hub, f"org/name/{path}"))
    hub.repo("org/void").commit({})
    assert "none at all" in str(await refused(hub, "org/void"))


async def test_revisions_of_every_kind(hub: Hub, repo: Repo) -> None:
    first = repo.refs["refs/heads/main"]
    repo.tag("v1", first)
    branch = repo.commit({"config.json": b"two"}, ref="a/branch")
    pull = repo.commit({"config.json": b"three"}, ref="refs/pr/1")
    for text, sha in (("v1", first), (first, first), ("a%2Fbranch", branch), ("refs%2Fpr%2F1", pull)):
        manifest = await resolved(hub, f"org/name@{text}")
        assert (manifest.revision, manifest.tree) == (sha, f"hf/org/name/{text}")
    hub.repo("org/name", "datasets").commit({"d.parquet": b"rows"})
    hub.repo("org/name", "spaces").commit({"app.py": b"1"})
    for kind, path in (("datasets", "d.parquet"), ("spaces", "app.py")):
        manifest = await resolved(hub, f"{kind}/org/name")
        assert list(by_path(manifest)) == [path]
        assert manifest.entries[0].blob.mirrors[0].url.startswith(f"{hub.endpoint}/{kind}/org/name/resolve/")


async def test_the_same_content_is_one_blob(hub: Hub) -> None:
    twice = {"a.bin": b"same", "b.bin": b"same", "c.txt": b"same", "d.txt": b"same"}
    hub.repo("org/name").commit(twice)
    blobs = by_path(await resolved(hub, "org/name"))
    assert blobs["a.bin"] is blobs["b.bin"]
    assert blobs["c.txt"] is blobs["d.txt"]
    assert blobs["a.bin"].id != blobs["c.txt"].id
    assert blobs["b.bin"].mirrors[0].url.endswith("/a.bin")


async def test_bytes_of_both_kinds_of_files(hub: Hub, repo: Repo) -> None:
    hub.max_whole_bytes = 1000  # the Hub refuses large files to who sends no Range
    async with source_for(hub, hf_token=TOKEN) as source:
        for path, blob in by_path(await source.resolve(parse_ref("hf://org/name"))).items():
            assert await read(source, blob) == FILES[path]
            assert await read(source, blob, ByteSpan(1, 3)) == FILES[path][1:3]
    assert all("range" in seen.headers for seen in [*hub.requests("/resolve"), *hub.cdn_seen])


# ---- whom the token is told


async def test_the_token_goes_to_the_endpoint_and_nowhere_else(
    hub: Hub, repo: Repo, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    repo.private = True
    hub.page_entries = 2
    async with source_for(hub, hf_token=TOKEN) as source:
        for path, blob in by_path(await source.resolve(parse_ref("hf://org/name"))).items():
            assert await read(source, blob) == FILES[path]
    assert len(told_the_token(hub.seen)) == len(hub.seen)
    assert hub.requests("/resolve-cache/")  # a relative redirect: with the token
    assert hub.cdn_seen
    assert not told_the_token(hub.cdn_seen)
    assert TOKEN not in caplog.text
    assert TOKEN not in repr(fetch_settings(hub, hf_token=TOKEN))


async def test_a_renamed_repository_is_followed_with_the_token(hub: Hub, repo: Repo) -> None:
    repo.private = True
    hub.page_entries = 2
    hub.rename(repo, "other/new")
    async with source_for(hub, hf_token=TOKEN) as source:
        manifest = await source.resolve(parse_ref("hf://org/name"))
        assert manifest.tree == "hf/org/name/main"
        for path, blob in by_path(manifest).items():
            assert await read(source, blob) == FILES[path]
    assert len(told_the_token(hub.requests("/other/new/"))) == len(hub.requests("/other/new/")) > 5
    assert not told_the_token(hub.cdn_seen)


async def test_an_absolute_redirect_to_another_host_loses_the_token(hub: Hub, repo: Repo) -> None:
    sha = repo.refs["refs/heads/main"]
    with Hub() as other:
        other.repo("org/name").commit(FILES)
        hub.script(
            "/api/models/org/name/revision/main",
            Answer(302, (("Location", f"{other.endpoint}/api/models/org/name/revision/main"),)),
        )
        assert (await resolved(hub, "org/name", hf_token=TOKEN)).revision == sha
        assert len(other.seen) == 1
        assert not told_the_token(other.seen)


async def test_the_users_headers_are_for_an_endpoint_that_was_configured(hub: Hub, repo: Repo) -> None:
    """But an Authorization among them, meant for another host of the same mount perhaps, does not hide the token."""
    mine = (("Authorization", "Bearer of-another-host"), ("X-Team", "blue"))
    more = {"headers": mine, "header_origins": ("http://127.0.0.9:1", "hf://1.2.3.400/name@main")}
    async with source_for(hub, hf_token=TOKEN, **more) as source:
        for path, blob in by_path(await source.resolve(parse_ref("hf://org/name"))).items():
            assert await read(source, blob) == FILES[path]
    told = {(seen.headers["authorization"], seen.headers["x-team"]) for seen in hub.seen}
    assert told == {(f"Bearer {TOKEN}", "blue")}
    assert hub.cdn_seen
    assert not any("x-team" in seen.headers for seen in hub.cdn_seen)
    implied = HttpClient(FetchSettings(headers=mine, hf_token=TOKEN))
    async with HfSource(implied):
        url = parse_url("https://huggingface.co/api/models/org/name")
        assert implied.secrets_for(url) == (("Authorization", f"Bearer {TOKEN}"),)
        assert implied.secrets_for(parse_url("https://cdn.huggingface.co/x")) == ()
        assert implied.secrets_for(parse_url("http://huggingface.co/x")) == ()


# ---- mirrors


async def test_a_mirror_that_passes_on_links_of_the_original(hub: Hub, repo: Repo) -> None:
    """The pages' links lead to a host that nobody may be sent to, least of all the token."""
    hub.page_entries = 2
    with Hub() as original:
        hub.public_url = original.endpoint
        manifest = await resolved(hub, "org/name", hf_token=TOKEN)
        assert not original.seen
    assert list(by_path(manifest)) == sorted(FILES)


@pytest.mark.parametrize(
    ("link", "why"),
    [
        ('<{base}?recursive=true>; rel="next"', "loop"),
        ('<{base}>; rel="next"', "leads nowhere"),
        ('<http://[/?x>; rel="next"', ""),
        (f'<{{base}}?x={"y" * 20_000}>; rel="next"', "characters"),
    ],
)
async def test_links_that_lead_nowhere(hub: Hub, repo: Repo, link: str, why: str) -> None:
    path = f"/api/models/org/name/tree/{repo.refs['refs/heads/main']}"
    headers = (("Link", link.format(base=hub.endpoint + path)),)
    hub.script(path, Answer(200, headers, b"[]"), Answer(200, headers, b"[]"))
    error = await refused(hub, "org/name")
    assert error.kind is FailureKind.PROTOCOL
    assert why in str(error)


async def test_pages_without_end_are_refused(hub: Hub, repo: Repo, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("weightfs.core.hubtree.MAX_PAGES", 5)
    path = f"/api/models/org/name/tree/{repo.refs['refs/heads/main']}"
    hub.script(path, *[Answer(200, (("Link", f'<{path}?c={n}>; rel="next"'),), b"[]") for n in range(10)])
    error = await refused(hub, "org/name")
    assert error.kind is FailureKind.PROTOCOL
    assert len(hub.requests("/tree/")) == 6


# ---- what is refused


@pytest.mark.parametrize(
    ("text", "token", "kind", "words"),
    [
        (
            "org/none",
            "",
            FailureKind.AUTH,
            ["private or is gated", "/org/none ", "HF_TOKEN", "hf auth login"],
        ),
        ("org/secret", "", FailureKind.AUTH, ["private or is gated", "HF_TOKEN"]),
        ("org/none", TOKEN, FailureKind.NOT_FOUND, ["does not exist", "another token"]),
        ("org/name@none", "", FailureKind.NOT_FOUND, ["no branch, tag or commit 'none'"]),
        ("org/name", "hf_wrong", FailureKind.AUTH, ["renew", "`weightfs reload`"]),
        (
            "org/gated",
            "",
            FailureKind.AUTH,
            ["accept its licence at {hub}/org/gated", "HF_TOKEN", "hf auth login"],
        ),
        ("org/gated", TOKEN, FailureKind.AUTH, ["accept its licence at {hub}/org/gated", "that account's"]),
    ],
)
async def test_who_may_not_read_is_told_the_way_out(
    hub: Hub, repo: Repo, text: str, token: str, kind: FailureKind, words: list[str]
) -> None:
    hub.repo("org/secret", private=True).commit(FILES)
    hub.repo("org/gated", gated="manual").commit(FILES)
    error = await refused(hub, text, hf_token=token)
    assert error.kind is kind
    assert error.mirror.startswith(hub.endpoint)
    for word in words:
        assert word.format(hub=hub.endpoint) in str(error)


@pytest.mark.parametrize(
    ("status", "code", "kind", "words"),
    [
        (401, "RepoNotFound", FailureKind.NOT_FOUND, "set HF_TOKEN"),
        (403, "GatedRepo", FailureKind.AUTH, "licence"),
        (404, "EntryNotFound", FailureKind.NOT_FOUND, "no files"),
        (403, "", FailureKind.AUTH, "without a token"),
        (404, "", FailureKind.NOT_FOUND, "HF_ENDPOINT"),
        (410, "Surprise", FailureKind.NOT_FOUND, "does not exist"),
        (500, "", FailureKind.BUSY, "busy"),
        (418, "", FailureKind.PROTOCOL, "418"),
    ],
)
async def test_statuses_and_codes(
    hub: Hub, repo: Repo, status: int, code: str, kind: FailureKind, words: str
) -> None:
    hub.script("/api/models/org/name/revision/main", Answer(status, (("X-Error-Code", code),)))
    error = await refused(hub, "org/name")
    assert error.kind is kind
    assert words in str(error)


async def test_a_gated_repository_is_asked_once_not_per_file(hub: Hub) -> None:
    gated = hub.repo("org/gated", gated="auto")
    gated.commit({**FILES, "none.txt": b""})
    gated.accepted.add(TOKEN)
    assert len((await resolved(hub, "org/gated", hf_token=TOKEN)).entries) == len(FILES) + 1
    assert len(hub.requests("/resolve/")) == 1
    assert not told_the_token(hub.cdn_seen)
    # What is merely in trouble says nothing about access.
    sha = gated.refs["refs/heads/main"]
    hub.script(f"/org/gated/resolve/{sha}/model.gguf", Answer(503))
    assert (await resolved(hub, "org/gated", hf_token=TOKEN)).revision == sha
    hub.repo("org/gated").commit({"none.txt": b""})
    assert (await resolved(hub, "org/gated")).entries[0].blob.size == 0


@pytest.mark.parametrize("retry_after", ["", "0"])
async def test_a_limited_rate_is_waited_out(hub: Hub, repo: Repo, retry_after: str) -> None:
    sha = repo.refs["refs/heads/main"]
    hub.limit_rate("/api/models/org/name/revision/main", 2, retry_after=retry_after)
    hub.limit_rate(f"/api/models/org/name/tree/{sha}", 2, retry_after=retry_after)
    assert (await resolved(hub, "org/name", retry=2)).revision == sha
    hub.limit_rate("/api/models/org/name/revision/main", 2, retry_after=retry_after)
    assert (await refused(hub, "org/name", retry=1)).kind is FailureKind.BUSY


@pytest.mark.parametrize("which", ["revision", "tree"])
async def test_a_log_in_page_is_not_an_answer(hub: Hub, repo: Repo, which: str) -> None:
    last = "main" if which == "revision" else repo.refs["refs/heads/main"]
    hub.script(f"/api/models/org/name/{which}/{last}", page())
    error = await refused(hub, "org/name")
    assert error.kind is FailureKind.PROTOCOL
    assert "page for people" in str(error)


@pytest.mark.parametrize(
    "info",
    [
        b"",
        b"[]",
        b"null",
        b"{}",
        b'{"sha": "main"}',
        b'{"sha": 7}',
        b'{"sha": "' + b"AB" * 20 + b'"}',
        b'{"sha": "' + b"ab" * 20,
        b"[" * 100_000,
        b"\xff\xfe",
        b'{"sha": "' + b"ab" * 20 + b'", "x": [' + b"{}," * 500_001 + b"0]}",
    ],
)
async def test_a_revision_that_is_none(hub: Hub, repo: Repo, info: bytes) -> None:
    hub.script("/api/models/org/name/revision/main", Answer(200, (), info))
    assert (await refused(hub, "org/name")).kind is FailureKind.PROTOCOL


async def test_a_commit_that_was_asked_for_is_not_replaced_by_another(hub: Hub, repo: Repo) -> None:
    asked = "12" * 20
    other = json.dumps({"sha": repo.refs["refs/heads/main"]}).encode()
    hub.script(f"/api/models/org/name/revision/{asked}", Answer(200, (), other))
    assert "another commit" in str(await refused(hub, f"org/name@{asked}"))


async def test_a_million_files_are_refused(hub: Hub, repo: Repo) -> None:
    entry = json.dumps({"type": "file", "path": "x", "size": 1, "oid": "ab" * 20}).encode()
    path = f"/api/models/org/name/tree/{repo.refs['refs/heads/main']}"
    hub.script(path, Answer(200, (), b"[" + b",".join([entry] * 1_000_000) + b"]"))
    error = await refused(hub, "org/name")
    assert str(MAX_PAGE_BYTES) in str(error)
    hub.script(path, Answer(200, (), b"[" + b",".join([b"{}"] * 1_000_000) + b"]"))
    assert "values" in str(await refused(hub, "org/name"))
    # In pages that are small enough: no more of them are asked for than can count.
    small = b"[" + b",".join([b"{}"] * 50_000) + b"]"
    hub.script(path, *[Answer(200, (("Link", f'<{path}?c={n}>; rel="next"'),), small) for n in range(20)])
    error = await refused(hub, "org/name")
    assert str(MAX_ENTRIES) in str(error)
    assert len(hub.requests("/tree/")) == 2 + MAX_ENTRIES // 50_000 + 1
    assert MAX_PAGES * 100 == MAX_ENTRIES


# ---- chunk lists


def listed(*paths: str) -> dict[str, bytes]:
    files = {path: FILES[path] for path in paths}
    for path in paths:
        files[f"{path}.meta4"] = chunk_list(FILES[path], [], name=path.rpartition("/")[2])
    return files


async def test_a_list_in_the_revision_is_used_and_trusted(hub: Hub) -> None:
    hub.repo("org/name").commit({**FILES, **listed("model.gguf", "config.json")})
    async with source_for(hub, policy=Policy.STRICT) as source:
        blobs = by_path(await source.resolve(parse_ref("hf://org/name")))
        weights = blobs["model.gguf"]
        assert weights.initial_trust is Trust.ATTESTED
        assert weights.shape.chunk_length == CHUNK
        assert weights.chunk_list is not None
        assert weights.chunk_list.digest_of(0) == hashlib.sha256(WEIGHTS[:CHUNK]).digest()
        assert await read(source, weights) == WEIGHTS
        config = blobs["config.json"]
        assert config.sha256 == hashlib.sha256(FILES["config.json"]).digest()
        assert (config.git_sha1, config.initial_trust) == (None, Trust.ATTESTED)
    alone = await resolved(hub, "org/name/model.gguf", policy=Policy.STRICT)
    assert alone.entries[0].blob == weights


async def test_a_list_for_another_file_is_refused(hub: Hub) -> None:
    files = {"model.gguf": WEIGHTS, "model.gguf.meta4": chunk_list(WEIGHTS[::-1], [], name="model.gguf")}
    hub.repo("org/name").commit(files)
    with pytest.raises(IntegrityError, match="another SHA-256"):
        await resolved(hub, "org/name")
    hub.repo("org/name").commit({**files, "model.gguf": WEIGHTS[1:]})
    with pytest.raises(ChunkListError, match="is for 2500000 bytes"):
        await resolved(hub, "org/name")


async def test_a_list_that_is_not_the_one_of_the_revision_is_refused(hub: Hub) -> None:
    repo = hub.repo("org/name")
    sha = repo.commit(listed("model.gguf"))
    other = chunk_list(WEIGHTS, [], chunk_length=2 * CHUNK, name="model.gguf")
    assert len(other) > 0
    hub.script(f"/org/name/resolve/{sha}/model.gguf.meta4", Answer(200, (), other))
    with pytest.raises(IntegrityError, match="not the file that its revision lists"):
        await resolved(hub, "org/name")
    repo.commit({"model.gguf": WEIGHTS, "model.gguf.meta4": bytes(17 * MIB)})
    with pytest.raises(ChunkListError, match="cannot be what its name says"):
        await resolved(hub, "org/name")


async def test_what_only_looks_like_a_list_is_ignored(hub: Hub) -> None:
    hub.repo("org/name").commit({"model.gguf": WEIGHTS, "model.gguf.meta4": b"notes"})
    assert by_path(await resolved(hub, "org/name"))["model.gguf"].chunk_list is None


async def test_the_number_of_lists_is_bounded(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(hf, "MAX_LISTS", 1)
    hub.repo("org/name").commit(listed("model.gguf", "config.json"))
    blobs = by_path(await resolved(hub, "org/name"))
    assert blobs["model.gguf"].chunk_list is not None  # the larger one
    assert blobs["config.json"].chunk_list is None
    assert "2 chunk lists" in caplog.text
    assert len(hub.requests("/resolve/")) == 1


async def test_the_same_content_needs_one_list(hub: Hub) -> None:
    files = listed("model.gguf")
    hub.repo("org/name").commit(
        {**files, "a.gguf": WEIGHTS, "z.gguf": WEIGHTS, "z.gguf.meta4": files["model.gguf.meta4"]}
    )
    blobs = by_path(await resolved(hub, "org/name"))
    assert blobs["a.gguf"] is blobs["model.gguf"] is blobs["z.gguf"]
    assert blobs["a.gguf"].chunk_list is not None
    assert len(hub.requests("/resolve/")) == 1


async def test_signed_lists(hub: Hub, keys: dict[str, tuple[str, str]]) -> None:
    repo = hub.repo("org/name")
    document = chunk_list(WEIGHTS, [], name="model.gguf")
    trusted = {"trusted_keys": (keys["publisher"][0],)}

    async def list_of(signature: bytes, **more: object) -> tuple[bool, str]:
        repo.commit({**listed("model.gguf"), "model.gguf.meta4.minisig": signature})
        found = by_path(await resolved(hub, "org/name", **more))["model.gguf"].chunk_list
        assert found is not None
        return found.trusted, found.signer

    by_publisher = sign(document, keys["publisher"][1], None).encode()
    by_stranger = sign(document, keys["stranger"][1], None).encode()
    ok, signer = await list_of(by_publisher, **trusted, policy=Policy.STRICT)
    assert ok
    assert len(signer) == 16
    assert await list_of(by_publisher) == (True, "")  # nobody's key is pinned: the place vouches
    assert await list_of(by_stranger, **trusted) == (False, "")
    with pytest.raises(SignatureError):
        await list_of(by_stranger, **trusted, policy=Policy.STRICT)
    for bad in (sign(document + b" ", keys["publisher"][1], None).encode(), by_publisher[:80], b"notes"):
        with pytest.raises(SignatureError):
            await list_of(bad, **trusted)
    with pytest.raises(ChunkListError, match="cannot be what"):
        await list_of(bytes(100_000), **trusted)


async def test_a_list_that_anybody_on_the_way_can_have_written(hub: Hub) -> None:
    files = {"model.gguf": WEIGHTS, "config.json": FILES["config.json"]}
    lists = {f"{path}.meta4": chunk_list(data, [], name=path) for path, data in files.items()}
    hub.repo("org/name").commit({**files, **lists})
    public = fetch_settings(hub, hf_endpoint=hub.endpoint.replace("127.0.0.1", "hub.test"))
    async with HfSource(HttpClient(public, backend=Elsewhere())) as source:
        blobs = by_path(await source.resolve(parse_ref("hf://org/name")))
    assert {blob.initial_trust for blob in blobs.values()} == {Trust.PROVISIONAL}
    assert blobs["model.gguf"].chunk_list is not None
    # Its SHA-256 is worth no more than git's name, which the Hub itself gave.
    assert blobs["config.json"].git_sha1 == bytes.fromhex(git_oid(FILES["config.json"]))
    assert blobs["config.json"].sha256 is None
    async with HfSource(HttpClient(replace(public, policy=Policy.STRICT), backend=Elsewhere())) as source:
        with pytest.raises(SignatureError, match="trusted_keys"):
            await source.resolve(parse_ref("hf://org/name"))


async def test_policy_strict_without_lists(hub: Hub, repo: Repo) -> None:
    """Every file has a digest, so every file can become verified."""
    blobs = by_path(await resolved(hub, "org/name", policy=Policy.STRICT))
    assert {blob.policy for blob in blobs.values()} == {Policy.STRICT}


async def test_mirrors_of_a_list_at_a_public_hub_may_not_be_private(hub: Hub) -> None:
    urls = ["https://mirror.test/m", "http://10.0.0.1/m", "http://127.0.0.1:1/m"]
    document = chunk_list(WEIGHTS, urls, name="model.gguf")
    hub.repo("org/name").commit({"model.gguf": WEIGHTS, "model.gguf.meta4": document})
    public = fetch_settings(hub, hf_endpoint=hub.endpoint.replace("127.0.0.1", "hub.test"))
    async with HfSource(HttpClient(public, backend=Elsewhere())) as source:
        blob = by_path(await source.resolve(parse_ref("hf://org/name")))["model.gguf"]
    assert [mirror.url.partition("/")[2].split("/")[1].partition(":")[0] for mirror in blob.mirrors] == [
        "mirror.test",
        "hub.test",
    ]


async def test_a_list_that_the_user_names(hub: Hub, repo: Repo, tmp_path: Path) -> None:
    path = tmp_path / "list.meta4"
    path.write_bytes(chunk_list(WEIGHTS, [], name="model.gguf"))
    blob = (await resolved(hub, "org/name/model.gguf", chunks=str(path))).entries[0].blob
    assert blob.initial_trust is Trust.ATTESTED
    with pytest.raises(RefError, match="selects 2 files"):
        await resolved(hub, "org/name/parts", chunks=str(path))
    with pytest.raises(ChunkListError, match="cannot be read"):
        await resolved(hub, "org/name/model.gguf", chunks=str(tmp_path / "none"))


# ---- any answer at all

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
good_entries = st.fixed_dictionaries(
    {
        "type": st.sampled_from(["file", "directory"]),
        "path": st.sampled_from(["a", "a/b", "c.gguf", "d/e"]),
        "size": st.integers(0, 2),
        "oid": st.sampled_from(["ab" * 20, "cd" * 20]),
    }
)
entries = st.fixed_dictionaries(
    {},
    optional={
        "type": st.sampled_from(["file", "directory", "submodule"]) | json_values,
        "path": st.sampled_from(["a", "a/b", "../x", "/etc", "a//b", "x" * 300, "a\0"]) | json_values,
        "size": st.integers(-1, 2**60) | json_values,
        "oid": st.sampled_from(["ab" * 20, "AB" * 20, ""]) | json_values,
        "lfs": st.fixed_dictionaries({"oid": st.just("cd" * 32), "size": st.integers(0, 9)}) | json_values,
        "xetHash": st.just("ef" * 32) | json_values,
    },
)


@settings(max_examples=25, suppress_health_check=[HealthCheck.too_slow])
@given(
    info=st.just({"sha": "12" * 20})
    | st.fixed_dictionaries({"sha": json_values, "gated": json_values})
    | json_values,
    pages=st.lists(st.lists(good_entries | entries, max_size=3) | json_values, max_size=3),
    link=st.text(st.characters(min_codepoint=33, max_codepoint=126), max_size=20),
)
def test_any_answers_make_a_manifest_or_one_of_our_errors(
    shared_hub: Hub, info: object, pages: list[object], link: str
) -> None:
    hub = shared_hub
    hub._scripts.clear()
    hub.script("/api/models/org/name/revision/main", Answer(200, (), json.dumps(info).encode()))
    sha = info["sha"] if isinstance(info, dict) and isinstance(info.get("sha"), str) else ""
    path = f"/api/models/org/name/tree/{sha}"
    for number, value in enumerate(pages):
        headers = (
            (("Link", f'<{path}?cursor={number}{link}>; rel="next"'),) if number + 1 < len(pages) else ()
        )
        hub.script(path, Answer(200, headers, json.dumps(value).encode()))
    try:
        manifest = trio.run(resolved, hub, "org/name")
    except (SourceError, IntegrityError):
        return
    assert manifest.revision == sha
    assert {entry.path for entry in manifest.entries} == {file.path for file in read_raw(manifest.raw).files}


@pytest.fixture(scope="module")
def shared_hub() -> Iterator[Hub]:
    with Hub() as running:
        yield running


# ---- with an engine


def engine_settings(hub: Hub, **more: object) -> EngineSettings:
    return EngineSettings(workers=1, fill=FillMode.NEVER, fetch=fetch_settings(hub, **more))


async def test_an_engine_with_worker_processes_fetches_and_seals(hub: Hub, tmp_path: Path) -> None:
    data = random.Random(2).randbytes(9 * MIB + 77)
    repo = hub.repo("org/name", private=True)
    repo.commit({"model.gguf": data, "README.md": b"text"})
    ref, whole = parse_ref("hf://org/name@main/model.gguf"), parse_ref("hf://org/name")
    async with running_engine(tmp_path / "cache", engine_settings(hub, hf_token=TOKEN)) as engine:
        blob = (await engine.add(ref)).entries[0].blob
        assert await engine.read(blob.id, ByteSpan(MIB - 5, MIB + 5)) == data[MIB - 5 : MIB + 5]
        hub.expire_links()  # amid the download: every signed URL is refused from now on
        await engine.complete(str(ref))
        assert engine.blob_status(blob.id).trust == Trust.VERIFIED
        assert await engine.read(blob.id, ByteSpan(0, len(data))) == data
        blobs = by_path(await engine.add(whole))
        await engine.complete(str(whole))
        assert {engine.blob_status(blob.id).trust for blob in blobs.values()} == {"verified"}
        assert await engine.read(blobs["README.md"].id, ByteSpan(0, 4)) == b"text"
    assert not told_the_token(hub.cdn_seen)
    assert len(told_the_token(hub.requests("/resolve/"))) >= 2
    assert not told_the_token([replace(seen, headers={}) for seen in hub.seen])


async def test_a_branch_that_moves_is_not_followed_until_asked(hub: Hub, tmp_path: Path) -> None:
    repo = hub.repo("org/name")
    first = repo.commit({"model.gguf": WEIGHTS})
    ref = parse_ref("hf://org/name/model.gguf")
    async with running_engine(tmp_path / "cache", engine_settings(hub)) as engine:
        blob = (await engine.add(ref)).entries[0].blob
        second = repo.commit({"model.gguf": WEIGHTS[::-1]})
        assert (await engine.add(ref)).revision == first
        await engine.complete(str(ref))
        assert await engine.read(blob.id, ByteSpan(0, blob.size)) == WEIGHTS
        manifest = await engine.add(ref, refresh=True)
        assert manifest.revision == second
        await engine.complete(str(ref))
        moved = manifest.entries[0].blob
        assert await engine.read(moved.id, ByteSpan(0, moved.size)) == WEIGHTS[::-1]


async def test_what_was_added_is_served_without_the_hub(tmp_path: Path) -> None:
    ref = parse_ref("hf://org/name")
    with Hub() as hub:
        hub.repo("org/name").commit({"model.gguf": WEIGHTS})
        async with running_engine(tmp_path / "cache", engine_settings(hub)) as engine:
            manifest = await engine.add(ref)
            await engine.complete(str(ref))
        off = engine_settings(hub)
    async with running_engine(tmp_path / "cache", off) as engine:
        again = await engine.add(ref)
        assert (again.revision, again.tree) == (manifest.revision, manifest.tree)
        blob = again.entries[0].blob
        assert await engine.read(blob.id, ByteSpan(0, blob.size)) == WEIGHTS
