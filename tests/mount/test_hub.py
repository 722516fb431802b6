"""A repository of the Hub, from the API to the Hub's own client: the real daemon on a real mount, and a local Hub."""

from __future__ import annotations

import hashlib
import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from weightfs.testing.daemon import Daemon
from weightfs.testing.hub import Hub
from weightfs.testing.mounts import can_mount

pytestmark = [
    pytest.mark.mount,
    pytest.mark.skipif(not can_mount(), reason="needs /dev/fuse and CAP_SYS_ADMIN"),
]

TOKEN = "hf_wHbMountTokenNobodyElseHas"
WEIGHTS = random.Random(3).randbytes(3_000_000)
FILES = {
    "README.md": b"# A model\n",
    "config.json": b'{"model_type": "llama"}',
    "model.gguf": WEIGHTS,
    "sub dir/weights.safetensors": WEIGHTS[:70_000],
}

# Offline, from the mount alone: where a snapshot is, and what is in it.
SNAPSHOT = """
import hashlib, json, os, sys
os.environ.update(HF_HUB_CACHE=sys.argv[1], HF_HOME=sys.argv[2], HF_HUB_OFFLINE="1", HF_HUB_DISABLE_PROGRESS_BARS="1")
from pathlib import Path
from huggingface_hub import hf_hub_download, snapshot_download
path = Path(snapshot_download("org/name"))
found = {str(p.relative_to(path)): hashlib.sha256(p.read_bytes()).hexdigest() for p in path.rglob("*") if p.is_file()}
print(json.dumps([path.name, found, Path(hf_hub_download("org/name", "config.json")).read_text()]))
"""


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with Hub(tokens={TOKEN}) as running:
        monkeypatch.setenv("HF_ENDPOINT", running.endpoint)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield running


def snapshot(daemon: Daemon, home: Path) -> Any:
    cache = daemon.mountpoint / "huggingface" / "hub"
    return json.loads(daemon.finish(daemon.command([sys.executable, "-c", SNAPSHOT, str(cache), str(home)])))


def digests(files: dict[str, bytes]) -> dict[str, str]:
    return {path: hashlib.sha256(data).hexdigest() for path, data in files.items()}


def test_the_hubs_client_reads_a_private_repository_from_the_mount(hub: Hub, tmp_path: Path) -> None:
    repo = hub.repo("org/name", private=True)
    first = repo.commit(FILES)
    with Daemon(tmp_path, "hf://org/name", options=["--fill", "never"]) as daemon:
        daemon.start()
        assert snapshot(daemon, tmp_path) == [first, digests(FILES), FILES["config.json"].decode()]

        # The branch moves on, and is followed when somebody asks for it.
        changed = {**FILES, "config.json": b'{"model_type": "qwen"}'}
        second = repo.commit(changed)
        assert daemon.cli("pull", "--refresh", "hf://org/name").returncode == 0
        assert snapshot(daemon, tmp_path) == [second, digests(changed), '{"model_type": "qwen"}']

        # A repository that this token may not read: the way out, in one line, and in code 3.
        hub.repo("org/gated", gated="manual").commit(FILES)
        refused = daemon.cli("pull", "hf://org/gated")
        assert refused.returncode == 3
        assert f"accept its licence at {hub.endpoint}/org/gated" in refused.stderr

        # What is here needs nobody, also in the daemon's next life.
        assert daemon.stop() == 0
        asked = len(hub.seen) + len(hub.cdn_seen)
        daemon.start()
        assert snapshot(daemon, tmp_path) == [second, digests(changed), '{"model_type": "qwen"}']
        assert len(hub.seen) + len(hub.cdn_seen) == asked
        everything = daemon.log + json.dumps(daemon.status()) + refused.stderr
        assert TOKEN not in everything
        assert daemon.stop() == 0
    assert hub.cdn_seen
    assert all(TOKEN not in str(seen) for seen in hub.cdn_seen)
