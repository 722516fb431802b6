"""Who adds a ref may be cancelled (a lookup has its time): then it is there and shown, or it is not there."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import trio

from weightfs.core.manifest import Manifest
from weightfs.core.ref import parse_ref
from weightfs.engine.blobs import BlobState
from weightfs.testing.engines import running_engine


async def test_a_ref_that_was_written_down_is_shown_although_its_adder_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = b"one content" * 1000
    refs = []
    for name in ("a.gguf", "b.gguf"):  # one blob: the second is adopted, not begun
        (tmp_path / name).write_bytes(data)
        refs.append(parse_ref(f"{tmp_path / name}#sha256={hashlib.sha256(data).hexdigest()}"))
    async with running_engine(tmp_path / "cache") as engine:
        await engine.add(refs[0])
        shown: list[tuple[Manifest, ...]] = []
        engine.on_change = lambda: shown.append(tuple(engine.manifests()))
        put, adopt = engine._parts.catalog.put, engine._parts.holdings.adopt
        with trio.CancelScope() as scope:

            async def put_and_give_up(manifest: Manifest) -> object:
                states = await put(manifest)
                scope.cancel()
                return states

            async def adopt_slowly(state: BlobState) -> None:
                await trio.lowlevel.checkpoint()
                await adopt(state)

            monkeypatch.setattr(engine._parts.catalog, "put", put_and_give_up)
            monkeypatch.setattr(engine._parts.holdings, "adopt", adopt_slowly)
            await engine.browse(refs[1])
        assert scope.cancelled_caught
        assert [manifest.ref for manifest in shown[-1]] == [str(ref) for ref in refs]
