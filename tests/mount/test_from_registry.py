"""From a real registry, through the real daemon, to what Ollama reads: online once, then with the registry gone."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from weightfs.testing.daemon import Daemon
from weightfs.testing.models import ModelShape, make_gguf
from weightfs.testing.mounts import can_mount
from weightfs.testing.registry import DockerRegistry, Layer, push_oci, push_ollama

pytestmark = [
    pytest.mark.mount,
    pytest.mark.skipif(not can_mount(), reason="needs /dev/fuse and CAP_SYS_ADMIN"),
]

SHAPE = ModelShape(dim=256, layers=8, ff=1024)  # 33 MB


def read(daemon: Daemon, store: Path) -> list[dict[str, Any]]:
    argv = [sys.executable, "-m", "weightfs.testing.ollama_reads", str(store)]
    models: list[dict[str, Any]] = json.loads(daemon.finish(daemon.command(argv)))
    return models


@pytest.fixture
def gguf(tmp_path: Path) -> bytes:
    make_gguf(tmp_path / "m.gguf", SHAPE)
    return (tmp_path / "m.gguf").read_bytes()


@pytest.fixture
def registry() -> Iterator[DockerRegistry]:
    with DockerRegistry() as registry:
        yield registry


def test_ollama_starts_on_the_mount_and_on_a_linked_store_offline(
    registry: DockerRegistry, gguf: bytes, tmp_path: Path
) -> None:
    params = json.dumps({"stop": ["</s>"]}).encode()
    digest = push_ollama(
        registry, "library/tiny:8b", {"model": gguf, "template": b"{{ .Prompt }}", "params": params}
    )
    push_ollama(registry, "user/other:latest", {"model": gguf})
    refs = [f"ollama://{registry.host}/{name}" for name in ("library/tiny:8b", "user/other:latest")]
    store = tmp_path / "store"
    with Daemon(tmp_path / "daemon", *refs, options=["--workers", "0", "--fill", "never"]) as daemon:
        mounted = daemon.start().mountpoint / "ollama"
        online = read(daemon, mounted)
        names = [f"{registry.host}/{name}" for name in ("library/tiny/8b", "user/other/latest")]
        assert sorted(model["name"] for model in online) == names
        assert online[0]["id"] == digest.removeprefix("sha256:")[:12]
        (file,) = [
            file for ref in daemon.status()["refs"][1:] for file in ref["files"] if file["size"] == len(gguf)
        ]
        assert file["present_bytes"] < len(gguf) / 2  # of the weights little more than the header
        told = daemon.cli("link", "ollama", str(store), "--json")
        assert json.loads(told.stdout)["linked"] == names
        registry.stop()
        assert read(daemon, mounted) == online
        (store / "manifests-v2").mkdir()
        assert read(daemon, store) == online
        daemon.stop()
        daemon.start()
        assert read(daemon, mounted) == online
        blob = store / "blobs" / f"sha256-{hashlib.sha256(gguf).hexdigest()}"
        assert os.readlink(blob) == str(mounted / "blobs" / blob.name)


LOOK = """
import errno, json, os, sys
codes = {}
for name in sys.argv[2:]:
    try: codes[name] = sorted(os.listdir(os.path.join(sys.argv[1], name)))
    except OSError as error: codes[name] = errno.errorcode[error.errno]
print(json.dumps(codes))
"""


def test_naming_a_path_is_enough_and_only_the_registrys_word_is_enoent(
    registry: DockerRegistry, tmp_path: Path
) -> None:
    push_ollama(registry, "library/tiny:8b", {"model": b"GGUF, but not really"})
    push_oci(registry, "ai/tiny:1.0", [Layer.titled("model.gguf", b"GGUF, but not really")])
    with Daemon(tmp_path / "daemon", options=["--workers", "0", "--browse", "--retry", "0"]) as daemon:
        models = daemon.start().mountpoint / "models"

        def look(*names: str) -> list[Any]:
            told = daemon.finish(daemon.command([sys.executable, "-c", LOOK, str(models), *names]))
            return list(json.loads(told).values())

        here, oci = f"ollama/{registry.host}/library/tiny", f"oci/{registry.host}/ai"
        (files,) = look(f"{here}/8b")
        assert "model.gguf" in files
        assert look(f"{oci}/tiny/1.0", oci, f"{here}/9b", f"{oci}/none/1.0", f"{here}/.git") == [
            ["model.gguf"],
            ["tiny"],
            "ENOENT",
            "ENOENT",
            "ENOENT",
        ]
        assert {ref["ref"] for ref in daemon.status()["refs"]} == {
            f"ollama://{registry.host}/library/tiny:8b",
            f"oci://{registry.host}/ai/tiny:1.0",
        }
        registry.stop()
        assert look(f"{here}/8b", f"{here}/10b", f"{here}/9b") == [files, "EIO", "ENOENT"]
