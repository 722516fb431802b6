"""`weightfs doctor`: each verdict from its facts; the probes against this machine, real daemons and real sources."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import signal
import stat
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from weightfs.app.doctor import machine, network, origins, probes, storage
from weightfs.app.doctor.machine import Helper
from weightfs.app.doctor.storage import Directory, Seen, Space
from weightfs.app.doctor.verdicts import Level, Verdict
from weightfs.cli import cli
from weightfs.cli.doctoring import PROBLEMS
from weightfs.core.geometry import GIB, MIB
from weightfs.errors import FailureKind, RefError, SourceError
from weightfs.mount import mounttable
from weightfs.mount.mounttable import Health, Mount, parse_mountinfo
from weightfs.sources.base import FetchSettings
from weightfs.testing.daemon import Daemon
from weightfs.testing.hub import Hub
from weightfs.testing.mounts import can_mount
from weightfs.testing.nginx import Nginx, free_port

OK, WARNING, PROBLEM = Level.OK, Level.WARNING, Level.PROBLEM
TOKEN = "hf_" + "s3cret" * 4
needs_mount = pytest.mark.skipif(not can_mount(), reason="needs /dev/fuse and CAP_SYS_ADMIN")


def has(verdict: Verdict, level: Level, *words: str) -> None:
    assert verdict.level is level, verdict
    for word in words:
        assert word in verdict.text, verdict


# --- the machine


@pytest.mark.parametrize(
    ("release", "level", "word"),
    [
        ("5.3.18-suse", PROBLEM, "too old"),
        ("5.4.0", WARNING, "6.9"),
        ("6.8.12-amd64", WARNING, "6.9"),
        ("6.9.0-rc1", OK, "passthrough"),
        ("6.10.1", OK, "passthrough"),
        ("10.0", OK, "passthrough"),
        ("custom", WARNING, "'custom'"),
    ],
)
def test_kernel(release: str, level: Level, word: str) -> None:
    has(machine.kernel(release), level, word)


@pytest.mark.parametrize(
    ("code", "level", "word"),
    [
        (None, OK, "may use"),
        (errno.ENOENT, PROBLEM, "modprobe fuse"),
        (errno.EACCES, PROBLEM, "chmod 666"),
        (errno.EPERM, PROBLEM, "DeviceAllow"),
        (errno.EIO, PROBLEM, "EIO"),
    ],
)
def test_device(code: int | None, level: Level, word: str) -> None:
    has(machine.device(code), level, word)


@pytest.mark.parametrize(
    ("found", "privileged", "bound", "level", "word"),
    [
        (None, True, True, OK, "not needed"),
        (None, False, False, PROBLEM, "install the package fuse3"),
        (Helper("/bin/fusermount3", setuid=False), False, False, PROBLEM, "chmod 4755 /bin/fusermount3"),
        (Helper("/bin/fusermount3", setuid=True), False, True, PROBLEM, "NoNewPrivileges"),
        (Helper("/bin/fusermount3", setuid=True), False, False, OK, "setuid"),
    ],
)
def test_helper(found: Helper | None, privileged: bool, bound: bool, level: Level, word: str) -> None:
    has(machine.helper(found, privileged=privileged, no_new_privileges=bound), level, word)


@pytest.mark.parametrize(
    ("conf", "configured", "privileged", "level"),
    [
        (None, False, False, OK),
        (None, True, True, OK),
        (None, True, False, PROBLEM),
        ("#user_allow_other\nmount_max = 1000\n", True, False, PROBLEM),
        ("mount_max = 1000\n user_allow_other \n", True, False, OK),
    ],
)
def test_allow_other(conf: str | None, configured: bool, privileged: bool, level: Level) -> None:
    has(machine.allow_other(conf, configured=configured, privileged=privileged), level)


@pytest.mark.parametrize(
    ("soft", "hard", "level", "word"),
    [
        (-1, -1, OK, "none"),
        (1024, 4096, OK, "1024"),
        (1023, 4096, WARNING, "ulimit -n"),
        (512, 512, WARNING, "hard limit is 512"),
        (255, -1, PROBLEM, "LimitNOFILE"),
    ],
)
def test_descriptors(soft: int, hard: int, level: Level, word: str) -> None:
    has(machine.descriptors(soft, hard), level, word)


@pytest.mark.parametrize(
    ("limit", "privileged", "level"),
    [(12, True, OK), (None, False, OK), (0, False, OK), (511, False, WARNING), (512, False, OK)],
)
def test_background(limit: int | None, privileged: bool, level: Level) -> None:
    has(machine.background(limit, privileged=privileged), level)


@pytest.mark.parametrize(
    ("default", "largest", "ours", "level", "word"),
    [
        (None, None, 600, OK, "none"),
        (0, 0, 0, OK, "none"),
        (700, 0, 600, OK, "700"),
        (600, 0, 600, PROBLEM, "default_request_timeout=0"),
        (0, 60, 600, PROBLEM, "max_request_timeout=0"),
        (900, 60, 600, PROBLEM, "max_request_timeout=0"),
        (900, 0, 0, PROBLEM, "no bound"),
    ],
)
def test_request_timeout(
    default: int | None, largest: int | None, ours: float, level: Level, word: str
) -> None:
    has(machine.request_timeout(default, largest, ours), level, word)


@pytest.mark.parametrize(
    ("now", "skews", "level", "word"),
    [
        (1e9, {}, OK, "no source"),
        (1e9 - 2 * machine.DAY, {}, PROBLEM, "before the day"),
        (1e9, {"a": 1.0, "b": 3000.0}, OK, "agrees with a"),
        (1e9, {"a": -121.0}, PROBLEM, "2m1s behind that of a"),
        (1e9, {"a": 600.0, "b": 601.0}, PROBLEM, "ahead of that of a"),
    ],
)
def test_clock(now: float, skews: dict[str, float], level: Level, word: str) -> None:
    has(machine.clock(now, 1e9, skews), level, word)


def test_service() -> None:
    has(machine.service("", "/var/cache/weightfs"), WARNING, "WatchdogSec")
    has(machine.service("60000000", ""), WARNING, "CacheDirectory")
    has(machine.service("60000000", "/var/cache/weightfs"), OK)


# --- the cache


@pytest.mark.parametrize(
    ("fstype", "level"),
    [
        ("ext4", OK),
        ("xfs", OK),
        ("nfs4", PROBLEM),
        ("fuse.sshfs", PROBLEM),
        ("fuse.mergerfs", WARNING),
        ("tmpfs", WARNING),
        ("overlay", WARNING),
        ("", OK),
    ],
)
def test_filesystem(fstype: str, level: Level) -> None:
    has(storage.filesystem("/cache", fstype), level, "/cache")


def test_the_filesystem_is_that_of_the_nearest_mount_and_of_several_the_last() -> None:
    mounts = parse_mountinfo(
        "1 0 8:1 / / rw - ext4 /dev/sda rw\n"
        "2 1 8:2 / /var rw - xfs /dev/sdb rw\n"
        "3 1 0:3 / /var rw - tmpfs none rw\n"
        "4 1 0:4 / /variable rw - nfs host: rw\n"
    )
    assert storage.filesystem_of("/var/cache", mounts) == "tmpfs"
    assert storage.filesystem_of("/variables", mounts) == "ext4"
    assert storage.filesystem_of("/var", []) == ""


@pytest.mark.parametrize(
    ("found", "level", "word"),
    [
        (None, OK, "makes it"),
        (Directory(stat.S_IFDIR | 0o700, 7, True, "ann"), OK, "ours alone"),
        (Directory(stat.S_IFREG | 0o700, 7, True, "ann"), PROBLEM, "not a directory"),
        (Directory(stat.S_IFDIR | 0o700, 8, True, "ann"), PROBLEM, "belongs to ann: run as"),
        (Directory(stat.S_IFDIR | 0o700, 7, False, "ann"), PROBLEM, "cannot be written"),
        (Directory(stat.S_IFDIR | 0o777, 7, True, "ann"), PROBLEM, "chmod 700"),
        (Directory(stat.S_IFDIR | 0o755, 7, True, "ann"), WARNING, "chmod 700"),
    ],
)
def test_directory(found: Directory | None, level: Level, word: str) -> None:
    has(storage.directory("/cache", found, 7), level, word)
    has(storage.directory("/cache", None, 7, can_make=False), PROBLEM, "--cache")


def test_root_looks_at_the_cache_of_a_service() -> None:
    """All is well with it: it was told as a problem."""
    found = Directory(stat.S_IFDIR | 0o700, 999, True, "weightfs")
    has(storage.directory("/cache", found, 0), WARNING, "belongs to weightfs: root's commands reach a mount")


@pytest.mark.parametrize(
    ("space", "max_size", "level", "word"),
    [
        (Space(100 * GIB, 50 * GIB, GIB), None, OK, "50.0 GiB are free"),
        (Space(100 * GIB, MIB, GIB), None, WARNING, "weightfs gc"),
        (Space(100 * GIB, 0, GIB), None, PROBLEM, "weightfs gc"),
        (Space(100 * GIB, 50 * GIB, 3 * GIB), 2 * GIB, WARNING, "more than max-size"),
        (Space(100 * GIB, 50 * GIB, 3 * GIB), 60 * GIB, WARNING, "min-free decides"),
        (Space(100 * GIB, 50 * GIB, 3 * GIB), 52 * GIB, OK, "free"),
    ],
)
def test_space(space: Space, max_size: int | None, level: Level, word: str) -> None:
    has(storage.space(space, max_size, GIB), level, word)


def test_mounts() -> None:
    seen = [
        Seen("/a", Health.STALE, None),
        Seen("/b", Health.SILENT, 128),
        Seen("/c", Health.ALIVE, 128),
        Seen("/d", Health.ALIVE, 4096),
        Seen("/e", Health.ALIVE, None),
    ]
    a, b, c, d, e = storage.mounts(seen)
    has(a, PROBLEM, "umount --lazy /a")
    has(b, PROBLEM, "umount --lazy /b")
    has(c, WARNING, "128 KiB")
    has(d, OK, "/d")
    has(e, OK, "/e")
    has(storage.mounts([])[0], OK, "none")
    has(storage.mounts(seen, left=3)[-1], WARNING, "3 more")


# --- the network


def test_proxies_are_named_without_their_passwords() -> None:
    found = {"http": "http://me:hunter2@proxy.lan:3128", "https": "proxy.lan:3129"}
    one, two = network.proxies(found, {"https": "Connection refused"})
    has(one, OK, "proxy.lan:3128")
    has(two, PROBLEM, "proxy.lan:3129", "Connection refused")
    assert "hunter2" not in one.text
    has(network.proxies({}, {})[0], OK, "none")
    # Regression: what is before the slash counted as the host.
    (wrong,) = network.proxies({"http": "http://me:hunter2/3@proxy.lan:3128"}, {})
    assert "hunter2" not in wrong.text
    has(wrong, OK, "proxy.lan:3128")


@pytest.mark.parametrize(
    ("kind", "level", "word"),
    [
        (FailureKind.AUTH, PROBLEM, ""),
        (FailureKind.BUSY, WARNING, ""),
        (FailureKind.CONNECT, PROBLEM, "DNS"),
        (FailureKind.TLS, PROBLEM, "ca-file"),
    ],
)
def test_a_refusal_is_told_in_the_words_of_the_source(kind: FailureKind, level: Level, word: str) -> None:
    verdict = network.refused("hf://a/b", SourceError("https://u:pw@h.lan/x?sig=1 said no.", kind=kind))
    has(verdict, level, "hf://a/b: https://h.lan/x", "said no", word)
    assert "pw" not in verdict.text
    assert "sig" not in verdict.text


def test_of_refs_that_were_not_named_one_of_each_place_is_asked_for() -> None:
    others = [("a1", "a"), ("b1", "b"), ("a2", "a"), ("c1", "c")]
    assert network.representatives(["z", "a2"], others, 9) == (["z", "a2", "a1", "b1", "c1"], 0)
    assert network.representatives(["z"], others, 2) == (["z", "a1"], 2)


def test_places() -> None:
    fetch = FetchSettings(hf_endpoint="http://hub.lan", endpoints=(("registry.ollama.ai", "http://m.lan"),))
    for ref, place in {
        "hf://org/name": "http://hub.lan",
        "ollama://aya:8b": "http://m.lan",
        "oci://docker.io/ai/smollm2": "https://registry-1.docker.io",
        "oci://127.0.0.1:5000/x": "http://127.0.0.1:5000",
        "https://h.lan:8443/a/b.gguf": "https://h.lan:8443",
        "file:///a/b.gguf": "file",
    }.items():
        assert origins.place_of(ref, fetch) == place
    assert origins.checked(["hf://org/name", "s3://bucket/x"]) == ["hf://org/name@main"]
    with pytest.raises(RefError):
        origins.place_of("s3://bucket/x", fetch)


def test_proxies_of_the_settings_beat_those_of_the_environment() -> None:
    environment = {"https": "http://p:1", "all": "http://q:2", "no": "localhost", "ftp": "http://r:3"}
    fetch = FetchSettings()
    assert origins.proxies_of(fetch, environment) == {"https": "http://p:1", "all": "http://q:2"}
    assert origins.proxies_of(replace(fetch, proxy="http://s:4"), environment)["http"] == "http://s:4"
    assert origins.proxies_of(replace(fetch, proxy=""), environment) == {}


# --- this machine, and real counterparts


def doctor(tmp_path: Path, *arguments: str, code: int | None = None, **env: str) -> dict[str, list[Verdict]]:
    result = invoke(tmp_path, "doctor", "--json", "--cache", str(tmp_path / "cache"), *arguments, **env)
    assert code in (None, result.exit_code), result.output
    return parsed(result.stdout)


def invoke(tmp_path: Path, *arguments: str, **env: str) -> Result:
    clean: dict[str, str | None] = {name: None for name in os.environ if name.lower().endswith("_proxy")}
    home = {"HOME": str(tmp_path), "WEIGHTFS_CONFIG": "/dev/null", "HF_TOKEN": "", "HF_ENDPOINT": ""}
    return CliRunner(env={**clean, **home, **env}).invoke(cli, list(arguments))


def parsed(output: str) -> dict[str, list[Verdict]]:
    document: Any = json.loads(output)
    found: dict[str, list[Verdict]] = {}
    for one in document["checks"]:
        found.setdefault(one["check"], []).append(Verdict(one["check"], Level(one["level"]), one["text"]))
    assert document["sound"] == all(v.level is not PROBLEM for vs in found.values() for v in vs)
    return found


def test_an_empty_machine_is_looked_at_without_a_trace(tmp_path: Path) -> None:
    model = tmp_path / "m.gguf"
    model.write_bytes(b"GGUF" + bytes(100))
    found = doctor(tmp_path, f"file://{model}")
    assert found["cache directory"][0].level is OK
    has(found["cache"][0], OK, "nothing yet")
    has(found["sources"][0], OK, f"file://{model}")
    assert {"kernel", "/dev/fuse", "fusermount3", "open files", "clock", "proxy", "mounts"} <= set(found)
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]


def test_it_is_told_in_lines_and_ends_with_a_code_of_its_own(tmp_path: Path) -> None:
    result = invoke(tmp_path, "doctor", "--cache", str(tmp_path / "cache"), f"file://{tmp_path}/none.gguf")
    assert result.exit_code == PROBLEMS == 8
    lines = result.stdout.splitlines()
    assert any(line.startswith("problem  sources") and "none.gguf" in line for line in lines)
    assert "problems" in lines[-1]


def test_a_source_that_is_unreachable(tmp_path: Path) -> None:
    url = f"http://127.0.0.1:{free_port()}/m.gguf"
    found = doctor(tmp_path, url, code=PROBLEMS)
    has(found["sources"][0], PROBLEM, url, "refused", "network")


def test_a_proxy_and_an_endpoint_that_are_unreachable(tmp_path: Path) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    found = doctor(tmp_path, HF_ENDPOINT=url, code=PROBLEMS)
    has(found["sources"][0], PROBLEM, url, "refused")
    proxy = f"http://me:hunter2@127.0.0.1:{free_port()}"
    found = doctor(tmp_path, "--proxy", proxy, code=PROBLEMS)
    has(found["proxy"][0], PROBLEM, "127.0.0.1", "refused")
    assert "hunter2" not in str(found)


def test_the_token_of_the_hub_is_tried_and_not_told(tmp_path: Path) -> None:
    with Hub(tokens={TOKEN}) as hub:
        hub.repo("org/name").commit({"config.json": b"{}"})
        right = doctor(tmp_path, "hf://org/name", HF_ENDPOINT=hub.endpoint, HF_TOKEN=TOKEN)
        wrong = doctor(
            tmp_path, "hf://org/name", HF_ENDPOINT=hub.endpoint, HF_TOKEN=TOKEN[:-1], code=PROBLEMS
        )
        unasked = doctor(tmp_path, HF_ENDPOINT=hub.endpoint, HF_TOKEN=TOKEN)
    has(right["sources"][0], OK, "hf://org/name", "with the token")
    has(right["clock"][0], OK, "agrees with 127.0.0.1")
    has(wrong["sources"][0], PROBLEM, "token")
    has(unasked["sources"][0], OK, hub.endpoint, "can be reached")
    assert TOKEN[:-1] not in str((right, wrong, unasked))


def test_a_private_certificate_authority(tmp_path: Path) -> None:
    files = tmp_path / "files"
    files.mkdir()
    (files / "m.gguf").write_bytes(bytes(MIB))
    with Nginx(files) as nginx:
        url = nginx.https_url("m.gguf")
        has(doctor(tmp_path, url, code=PROBLEMS)["sources"][0], PROBLEM, "ca-file")
        trusted = doctor(tmp_path, "--ca-file", str(nginx.ca_file), url)
        has(trusted["sources"][0], OK, url)
        has(trusted["clock"][0], OK, "agrees")


def test_settings_that_cannot_be_used_are_a_problem_and_end_nothing(tmp_path: Path) -> None:
    found = doctor(tmp_path, "--hf-token-file", str(tmp_path / "none"), code=PROBLEMS)
    has(found["settings"][0], PROBLEM, "hf-token-file")
    assert "kernel" in found
    assert "sources" not in found


def test_a_chunk_list_is_that_of_the_ref_that_was_named(tmp_path: Path) -> None:
    for name in ("m.gguf", "other.gguf"):
        (tmp_path / name).write_bytes(b"GGUF" + bytes(100))
    refs = f"file://{tmp_path}/other.gguf"
    options = ["--chunks", str(tmp_path / "none.meta4")]
    result = invoke(tmp_path, "doctor", "--cache", str(tmp_path / "cache"), *options)
    assert (result.exit_code, "--chunks" in result.stderr) == (2, True)
    named = f"file://{tmp_path}/m.gguf"
    first, *_ = doctor(tmp_path, named, *options, WEIGHTFS_REFS=refs, code=PROBLEMS)["sources"]
    has(first, PROBLEM, "none.meta4")
    other = doctor(tmp_path, f"http://127.0.0.1:{free_port()}/x", *options, WEIGHTFS_REFS=refs)["sources"]
    has(other[1], OK, "other.gguf")


def test_an_idle_cache_is_read_and_stays_as_it_is(tmp_path: Path) -> None:
    model = tmp_path / "m.gguf"
    model.write_bytes(b"GGUF" + bytes(100))
    assert invoke(tmp_path, "add", f"file://{model}", "--cache", str(tmp_path / "cache")).exit_code == 0
    before = fingerprint(tmp_path / "cache")
    found = doctor(tmp_path)
    has(found["cache"][0], OK, "1 ref")
    has(found["sources"][0], OK, str(model))
    assert fingerprint(tmp_path / "cache") == before
    data = tmp_path / "cache" / "index" / "data.mdb"
    data.write_bytes(b"not an index" * 1000)
    has(doctor(tmp_path, code=PROBLEMS)["cache"][0], PROBLEM, "damaged", "aside")


def fingerprint(root: Path) -> dict[str, tuple[int, int, str]]:
    return {
        str(path.relative_to(root)): (
            path.lstat().st_mtime_ns,
            path.lstat().st_mode,
            hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "",
        )
        for path in [root, *root.rglob("*")]
    }


@pytest.mark.mount
@pytest.mark.timeout(120)
@needs_mount
def test_a_daemon_is_asked_and_never_waited_for(tmp_path: Path) -> None:
    model = tmp_path / "m.gguf"
    model.write_bytes(b"GGUF" + bytes(100))
    with Daemon(tmp_path / "daemon", f"file://{model}", options=["--workers", "0"]) as daemon:
        daemon.start()

        def examined() -> dict[str, list[Verdict]]:
            return parsed(daemon.cli("doctor", "--json").stdout)

        def of_mount(found: dict[str, list[Verdict]]) -> Verdict:
            return next(one for one in found["mounts"] if str(daemon.mountpoint) in one.text)

        found = examined()
        has(found["cache"][0], OK, "(mount)", "1 ref")
        has(of_mount(found), OK, "answers")
        has(found["sources"][0], OK, str(model))
        daemon.signal(signal.SIGSTOP)
        try:
            found = examined()
        finally:
            daemon.signal(signal.SIGCONT)
        has(found["cache"][0], PROBLEM, "does not answer")
        has(of_mount(found), PROBLEM, "umount --lazy")
        daemon.kill()
        found = examined()
        has(found["cache"][0], OK, "1 ref")
        has(of_mount(found), PROBLEM, "stale", "umount --lazy")


_AS_SOMEBODY = """
import json, os, sys
from weightfs.app.doctor import probes
from weightfs.config import Config
os.setgroups([]); os.setgid(65534); os.setuid(65534)
config = Config().model_copy(update={"allow_other": True})
found = probes.look_at_machine(config, {})
print(json.dumps([[one.check, one.level, one.text] for one in found]))
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become somebody else")
def test_as_an_ordinary_user() -> None:
    done = subprocess.run(
        [sys.executable, "-c", _AS_SOMEBODY], capture_output=True, text=True, timeout=60, check=True
    )
    found = {check: (level, text) for check, level, text in json.loads(done.stdout)}
    usable = bool(Path("/dev/fuse").stat().st_mode & 0o006)
    assert (found["/dev/fuse"][0] == "ok") == usable
    assert "not needed" not in found["fusermount3"][1]
    permitted = "user_allow_other" in Path("/etc/fuse.conf").read_text().split("\n")
    assert (found["allow-other"][0] == "ok") == permitted


