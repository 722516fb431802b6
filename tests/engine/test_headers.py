"""Headers first: what is fetched when a ref is pinned, what is then known, and where the tensors lie."""

from __future__ import annotations

import json
import logging
import random
import re
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import trio

from weightfs.core.geometry import MIB, BlobShape, ByteSpan
from weightfs.core.gguf import read_gguf
from weightfs.core.manifest import Entry, Manifest, Mirror, Policy, Trust
from weightfs.core.ref import Ref
from weightfs.core.tensors import Header, ModelInfo
from weightfs.engine.details import HeaderState
from weightfs.engine.engine import Engine
from weightfs.engine.headers import MAX_FAILURES
from weightfs.engine.settings import EngineSettings, FillMode
from weightfs.errors import FailureKind, ReadError
from weightfs.testing.engines import running_engine
from weightfs.testing.models import ModelShape, make_gguf, make_safetensors
from weightfs.testing.sources import Failing, FlakySource, MemorySource

LAZY = EngineSettings(workers=0, fill=FillMode.NEVER, read_timeout=20, headers_first=True)
SHAPE = ModelShape(dim=192, layers=4, ff=384)  # 6 MB
CONFIG = json.dumps({"architectures": ["LlamaForCausalLM"], "max_position_embeddings": 512}).encode()
REF = Ref("memory", "memory://repo", "memory://repo", None)
BOUND = 30.0  # seconds; a hang becomes a failure


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("models")
    make_gguf(folder / "m.gguf", SHAPE)
    make_safetensors(folder / "m.safetensors", SHAPE)
    out = gguf.GGUFWriter(folder / "wordy.gguf", "llama")
    out.add_token_list([b"a token of some length, number %d" % number for number in range(70_000)])  # 2.9 MB
    out.add_tensor("blk.0.w", np.ones((1024, 1024), np.float32))
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@dataclass
class Repo(MemorySource):
    """A ref with many files; `spans` are members of tars."""

    spans: dict[str, tuple[str, ByteSpan]] = field(default_factory=dict)
    gate: trio.Event | None = None

    async def resolve(self, ref: Ref) -> Manifest:
        await trio.lowlevel.checkpoint()
        entries = [Entry(name, self.blob(name)) for name in self.files]
        entries += [Entry(name, self.blob(tar), span) for name, (tar, span) in self.spans.items()]
        return Manifest(ref.text, "1", "memory/repo", tuple(entries))

    @asynccontextmanager
    async def _open(
        self, mirror: Mirror, shape: BlobShape, span: ByteSpan
    ) -> AsyncIterator[AsyncIterator[bytes]]:
        if self.gate is not None:
            await self.gate.wait()
        async with super()._open(mirror, shape, span) as body:
            yield body

    def fetched(self, name: str) -> int:
        """The end of what was asked for of a file."""
        return max((span.stop for url, span in self.opened if url == f"memory://{name}"), default=0)


@dataclass
class Stage:
    """A cache directory, and engines on it whose origin is `repo`, one after another."""

    root: Path
    monkeypatch: pytest.MonkeyPatch

    @asynccontextmanager
    async def engine(
        self,
        repo: Repo,
        settings: EngineSettings = LAZY,
        *,
        failing: Failing | None = None,
        calm: bool = True,
    ) -> AsyncIterator[Engine]:
        def open_source(_scheme: str, _settings: object) -> Any:
            return repo if failing is None else FlakySource(repo, lambda *_: failing)

        for user in ("parts", "worker"):
            self.monkeypatch.setattr(f"weightfs.engine.{user}.open_source", open_source)
        async with running_engine(self.root / "cache", settings, calm=calm) as engine:
            with trio.fail_after(BOUND):
                yield engine


@pytest.fixture
def stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stage:
    return Stage(tmp_path, monkeypatch)


def repo_of(models: Mapping[str, bytes], *names: str, attested: bool = True, **more: bytes) -> Repo:
    files = {name: models[name] for name in names}
    return Repo({**files, **{name.replace("_", "."): data for name, data in more.items()}}, attested)


def header_of(data: bytes) -> Header:
    header = read_gguf(data, len(data))
    assert isinstance(header, Header)
    return header


