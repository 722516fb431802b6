"""Canaries for secrets: a real daemon that needed each of them, and every place where one could come out again."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from weightfs.testing.daemon import Daemon
from weightfs.testing.hub import Hub
from weightfs.testing.mounts import can_mount
from weightfs.testing.origin import Fault, FaultKind, Origin, Seen, origin_in_thread
from weightfs.testing.registry import BASIC_PASSWORD, BASIC_USER, Auth, DockerRegistry, push_ollama

pytestmark = [
    pytest.mark.mount,
    pytest.mark.skipif(not can_mount(), reason="needs /dev/fuse and CAP_SYS_ADMIN"),
]

KEY = "canary-of-a-header-7f3a"
HUB_TOKEN = "hf_canaryOfTheHub91c2"
LOGIN = base64.b64encode(f"{BASIC_USER}:{BASIC_PASSWORD}".encode()).decode()
CANARIES = (KEY, HUB_TOKEN, LOGIN, BASIC_PASSWORD)
MODEL = bytes(range(256)) * 1024

# Every extended attribute of every file below the mount.
ATTRIBUTES = """
found = {}
for folder, _, names in os.walk(sys.argv[3]):
    for name in names:
        at = os.path.join(folder, name)
        if not os.path.islink(at):
            found[at] = {key: os.getxattr(at, key).decode() for key in os.listxattr(at)}
print(json.dumps(found))
"""


@dataclass(frozen=True)
class Stage:
    daemon: Daemon
    home: Origin  # asks for the header; sends on to
    away: Origin
    hub: Hub
    refs: tuple[str, ...]


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    """Everything was fetched, with every secret, and one thing was refused."""
    secrets = tmp_path_factory.mktemp("secrets")
    with (
        origin_in_thread({"/m.gguf": MODEL, "/away.gguf": b"", "/no.gguf": b""}) as home,
        origin_in_thread({"/away.gguf": MODEL[1:]}) as away,
        Hub(tokens={HUB_TOKEN}) as hub,
        DockerRegistry(auth=Auth.BASIC) as registry,
    ):
        # With a query as signed URLs have it: that is a secret, too.
        home.always["/away.gguf"] = Fault(
            FaultKind.REDIRECT, status=302, location=away.url(f"/away.gguf?sig={KEY}")
        )
        home.always["/no.gguf"] = Fault(FaultKind.STATUS, status=403)
        hub.repo("org/name", private=True).commit({"config.json": b"{}", "model.safetensors": MODEL[2:]})
        push_ollama(registry, "library/tiny:latest", {"model": MODEL[3:]})
        (secrets / "token").write_text(HUB_TOKEN)
        (secrets / "key").write_text(KEY)
        (secrets / "docker.json").write_text(json.dumps({"auths": {registry.host: {"auth": LOGIN}}}))
        (secrets / "config.toml").write_text(
            f'hf-endpoint = "{hub.endpoint}"\nhf-token-file = "{secrets}/token"\n'
            f'registry-auth-file = "{secrets}/docker.json"\nlog-level = "debug"\nworkers = 2\n'
            f'[[header]]\nname = "X-Api-Key"\nvalue-file = "{secrets}/key"\n'
        )
        refs = (
            home.url("/m.gguf"),
            home.url("/away.gguf"),
            "hf://org/name",
            f"ollama://{registry.host}/library/tiny:latest",
        )
        env = {"WEIGHTFS_CONFIG": str(secrets / "config.toml")}
        with Daemon(tmp_path_factory.mktemp("daemon"), *refs, env=env) as daemon:
            daemon.start()
            for ref in refs:
                daemon.complete(ref)
            yield Stage(daemon, home, away, hub, refs)


def without_canaries(texts: dict[str, str | bytes]) -> None:
    """Every text is there, and has none of them."""
    assert all(texts.values()), [place for place, text in texts.items() if not text]
    found = [
        (place, canary)
        for place, text in texts.items()
        for canary in CANARIES
        if canary.encode() in (text if isinstance(text, bytes) else text.encode())
    ]
    assert not found


def heads(seen: list[Seen]) -> str:
    return json.dumps([dict(one.headers) for one in seen])


def test_the_secrets_were_needed_and_went_where_they_belong(stage: Stage) -> None:
    assert all(seen.headers.get("x-api-key") == KEY for seen in stage.home.seen)
    assert all(HUB_TOKEN in seen.headers["authorization"] for seen in stage.hub.seen)
    without_canaries({"the other host": heads(stage.away.seen), "the CDN": heads(stage.hub.cdn_seen)})


def test_no_secret_in_log_argv_and_answers(stage: Stage) -> None:
    daemon = stage.daemon
    status = daemon.status()
    pids = [status["pid"], *status["worker_pids"]]
    assert len(pids) == 3
    refused = daemon.cli("add", stage.home.url("/no.gguf"), "-v")
    assert refused.returncode == 3
    texts: dict[str, str | bytes] = {
        f"argv of {pid}": Path(f"/proc/{pid}/cmdline").read_bytes() for pid in pids
    }
    texts["an error"] = refused.stderr
    for command in (
        ["status", "--json"],
        ["ls", "--json"],
        ["ls", "-l", "--json", *stage.refs],
        ["config", "show"],
    ):
        texts[" ".join(command[:3])] = daemon.cli(*command).stdout
    texts["doctor"] = daemon.cli("doctor", *stage.refs).stdout
    texts["log"] = daemon.log
    level = next(line for line in texts["config show"].splitlines() if "log-level" in str(line))
    assert "debug" in str(level)
    without_canaries(texts)


def test_no_secret_in_extended_attributes(stage: Stage) -> None:
    told = stage.daemon.run(ATTRIBUTES, stage.refs[0], "/dev/null", stage.daemon.mountpoint)
    assert "user.weightfs.source" in told
    without_canaries({"attributes": told})


def test_no_secret_in_the_cache_directory(stage: Stage) -> None:
    files = {path for path in stage.daemon.cache.rglob("*") if path.is_file()}
    assert {"data.mdb", "lock"} <= {path.name for path in files}
    without_canaries({str(path): path.read_bytes() or b"-" for path in files})
