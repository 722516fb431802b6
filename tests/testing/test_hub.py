"""The local Hub, judged by the Hub's own client: it must find, list and download, and be refused where it should be."""

from __future__ import annotations

import hashlib
import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from weightfs.testing.hub import Hub
from weightfs.testing.hubrepos import Repo

TOKEN = "hf_test_token"
WEIGHTS = random.Random(5).randbytes(300_000)
FILES = {
    "README.md": b"# A model\n",
    "config.json": b'{"model_type": "llama"}',
    "empty.txt": b"",
    "model.gguf": WEIGHTS,
    "sub dir/tokenizer.json": b'{"version": "1.0"}',
    "sub dir/weights.safetensors": WEIGHTS[:1000],
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


def client(hub: Hub, home: Path, code: str, *, token: str = "") -> Any:
    """Run `code` with huggingface_hub in a process of its own; what it assigns to `result`, or the error's class."""
    program = f"""
import json, logging, warnings
warnings.simplefilter("ignore")
from huggingface_hub import HfApi, hf_hub_download, snapshot_download
api = HfApi()
try:
    {code}
except Exception as error:
    result = type(error).__name__
print(json.dumps(result))
"""
    env = {name: value for name, value in os.environ.items() if "proxy" not in name.lower()}
    env |= {
        "HF_ENDPOINT": hub.endpoint,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",  # that store cannot be played
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_TOKEN": token,
    }
    done = subprocess.run(
        [sys.executable, "-c", program], env=env, capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_the_client_downloads_a_snapshot(hub: Hub, repo: Repo, tmp_path: Path) -> None:
    hub.page_entries = 2
    path = Path(client(hub, tmp_path, 'result = snapshot_download("org/name")'))
    assert path.name == repo.refs["refs/heads/main"]
    assert {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file()} == FILES
    blobs = {blob.name for blob in (path.parents[1] / "blobs").iterdir()}
    assert blobs == {file.etag for file in repo.commits[path.name].values()}
    assert (path.parents[1] / "refs" / "main").read_text() == path.name
    assert any("cursor=" in seen.target for seen in hub.seen)
    assert all("authorization" not in seen.headers for seen in hub.cdn_seen)


def test_the_client_downloads_single_files_of_branches_tags_and_pull_requests(
    hub: Hub, repo: Repo, tmp_path: Path
) -> None:
    tagged = repo.refs["refs/heads/main"]
    repo.tag("v1", tagged)
    repo.commit({"config.json": b"two"})
    repo.commit({"config.json": b"three"}, ref="a/branch")
    repo.commit({"config.json": b"four", "model.gguf": b"lfs"}, ref="refs/pr/1")
    data = hub.repo("org/name", "datasets")
    data.commit({"data.parquet": b"rows"})
    code = """
    def got(repo, file, **how):
        with open(hf_hub_download(repo, file, **how)) as f: return f.read()
    result = [
        got("org/name", "config.json"),
        got("org/name", "config.json", revision="v1"),
        got("org/name", "config.json", revision="a/branch"),
        got("org/name", "model.gguf", revision="refs/pr/1"),
        got("org/name", "data.parquet", repo_type="dataset"),
        [ref.name for ref in api.list_repo_refs("org/name").branches],
        api.list_repo_files("org/name", revision="v1"),
        api.model_info("org/name", revision="v1").sha,
    ]"""
    assert client(hub, tmp_path, code.strip()) == [
        "two",
        FILES["config.json"].decode(),
        "three",
        "lfs",
        "rows",
        ["main", "a/branch"],
        sorted(FILES),
        tagged,
    ]


def test_the_client_follows_a_rename_with_its_token(hub: Hub, repo: Repo, tmp_path: Path) -> None:
    repo.private = True
    hub.rename(repo, "other/new-name")
    code = """
    with open(hf_hub_download("org/name", "model.gguf"), "rb") as f: big = f.read()
    with open(hf_hub_download("org/name", "config.json"), "rb") as f: small = f.read()
    import hashlib
    result = [hashlib.sha256(big).hexdigest(), small.decode()]"""
    found = client(hub, tmp_path, code.strip(), token=TOKEN)
    assert found == [hashlib.sha256(WEIGHTS).hexdigest(), FILES["config.json"].decode()]
    assert hub.requests("/other/new-name/")
    assert hub.cdn_seen
    assert all("authorization" not in seen.headers for seen in hub.cdn_seen)


def test_the_client_understands_what_is_refused(hub: Hub, repo: Repo, tmp_path: Path) -> None:
    hub.repo("org/gated", gated="manual").commit(FILES)
    hub.repo("org/secret", private=True).commit(FILES)
    code = """
    result = []
    for how in (
        dict(repo_id="org/name", filename="none"),
        dict(repo_id="org/name", filename="config.json", revision="none"),
        dict(repo_id="org/gated", filename="config.json"),
        dict(repo_id="org/none", filename="config.json"),
        dict(repo_id="org/secret", filename="config.json"),
    ):
        try:
            hf_hub_download(**how)
            result.append("")
        except Exception as error:
            result.append(type(error).__name__)"""
    errors = client(hub, tmp_path, code.strip(), token=TOKEN)
    assert errors == [
        "RemoteEntryNotFoundError",
        "RevisionNotFoundError",
        "GatedRepoError",
        "RepositoryNotFoundError",
        "",
    ]
    absent = tmp_path / "hub/models--org--name/.no_exist" / repo.refs["refs/heads/main"] / "none"
    assert absent.exists()


def test_the_client_waits_when_the_rate_is_limited(hub: Hub, repo: Repo, tmp_path: Path) -> None:
    hub.limit_rate(f"/api/models/org/name/tree/{repo.refs['refs/heads/main']}")
    assert client(hub, tmp_path, 'result = api.list_repo_files("org/name")') == sorted(FILES)