async def test_pinning_fetches_small_files_and_headers_and_no_more(
    stage: Stage, models: dict[str, bytes]
) -> None:
    repo = repo_of(models, *models, config_json=CONFIG, LICENSE=b"MIT", empty_json=b"")
    repo.files["data.bin"] = bytes(3 * MIB)
    async with stage.engine(repo) as engine:
        await engine.add(REF)
        assert await engine.headers_ready(REF.text)
    assert repo.fetched("config.json") == len(CONFIG)
    assert repo.fetched("LICENSE") == 3
    assert repo.fetched("m.gguf") == MIB
    assert repo.fetched("m.safetensors") == MIB
    assert header_of(models["wordy.gguf"]).nbytes <= repo.fetched("wordy.gguf") <= 4 * MIB
    assert repo.fetched("data.bin") == 0
    assert repo.fetched("empty.json") == 0


async def test_who_only_looks_around_fetches_nothing(stage: Stage, models: dict[str, bytes]) -> None:
    repo = repo_of(models, "m.gguf", config_json=CONFIG)
    async with stage.engine(repo) as engine:
        await engine.add(REF, headers=False)
        assert await engine.headers_ready(REF.text, within=0)
    assert repo.opened == []


async def test_after_a_restart_what_is_there_is_not_fetched_again(
    stage: Stage, models: dict[str, bytes]
) -> None:
    repo = repo_of(models, "m.gguf", "wordy.gguf", config_json=CONFIG)
    async with stage.engine(repo) as engine:
        await engine.add(REF)
        await engine.headers_ready(REF.text)
    repo.opened.clear()
    async with stage.engine(repo) as engine:
        assert await engine.headers_ready(REF.text, within=0), "a start asks nobody"
        before = await engine.details(REF.text)
        await engine.add(REF)
        await engine.headers_ready(REF.text)
        assert await engine.details(REF.text) == before
    assert repo.opened == []


async def test_what_was_cut_short_is_fetched_by_the_next_add(stage: Stage, models: dict[str, bytes]) -> None:
    repo = repo_of(models, "m.gguf")
    repo.gate = trio.Event()
    async with stage.engine(repo, calm=False) as engine:
        await engine.add(REF)
        assert not await engine.headers_ready(REF.text, within=0.01)
    repo.gate = None
    async with stage.engine(repo) as engine:
        await engine.add(REF)
        await engine.headers_ready(REF.text)
        (file,) = (await engine.details(REF.text)).files
        assert file.header is HeaderState.READ


async def test_readers_go_on_while_an_origin_keeps_headers_back(
    stage: Stage, models: dict[str, bytes]
) -> None:
    first = repo_of(models, "m.gguf")
    async with stage.engine(first) as engine:
        manifest = await engine.add(REF)
        await engine.headers_ready(REF.text)
        first.gate = trio.Event()
        first.files["other.gguf"] = models["wordy.gguf"]
        await engine.add(REF, refresh=True)
        assert await engine.read(manifest.entries[0].blob.id, ByteSpan(0, 4)) == b"GGUF"
        assert not await engine.headers_ready(REF.text, within=0.01)
        first.gate.set()
        assert await engine.headers_ready(REF.text)


async def test_what_is_known_of_a_ref(stage: Stage, models: dict[str, bytes]) -> None:
    async with stage.engine(repo_of(models, "m.gguf", "m.safetensors", config_json=CONFIG)) as engine:
        await engine.add(REF)
        await engine.headers_ready(REF.text)
        details = await engine.details(REF.text)
    assert [model.name for model in details.models] == ["m.gguf", "m.safetensors"]
    ours, theirs = (model.info for model in details.models)
    tensors = header_of(models["m.gguf"]).tensors
    parameters = sum(tensor.elements for tensor in tensors)
    nbytes = sum(len(tensor.span) for tensor in tensors)
    assert ours == ModelInfo("gguf", "llama", "F32", 512, parameters, len(tensors), nbytes)
    assert theirs == replace(ours, format="safetensors", architecture="LlamaForCausalLM")
    assert [file.header for file in details.files] == [HeaderState.READ, HeaderState.READ, HeaderState.NONE]
    first = details.files[0]
    assert first.path == "models/memory/repo/m.gguf"
    assert (first.size_bytes, first.cached_bytes, first.verified_bytes) == (len(models["m.gguf"]), MIB, MIB)
    assert first.trust == Trust.ATTESTED
    assert details.files[2].verified_bytes == len(CONFIG)