def test_an_interpreter_that_cannot_be_run_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The probes are processes of their own; it was told as a fault of weightfs itself."""
    python = tmp_path / "python"
    python.write_text("")
    monkeypatch.setattr(sys, "executable", str(python))
    mount = Mount(1, "0:9", str(tmp_path), mounttable.FSTYPE, "weightfs")
    monkeypatch.setattr(mounttable, "parse_mountinfo", lambda _text: [mount])
    (tmp_path / "index").mkdir()
    (tmp_path / "index" / "data.mdb").write_bytes(b"x")
    index, _ = probes.look_at_index(tmp_path)
    for verdict in (*probes.look_at_mounts(), *index):
        has(verdict, PROBLEM, f"{python} cannot be started (Permission denied): make it executable")


def test_a_lock_is_seen_without_taking_it(tmp_path: Path) -> None:
    from weightfs.store import lockfile

    (tmp_path / "index").mkdir()
    (verdict,), refs = probes.look_at_index(tmp_path)
    has(verdict, OK, "0 refs")
    descriptor = lockfile.acquire(tmp_path / "lock")
    try:
        (verdict,), refs = probes.look_at_index(tmp_path)
        has(verdict, WARNING, str(os.getpid()))
        assert refs == []
    finally:
        lockfile.release(descriptor)
    (verdict,), refs = probes.look_at_index(tmp_path)
    has(verdict, OK)
