"""What an operator gets wrong, under a real systemd: one clear sentence each, in the journal and in the status too.

Wrong settings, and a reload of them, are in test_booted. Each service here may fail once before systemd gives it up
(`StartLimitBurst`), instead of twenty times.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from weightfs.testing.machine import Machine, why_not
from weightfs.testing.waiting import until

pytestmark = [
    pytest.mark.systemd,
    pytest.mark.mount,
    pytest.mark.skipif(bool(why_not()), reason=why_not() or "it can be booted"),
]

WEIGHTFS = "/opt/weightfs/bin/weightfs"
SECRET = "hf_not for the journal"


@pytest.fixture(scope="module")
def machine(installed: Path) -> Iterator[Machine]:
    with Machine(installed) as booted:
        booted.write("/etc/systemd/system/weightfs@.service.d/once.conf", "[Unit]\nStartLimitBurst=1\n")
        yield booted


def start(machine: Machine, name: str, *, settings: str = "", service: str = "") -> str:
    """`systemctl start` of an instance with these settings, and these lines in its unit; the unit's name."""
    unit = f"weightfs@{name}.service"
    machine.write(f"/etc/weightfs/{name}.toml", settings)
    machine.write(f"/etc/systemd/system/{unit}.d/wrong.conf", f"[Service]\n{service}\n")
    machine.run("systemctl", "daemon-reload")
    machine.run("systemctl", "start", unit, check=False)
    return unit


def has_failed(machine: Machine, unit: str) -> None:
    until(lambda: machine.show(unit, "ActiveState") == "failed", f"systemd has given up {unit}")


def errors(machine: Machine, unit: str) -> list[str]:
    """What the unit said at priority err."""
    entries = machine.journal("-u", unit, "-p", "err", "-o", "json", "SYSLOG_IDENTIFIER=weightfs")
    return [json.loads(line)["MESSAGE"] for line in entries.splitlines()]


def fails_with(machine: Machine, unit: str, code: int, sentence: str) -> None:
    """The sentence is said once, is all that is said, and `systemctl status` shows it, also when no more is tried."""
    has_failed(machine, unit)
    assert errors(machine, unit) == [f"weightfs: {sentence}"]
    assert machine.show(unit, "StatusText") == sentence
    assert f"status={code}" in machine.run("systemctl", "status", unit, check=False)


@pytest.mark.parametrize(
    ("name", "service", "status", "reason"),
    [
        ("nobody", "User=nosuchuser", "217/USER", "Failed to determine user credentials: No such process"),
        ("secret", "LoadCredential=hf-token:/no/such", "243/CREDENTIALS", "Failed to set up credentials"),
    ],
)
def test_what_systemd_itself_refuses(
    machine: Machine, name: str, service: str, status: str, reason: str
) -> None:
    """Its sentence, not ours; the process that says it may be gone before the journal knows its unit."""
    unit = start(machine, name, service=service)
    has_failed(machine, unit)
    assert f"status={status}" in machine.run("systemctl", "status", unit, check=False)
    assert f"{unit}: {reason}" in machine.journal("-b", "-p", "err")
    assert f"status={status}" in machine.journal("-u", unit)


def test_an_unknown_user_by_hand(machine: Machine) -> None:
    machine.run("mkdir", "-p", "/mnt/hand")
    said = machine.run(
        "sh", "-c", "mount -t weightfs weightfs /mnt/hand -o setuid=nosuchuser 2>&1; echo $?"
    ).splitlines()
    assert said == ["mount.weightfs: there is no user nosuchuser; name one with setuid=", "1"]


def test_a_credential_that_is_none(machine: Machine) -> None:
    machine.write("/etc/weightfs/hf-token", SECRET)
    unit = start(machine, "token", service="LoadCredential=hf-token:/etc/weightfs/hf-token")
    place = f"the credential hf-token of the service: /run/credentials/{unit}/hf-token"
    sentence = f"{place} holds no token; that is one line of letters and digits such as hf_…"
    fails_with(machine, unit, 2, sentence)
    assert machine.show(unit, "NRestarts") == "0", "it does not mend by itself"
    assert SECRET not in machine.journal()


def test_a_token_file_that_the_service_may_not_read(machine: Machine) -> None:
    """By hand root may."""
    machine.write("/etc/weightfs/mine", "hf_mine\n")
    machine.path("/etc/weightfs/mine").chmod(0o600)
    unit = start(machine, "file", settings='hf-token-file = "/etc/weightfs/mine"\n')
    reason = "the token file /etc/weightfs/mine cannot be read: Permission denied"
    fails_with(machine, unit, 2, f"hf-token-file: {reason}; name another file, or set HF_TOKEN")


@pytest.mark.parametrize(
    ("name", "make", "what"),
    [
        ("full", "mkdir -p /mnt/full/x", "is not empty; name an empty directory"),
        ("plain", "touch /mnt/plain", "is not a directory; name an empty directory"),
    ],
)
def test_an_occupied_mount_point(machine: Machine, name: str, make: str, what: str) -> None:
    machine.run("sh", "-c", make)
    sentence = f"The mount point /mnt/{name} {what}"
    fails_with(machine, start(machine, name), 6, sentence)
    assert machine.run("findmnt", "-rno", "TARGET", "-t", "fuse.weightfs", check=False) == ""


def test_a_port_and_a_cache_that_somebody_else_has(machine: Machine) -> None:
    """The port costs the metrics alone, the cache everything."""
    with socket.socket() as stranger:
        stranger.bind(("127.0.0.1", 0))
        stranger.listen()
        address = f"127.0.0.1:{stranger.getsockname()[1]}"
        first = start(machine, "first", settings=f'metrics-listen = "{address}"\n')
        assert machine.show(first, "ActiveState") == "active", machine.journal()
        said = (
            f"metrics cannot be served at {address}: Address already in use; end who has the port, or set "
            "another metrics-listen; it is tried again every 30 s"
        )
        until(lambda: errors(machine, first) == [said], "it is said once")
    cache = "/var/cache/weightfs-first"
    second = start(machine, "second", service=f"Environment=WEIGHTFS_CACHE={cache}")
    pid = machine.show(first, "MainPID")
    sentence = (
        f"the cache {cache} is mounted at /mnt/first (pid {pid}); `weightfs pull` adds a ref there, or name "
        "another cache with --cache"
    )
    fails_with(machine, second, 5, sentence)
    by_hand = f"{WEIGHTFS} mount --cache {cache} /mnt/second 2>&1; echo $?"
    owner = int(machine.run("id", "-u", "weightfs"))
    assert machine.run("sh", "-c", by_hand, user=owner).splitlines() == [f"weightfs: {sentence}", "5"]
    health = json.loads(machine.run(WEIGHTFS, "status", "--json", "--cache", cache))
    assert str(health["pid"]) == pid, "the socket is still that of the first one"
    machine.run("systemctl", "stop", first)


def test_a_socket_that_cannot_be_made(machine: Machine) -> None:
    """Its name is taken by something that is not ours to remove. Models need no socket."""
    machine.run("mkdir", "-p", "/var/cache/weightfs-odd/control.sock/x")
    unit = start(machine, "odd")
    assert machine.show(unit, "ActiveState") == "active", machine.journal()
    said = (
        "the control socket /var/cache/weightfs-odd/control.sock cannot be made: Is a directory; no command "
        "reaches this process: remove what is there, or choose another cache directory"
    )
    assert said in machine.journal("-u", unit, "-p", "warning", "-o", "cat").splitlines()
    machine.run("systemctl", "stop", unit)