async def test_shards_are_one_model(stage: Stage, models: dict[str, bytes]) -> None:
    listing = json.dumps({"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}).encode()
    data = models["m.safetensors"]
    files = {"one.safetensors": data, "two.safetensors": data, "model.safetensors.index.json": listing}
    async with stage.engine(Repo(files)) as engine:
        await engine.add(REF)
        await engine.headers_ready(REF.text)
        (model,) = (await engine.details(REF.text)).models
    assert model.name == "model.safetensors"
    assert len(model.files) == 2
    assert model.info.tensor_count == 2 * len(header_of(models["m.gguf"]).tensors)


async def test_a_header_is_fetched_only_when_it_is_asked_for(stage: Stage, models: dict[str, bytes]) -> None:
    repo = repo_of(models, "wordy.gguf", "m.safetensors")
    async with stage.engine(repo) as engine:
        manifest = await engine.add(REF, headers=False)
        await engine.read(manifest.entries[0].blob.id, ByteSpan(0, 10))
        repo.opened.clear()
        details = await engine.details(REF.text)
        assert {(file.header, file.problem) for file in details.files} == {
            (HeaderState.MISSING, "header not cached yet")
        }
        assert [(model.unread, model.info.tensor_count) for model in details.models] == [(1, 0), (1, 0)]
        assert repo.opened == []
        details = await engine.details(REF.text, fetch=True)
        assert [model.info.tensor_count for model in details.models] == [
            len(header_of(models["m.gguf"]).tensors),
            1,
        ]
        assert repo.fetched("wordy.gguf") <= 4 * MIB
        assert details == await engine.details(REF.text)


async def test_a_header_in_chunks_that_a_reader_fetched(stage: Stage, models: dict[str, bytes]) -> None:
    data = models["wordy.gguf"]
    async with stage.engine(repo_of(models, "wordy.gguf")) as engine:
        manifest = await engine.add(REF, headers=False)
        await engine.read(manifest.entries[0].blob.id, ByteSpan(0, header_of(data).nbytes))
        (file,) = (await engine.details(REF.text)).files
        assert file.header is HeaderState.READ


async def test_the_map_counts_what_is_there(stage: Stage, models: dict[str, bytes]) -> None:
    data = models["m.gguf"]
    async with stage.engine(repo_of(models, "m.gguf", attested=False)) as engine:
        manifest = await engine.add(REF)
        blob = manifest.entries[0].blob
        await engine.headers_ready(REF.text)
        await engine.read(blob.id, ByteSpan(3 * MIB, 3 * MIB + 1))
        (file,) = (await engine.tensor_map(REF.text))["files"]
        assert file["header_bytes"] == header_of(data).nbytes
        for row, tensor in zip(file["tensors"], header_of(data).tensors, strict=True):
            there = ((0, MIB), (3 * MIB, 4 * MIB))
            expected = sum(
                max(0, min(stop, tensor.span.stop) - max(start, tensor.span.start)) for start, stop in there
            )
            assert row == {
                "name": tensor.name,
                "dtype": "F32",
                "shape": list(tensor.shape),
                "offset": tensor.span.start,
                "size_bytes": len(tensor.span),
                "cached_bytes": expected,
                "verified_bytes": 0,
            }
        await engine.complete(REF.text)
        (file,) = (await engine.tensor_map(REF.text, layers=True))["files"]
        names = [layer["name"] for layer in file["layers"]]
        assert [name for name in names if "blk" in name] == [f"blk.{layer}" for layer in range(SHAPE.layers)]
        for layer in file["layers"]:
            assert layer["verified_bytes"] == layer["cached_bytes"] == layer["size_bytes"]
        assert sum(layer["tensor_count"] for layer in file["layers"]) == len(header_of(data).tensors)


async def test_what_an_unclean_stop_made_suspect_is_cached_and_not_verified(
    stage: Stage, models: dict[str, bytes]
) -> None:
    async with stage.engine(repo_of(models, "m.gguf")) as engine:
        manifest = await engine.add(REF)
        await engine.complete(REF.text)
        engine._parts.catalog.state(manifest.entries[0].blob.id).suspect.add(2)
        (file,) = (await engine.details(REF.text)).files
        assert (file.cached_bytes, file.verified_bytes) == (file.size_bytes, file.size_bytes - MIB)


async def test_a_member_of_a_tar(stage: Stage, models: dict[str, bytes]) -> None:
    before, after = 5 * MIB // 2, 1000
    tar = bytes(before) + models["m.gguf"] + CONFIG + bytes(after)
    at = before + len(models["m.gguf"])
    spans = {
        "m.gguf": ("layer.tar", ByteSpan(before, at)),
        "config.json": ("layer.tar", ByteSpan(at, at + len(CONFIG))),
    }
    repo = Repo({"layer.tar": tar}, spans=spans)
    async with stage.engine(repo) as engine:
        await engine.add(REF)
        await engine.headers_ready(REF.text)
        details = await engine.details(REF.text)
        file = next(one for one in details.files if one.path.endswith("m.gguf"))
        assert file.header is HeaderState.READ
        assert (file.size_bytes, file.cached_bytes) == (
            len(models["m.gguf"]),
            MIB // 2 + (at - at // MIB * MIB),
        )
        one = next(file for file in (await engine.tensor_map(REF.text))["files"])
        first = one["tensors"][0]
        assert first["offset"] == header_of(models["m.gguf"]).tensors[0].span.start
        assert 0 < first["cached_bytes"] <= first["size_bytes"]


async def test_what_a_policy_withholds_is_not_fetched_for_its_header(
    stage: Stage, models: dict[str, bytes]
) -> None:
    repo = repo_of(models, "m.gguf", attested=False, config_json=CONFIG)
    async with stage.engine(repo, replace(LAZY, policy=Policy.HOLD)) as engine:
        await engine.add(REF)
        await engine.headers_ready(REF.text)
        for fetch in (False, True):
            details = await engine.details(REF.text, fetch=fetch)
            assert details.files[0].header is HeaderState.WITHHELD
            assert details.files[0].problem == "it is provisional, and the policy is hold"
        assert repo.fetched("m.gguf") == 0
        assert repo.fetched("config.json") == len(CONFIG)
        await engine.complete(REF.text)
        assert (await engine.details(REF.text)).files[0].header is HeaderState.READ


async def test_what_is_no_header(stage: Stage) -> None:
    noise = random.Random(1).randbytes(3 * MIB)
    repo = Repo({"m.gguf": noise, "m.safetensors": b"\x08" + noise})
    async with stage.engine(repo) as engine:
        await engine.add(REF)
        await engine.headers_ready(REF.text)
        details = await engine.details(REF.text)
        assert [file.header for file in details.files] == [HeaderState.MALFORMED] * 2
        assert details.files[0].problem == "the file does not begin as GGUF does"
        assert [file["tensors"] for file in (await engine.tensor_map(REF.text))["files"]] == [[], []]


async def test_an_origin_that_fails_fails_nothing_and_is_told_once(
    stage: Stage, models: dict[str, bytes], caplog: pytest.LogCaptureFixture
) -> None:
    repo = Repo({f"{number}.gguf": models["m.gguf"] + bytes([number]) for number in range(20)})
    with caplog.at_level(logging.INFO, logger="weightfs.engine.headers"):
        async with stage.engine(repo, failing=Failing(FailureKind.NOT_FOUND)) as engine:
            await engine.add(REF)
            assert await engine.headers_ready(REF.text)
            assert len({file.header for file in (await engine.details(REF.text)).files}) == 1
    told = [record for record in caplog.records if record.name == "weightfs.engine.headers"]
    assert len(told) == 1
    assert told[0].levelno == logging.INFO
    assert REF.text in told[0].getMessage()
    assert re.search(r"memory://\d\.gguf", told[0].getMessage()), "the mirror"


async def test_an_origin_that_fails_is_not_asked_for_every_file(
    stage: Stage, models: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    async def refuse(_: object, part: Any, *, fetch: bool) -> Header:
        asked.append((part.path, fetch))
        await trio.lowlevel.checkpoint()
        raise ReadError("no", kind=FailureKind.NOT_FOUND)

    monkeypatch.setattr("weightfs.engine.headers.Headers.read_header", refuse)
    repo = Repo({f"{number}.gguf": models["m.gguf"] + bytes([number]) for number in range(20)})
    async with stage.engine(repo) as engine:
        await engine.add(REF)
        await engine.headers_ready(REF.text)
    assert MAX_FAILURES <= len(asked) <= 2 * MAX_FAILURES


async def test_a_ref_that_is_removed_meanwhile(
    stage: Stage, models: dict[str, bytes], caplog: pytest.LogCaptureFixture
) -> None:
    repo = repo_of(models, "m.gguf", "wordy.gguf")
    repo.gate = trio.Event()
    async with stage.engine(repo) as engine:
        await engine.add(REF)
        repo.gate.set()
        await engine.remove(REF.text)
        assert await engine.headers_ready(REF.text)
        with pytest.raises(KeyError):
            await engine.details(REF.text)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


async def test_a_fault_of_ours_ends_no_engine(
    stage: Stage, models: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("weightfs.engine.headers.read_gguf", fail)
    async with stage.engine(repo_of(models, "m.gguf")) as engine:
        await engine.add(REF)
        assert await engine.headers_ready(REF.text)
        assert engine.refs()
    assert "by a fault of weightfs itself" in caplog.text
