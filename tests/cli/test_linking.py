"""`weightfs env` and `link`: with a real daemon, a real shell, systemd's parser, and a store that Ollama uses too."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from weightfs.app.ollama_store import RECORD
from weightfs.app.runtimes import RUNTIMES, as_shell, as_systemd, settings_for
from weightfs.errors import UsageError
from weightfs.testing.daemon import Daemon
from weightfs.testing.models import make_gguf
from weightfs.testing.mounts import FakeMount, can_mount

CHANGES = ("linked", "updated", "unchanged", "removed", "kept")
letters = st.characters(min_codepoint=32, exclude_characters="/\x7f", exclude_categories=["Cs", "Cc"])


# --- the words


@example('100% %n \\ "q" $x', "ollama")
@given(st.text(letters, max_size=20), st.sampled_from(RUNTIMES))
def test_systemd_reads_back_what_was_meant(name: str, runtime: str) -> None:
    """By the rules of systemd.syntax(7), undone here."""
    place = Path("/mnt") / f"x{name}"
    settings = settings_for(runtime, place)
    lines = as_systemd(settings, place)
    assert not any("\n" in line for line in lines)

    def meant(line: str) -> str:
        quoted = line.partition("=")[2]
        assert re.fullmatch(r'"(?:[^"\\]|\\["\\])*"', quoted)
        assert not quoted.replace("%%", "").count("%")
        return re.sub(r"\\(.)", r"\1", quoted[1:-1]).replace("%%", "%")

    said = [meant(line) for line in lines if line.startswith("Environment=")]
    assert said == [f"{key}={value}" for key, value in settings.variables]
    assert [meant(line) for line in lines if line.startswith("RequiresMountsFor=")] == [str(place)]
    assert [line.partition("=")[2] for line in lines if line.startswith("Unset")] == list(settings.unset)


@pytest.mark.parametrize(
    "name", ["plain", "with space", "it's $HOME", '"q" `x`', "a\\b", "100%", "größe", "-n"]
)
def test_a_shell_reads_back_what_was_meant(name: str) -> None:
    place = Path("/mnt") / name
    for runtime in RUNTIMES:
        settings = settings_for(runtime, place)
        script = "\n".join([*as_shell(settings), "env -0"])
        told = subprocess.run(
            ["sh", "-euc", script],
            env={"PATH": os.environ["PATH"], "LLAMA_CACHE": "/old"},
            capture_output=True,
            check=True,
        )
        values = dict(line.split("=", 1) for line in told.stdout.decode().rstrip("\0").split("\0"))
        assert {key: values[key] for key, _ in settings.variables} == dict(settings.variables)
        assert not values.keys() & set(settings.unset)


def test_what_each_runtime_is_told() -> None:
    place = Path("/mnt/models")
    hub = ("HF_HUB_CACHE", "/mnt/models/huggingface/hub")
    told = {runtime: settings_for(runtime, place).variables for runtime in RUNTIMES}
    assert told == {
        "ollama": (
            ("OLLAMA_MODELS", "/mnt/models/ollama"),
            ("OLLAMA_NOPRUNE", "1"),
            ("OLLAMA_LOAD_TIMEOUT", "0"),
        ),
        "hf": (hub, ("HF_HUB_OFFLINE", "1")),
        "llama.cpp": (hub, ("LLAMA_ARG_OFFLINE", "1")),
        "vllm": (hub, ("HF_HUB_OFFLINE", "1")),
    }


def test_a_path_that_cannot_be_said_is_refused() -> None:
    with pytest.raises(UsageError, match="control character"):
        settings_for("hf", Path("/mnt/a\nb"))


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")
def test_systemd_itself_accepts_the_drop_in(tmp_path: Path) -> None:
    place = Path('/mnt/100% "a b"')
    (tmp_path / "it.service").write_text("[Service]\nExecStart=/bin/true\n")
    (tmp_path / "it.service.d").mkdir()
    for runtime in RUNTIMES:
        text = "\n".join(as_systemd(settings_for(runtime, place), place)) + "\n"
        (tmp_path / "it.service.d/weightfs.conf").write_text(text)
        argv = ["systemd-analyze", "verify", "--man=no", str(tmp_path / "it.service")]
        told = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)
        assert "weightfs.conf" not in told.stderr


# --- a real daemon


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    if not can_mount():
        pytest.skip("needs /dev/fuse and CAP_SYS_ADMIN")
    with Daemon(tmp_path_factory.mktemp("a place"), options=["--workers", "0"]) as daemon:
        yield daemon.start()


def sentence(told: subprocess.CompletedProcess[str], code: int) -> str:
    assert (told.returncode, told.stdout) == (code, "")
    (line,) = told.stderr.splitlines()
    return line.removeprefix("weightfs: ")


@pytest.mark.mount
def test_env_says_where_the_daemon_mounts(daemon: Daemon) -> None:
    told = daemon.cli("env", "ollama")
    assert told.returncode == 0
    script = f'{told.stdout}\nprintf %s "$OLLAMA_MODELS"'
    shell = subprocess.run(["sh", "-euc", script], capture_output=True, text=True, check=True)
    assert shell.stdout == str(daemon.mountpoint / "ollama")
    drop_in = daemon.cli("env", "hf", "--systemd").stdout.splitlines()
    assert f'Environment="HF_HUB_CACHE={daemon.mountpoint}/huggingface/hub"' in drop_in


@pytest.mark.mount
def test_link_of_an_empty_mount_is_an_empty_store(daemon: Daemon, tmp_path: Path) -> None:
    store = tmp_path / "new" / "store"
    told = daemon.cli("link", "ollama", str(store), "--json")
    assert (told.returncode, told.stderr) == (0, "")
    document = json.loads(told.stdout)
    assert document == {
        "runtime": "ollama",
        "directory": str(store),
        "mountpoint": str(daemon.mountpoint),
        **{what: [] for what in (*CHANGES, "failed")},
    }
    assert sorted(path.name for path in store.iterdir()) == [RECORD, "blobs", "manifests"]


@pytest.mark.mount
def test_what_stands_in_the_way_is_one_sentence(daemon: Daemon, tmp_path: Path) -> None:
    inside = sentence(daemon.cli("link", "ollama", str(daemon.mountpoint / "ollama")), 2)
    assert "is inside the mount at" in inside
    around = tmp_path / "around"
    around.symlink_to(daemon.mountpoint)
    assert "is inside the mount at" in sentence(daemon.cli("link", "ollama", str(around / "ollama")), 2)
    (tmp_path / "file").touch()
    assert "is no directory" in sentence(daemon.cli("link", "ollama", str(tmp_path / "file")), 2)
    assert "cannot be written" in sentence(daemon.cli("link", "ollama", str(tmp_path / "file/below")), 2)
    assert "cannot be written" in sentence(daemon.cli("link", "ollama", "/sys/weightfs"), 2)
    idle = tmp_path / "idle"
    for command in (["link", "ollama", str(tmp_path / "x")], ["env", "vllm"]):
        assert "no mount serves the cache" in sentence(daemon.cli(*command, cache=idle), 7)
    nothing = daemon.cli("link", "ollama", str(tmp_path / "x"), "--mountpoint", str(tmp_path))
    assert "no weightfs is mounted" in sentence(nothing, 6)
    assert not (tmp_path / "x").exists()


# --- a store that Ollama uses too


class Stage:
    """A mount with models, and a store."""

    def __init__(self, mounted: FakeMount, shelf: Path, store: Path) -> None:
        self.mounted = mounted
        self.store = store
        self._files = {path.name: str(path) for path in shelf.iterdir()}

    def put(self, name: str, *paths: str) -> None:
        files = {path: self._files[path] for path in (*paths, "config.json")}
        self.mounted.call("put", ref=f"ollama://{name}", files=files)

    def link(self) -> dict[str, Any]:
        argv = [sys.executable, "-m", "weightfs", "link", "ollama", str(self.store), "--json"]
        argv += ["--mountpoint", str(self.mounted.mountpoint), "--cache", str(self.store.parent / "cache")]
        document: dict[str, Any] = json.loads(self.mounted.finish(self.mounted.command(argv), deadline=60))
        return {what: document[what] for what in CHANGES if document[what]}

    def fail(self, *options: str) -> subprocess.CompletedProcess[str]:
        """The same, where it cannot do all."""
        argv = [sys.executable, "-m", "weightfs", "link", "ollama", str(self.store), *options]
        argv += ["--mountpoint", str(self.mounted.mountpoint), "--cache", str(self.store.parent / "cache")]
        client = self.mounted.command(argv)
        out, err = client.communicate(timeout=60)
        return subprocess.CompletedProcess(argv, client.returncode, out, err)

    def read(self) -> list[str]:
        """The models that the Ollama server would find there, once it has made the directory that it makes itself."""
        (self.store / "manifests-v2").mkdir(exist_ok=True)
        argv = [sys.executable, "-m", "weightfs.testing.ollama_reads", str(self.store)]
        models = json.loads(self.mounted.finish(self.mounted.command(argv)))
        return sorted(model["name"].removeprefix("registry.ollama.ai/library/") for model in models)

    def blob_of(self, path: str) -> Path:
        return (
            self.store
            / "blobs"
            / f"sha256-{hashlib.sha256(Path(self._files[path]).read_bytes()).hexdigest()}"
        )


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Stage]:
    if not can_mount():
        pytest.skip("needs /dev/fuse and CAP_SYS_ADMIN")
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    make_gguf(shelf / "model.gguf")
    (shelf / "config.json").write_text(json.dumps({"model_format": "gguf"}))
    (shelf / "template").write_text("{{ .Prompt }}")
    with (
        tempfile.TemporaryDirectory() as place,
        FakeMount(Path(place).resolve(), {}, every_layout=True) as mounted,
    ):
        yield Stage(mounted.ready(), shelf, tmp_path / "store")


AYA = "registry.ollama.ai/library/aya/8b"


@pytest.mark.mount
def test_the_server_finds_every_model_and_twice_changes_nothing(stage: Stage) -> None:
    stage.put("aya:8b", "model.gguf")
    stage.put("hf.co/Org/Name-GGUF:Q4", "model.gguf", "template")
    assert stage.link() == {"linked": ["hf.co/Org/Name-GGUF/Q4", AYA]}
    assert stage.read() == ["aya/8b", "hf.co/Org/Name-GGUF/Q4"]
    blob = stage.blob_of("model.gguf")
    assert os.readlink(blob) == str(stage.mounted.mountpoint / "ollama/blobs" / blob.name)
    before = {path: path.lstat().st_ino for path in stage.store.rglob("*") if path.name != RECORD}
    assert stage.link() == {"unchanged": ["hf.co/Org/Name-GGUF/Q4", AYA]}
    assert {path: path.lstat().st_ino for path in stage.store.rglob("*") if path.name != RECORD} == before


@pytest.mark.mount
def test_a_model_that_cannot_be_linked_does_not_stop_the_others(stage: Stage) -> None:
    """Regression: the first OSError was the end, and what came after it by name was not linked."""
    stage.put("aya:8b", "model.gguf")
    stage.put("zephyr:7b", "model.gguf", "template")
    library = stage.store / "manifests/registry.ollama.ai/library"
    library.mkdir(parents=True)
    (library / "aya").write_text("in the way")
    done = stage.fail("--json")
    assert done.returncode == UsageError.exit_code
    document = json.loads(done.stdout)
    assert document["linked"] == ["registry.ollama.ai/library/zephyr/7b"]
    assert [failed["path"] for failed in document["failed"]] == [AYA]
    first, last = done.stderr.splitlines()
    assert f"{AYA} was left as it is" in first
    assert "do this again" in last
    (library / "aya").unlink()
    assert stage.link() == {"linked": [AYA], "unchanged": ["registry.ollama.ai/library/zephyr/7b"]}


@pytest.mark.mount
def test_what_ollama_downloaded_itself_is_never_touched(stage: Stage) -> None:
    stage.put("aya:8b", "model.gguf")
    stage.put("own:1b", "model.gguf", "template")
    blob, theirs = stage.blob_of("model.gguf"), stage.store / "manifests/registry.ollama.ai/library/own/1b"
    blob.parent.mkdir(parents=True)
    blob.write_bytes((stage.store.parent / "shelf/model.gguf").read_bytes())
    theirs.parent.mkdir(parents=True)
    theirs.write_text('{"layers": [], "config": {}}')
    inode = blob.stat().st_ino
    assert stage.link() == {"linked": [AYA], "kept": ["registry.ollama.ai/library/own/1b", blob.name]}
    assert not blob.is_symlink()
    assert blob.stat().st_ino == inode
    assert theirs.read_text() == '{"layers": [], "config": {}}'
    for ref in ("aya:8b", "own:1b"):
        stage.mounted.call("unpin", ref=f"ollama://{ref}")
    assert AYA in stage.link()["removed"]
    assert blob.stat().st_ino == inode
    assert theirs.exists()


@pytest.mark.mount
def test_models_that_change_or_go_are_followed(stage: Stage) -> None:
    stage.put("aya:8b", "model.gguf", "template")
    stage.put("other:1b", "model.gguf")
    stage.link()
    template = stage.blob_of("template")
    assert template.is_symlink()
    stage.put("aya:8b", "model.gguf")
    stage.mounted.call("unpin", ref="ollama://other:1b")
    assert stage.link() == {
        "updated": [AYA],
        "removed": ["registry.ollama.ai/library/other/1b", template.name],
    }
    assert stage.read() == ["aya/8b"]
    assert not template.is_symlink()


@pytest.mark.mount
def test_a_model_that_ollama_pulled_again_since_is_ollamas_own(stage: Stage) -> None:
    stage.put("aya:8b", "model.gguf")
    stage.link()
    theirs = stage.store / "manifests" / AYA
    theirs.write_text('{"layers": [], "config": {}}')
    assert stage.link() == {"kept": [AYA]}
    stage.mounted.call("unpin", ref="ollama://aya:8b")
    assert AYA not in stage.link()["removed"]
    assert theirs.read_text() == '{"layers": [], "config": {}}'


@pytest.mark.mount
def test_a_mount_at_another_place_moves_the_links(stage: Stage) -> None:
    stage.put("aya:8b", "model.gguf")
    stage.link()
    blob = stage.blob_of("model.gguf")
    blob.unlink()
    blob.symlink_to("/elsewhere/ollama/blobs/" + blob.name)
    assert stage.link() == {"unchanged": [AYA]}
    assert stage.read() == ["aya/8b"]


@pytest.mark.mount
def test_a_link_of_somebody_else_and_a_spoilt_record_are_left_alone(stage: Stage) -> None:
    stage.put("aya:8b", "model.gguf")
    blob = stage.blob_of("model.gguf")
    blob.parent.mkdir(parents=True)
    blob.symlink_to("/big/disk/" + blob.name)
    assert stage.link() == {"linked": [AYA], "kept": [blob.name]}
    assert os.readlink(blob) == "/big/disk/" + blob.name
    outside = stage.store.parent / "outside"
    outside.write_text("precious")
    digest = hashlib.sha256(b"precious").hexdigest()
    record = {"manifests": {"../../outside": digest}, "blobs": ["../../outside", blob.name]}
    (stage.store / RECORD).write_text(json.dumps(record))
    stage.mounted.call("unpin", ref="ollama://aya:8b")
    assert stage.link() == {}
    assert outside.read_text() == "precious"
    assert blob.is_symlink()


@pytest.mark.mount
def test_a_manifest_that_is_a_link_to_a_disk_that_is_away_is_ollamas_own(stage: Stage) -> None:
    stage.put("aya:8b", "model.gguf")
    stage.put("odd:1b", "model.gguf")
    theirs = stage.store / "manifests" / AYA
    theirs.parent.mkdir(parents=True)
    theirs.symlink_to("/big/disk/aya")
    odd = theirs.parent.parent / "odd/1b"
    odd.parent.mkdir()
    os.mkfifo(odd)  # to open it would be to wait
    assert stage.link() == {"kept": [AYA, AYA.replace("aya/8b", "odd/1b")]}
    assert os.readlink(theirs) == "/big/disk/aya"


@pytest.mark.mount
def test_root_changes_nothing_in_a_directory_of_somebody_else(stage: Stage) -> None:
    outside = stage.store.parent / "outside/library/aya"
    outside.mkdir(parents=True)
    (outside / "8b").write_text("precious")
    digest = hashlib.sha256(b"precious").hexdigest()
    (stage.store / "manifests").mkdir(parents=True)
    (stage.store / "manifests/registry.ollama.ai").symlink_to(stage.store.parent / "outside")
    (stage.store / RECORD).write_text(json.dumps({"manifests": {AYA: digest}, "blobs": []}))
    os.chown(stage.store, 65534, 65534)
    for store in (stage.store, stage.store / "new"):
        argv = [sys.executable, "-m", "weightfs", "link", "ollama", str(store)]
        argv += ["--mountpoint", str(stage.mounted.mountpoint), "--cache", str(stage.store.parent / "cache")]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 2
        assert "belongs to another user" in done.stderr
    assert (outside / "8b").read_text() == "precious"
