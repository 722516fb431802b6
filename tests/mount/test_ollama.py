"""What the Ollama server reads at its start, on a read-only mount with no network."""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from weightfs.testing.models import ModelShape, make_gguf
from weightfs.testing.mounts import FakeMount, can_mount
from weightfs.testing.ollama_reads import BUFFER, read_header

pytestmark = [
    pytest.mark.mount,
    pytest.mark.skipif(not can_mount(), reason="needs /dev/fuse and CAP_SYS_ADMIN"),
]

SHAPE = ModelShape(dim=256, layers=8, ff=1024)  # 33 MB: far more than a window of read-ahead
KERNEL_WINDOW = 2 * 4096 << 10  # `read_ahead_kib`, and the asynchronous window after it
NAMES = ("tiny:8b", "user/tiny:latest", "hf.co/Org/Tiny-GGUF:Q4_K_M")


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("shelf")
    make_gguf(directory / "model.gguf", SHAPE)
    (directory / "config.json").write_text(json.dumps({"model_format": "gguf", "model_family": "llama"}))
    (directory / "template").write_text("{{ .Prompt }}")
    (directory / "params.json").write_text(json.dumps({"stop": ["</s>"]}))
    return directory


@pytest.fixture
def mounted() -> Iterator[FakeMount]:
    with (
        tempfile.TemporaryDirectory() as place,
        FakeMount(Path(place).resolve(), {}, every_layout=True) as server,
    ):
        yield server.ready()


def read(mounted: FakeMount) -> list[dict[str, Any]]:
    argv = [sys.executable, "-m", "weightfs.testing.ollama_reads", str(mounted.mountpoint / "ollama")]
    models: list[dict[str, Any]] = json.loads(mounted.finish(mounted.command(argv)))
    return models


def test_an_empty_store_is_a_store(mounted: FakeMount) -> None:
    assert read(mounted) == []


def test_every_model_is_listed_and_no_tensor_is_read(mounted: FakeMount, shelf: Path) -> None:
    files = {path.name: str(path) for path in shelf.iterdir()}
    for name in NAMES:
        mounted.call("put", ref=f"ollama://{name}", files=files)
    models = read(mounted)
    assert sorted(model["name"] for model in models) == [
        "hf.co/Org/Tiny-GGUF/Q4_K_M",
        "registry.ollama.ai/library/tiny/8b",
        "registry.ollama.ai/user/tiny/latest",
    ]
    header = read_header(shelf / "model.gguf")
    size = sum(path.stat().st_size for path in shelf.iterdir())
    for model in models:
        assert model["size"] == size
        (seen,) = model["headers"]
        assert (seen["end"], seen["tensors"], seen["architecture"]) == (header.end, header.tensors, "llama")
    assert 0 < header.tokenizer < header.end < BUFFER
    stats = mounted.call("stats")
    spans = stats["spans"]["ollama/library/tiny/8b/model.gguf"]
    assert max(stop for _, stop in spans) <= header.end + KERNEL_WINDOW < size_of_weights(shelf) / 2
    assert stats["failed_reads"] == stats["internal_errors"] == 0


def test_the_models_id_is_that_of_the_registrys_bytes(mounted: FakeMount, shelf: Path) -> None:
    files = {path.name: str(path) for path in shelf.iterdir()}
    mounted.call("put", ref="ollama://tiny:8b", files=files)
    code = "sys.stdout.write(open(os.path.join(root, 'ollama/manifests/registry.ollama.ai/library/tiny/8b')).read())"
    raw = mounted.run(code)
    (model,) = read(mounted)
    assert model["id"] == hashlib.sha256(raw.encode()).hexdigest()[:12]
    document = json.loads(raw)
    assert {layer["size"] for layer in document["layers"]} >= {size_of_weights(shelf)}


def size_of_weights(shelf: Path) -> int:
    return (shelf / "model.gguf").stat().st_size
