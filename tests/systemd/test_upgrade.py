"""Another version is installed, and the service restarted: what is open goes on, under a real systemd.

A version is this source tree with another number in it, copied into the machine; it takes the place of the one that
runs as `systemd/install.sh` has it, by renaming.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import weightfs
from weightfs.testing.machine import NOBODY, Machine, Riders, why_not
from weightfs.testing.nginx import Nginx
from weightfs.testing.waiting import until

pytestmark = [
    pytest.mark.systemd,
    pytest.mark.mount,
    pytest.mark.nginx,
    pytest.mark.skipif(bool(why_not()), reason=why_not() or "it can be booted"),
]

SERVICE = "weightfs.service"
CACHE = "/var/cache/weightfs"
WEIGHTFS = "/opt/weightfs/bin/weightfs"
PACKAGES = "/opt/weightfs/lib/weightfs/packages"
RIDER = Path(__file__).parents[1] / "faults" / "rider.py"
MODEL = os.urandom(3 << 20) + b"the end"
# The file would be read without us: then nobody would notice whether we are there.
SETTINGS = 'passthrough = false\nrefs = ["{}"]\n'
# Reads a page, from the daemon each time, until that is an error; says its name.
HOLD = """
import errno, os, sys
from pathlib import Path
fd, progress = os.open(sys.argv[1], os.O_RDONLY), Path(sys.argv[2])
try:
    while True:
        os.pread(fd, 4096, 0)
        progress.write_text("open")
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
except OSError as error:
    progress.write_text(errno.errorcode[error.errno])
"""


def install(machine: Machine, version: str, *, takeover: int | None = None) -> None:
    """Put a version in place of the one that is there. `takeover`: the format in which it leaves a mount."""
    new, old = machine.path(f"{PACKAGES}.new"), machine.path(f"{PACKAGES}.old")
    here = machine.path(PACKAGES)
    shutil.copytree(Path(weightfs.__file__).parent, new / "weightfs")
    replace(new / "weightfs/__init__.py", r'__version__ = ".*"', f'__version__ = "{version}"')
    if takeover is not None:
        replace(
            new / "weightfs/mount/takeover.py", r"VERSION: Final = \d+\n", f"VERSION: Final = {takeover}\n"
        )
    if here.exists():
        here.rename(old)
    new.rename(here)
    shutil.rmtree(old, ignore_errors=True)
    assert machine.run(WEIGHTFS, "--version") == f"weightfs {version}\n"


def replace(path: Path, pattern: str, text: str) -> None:
    changed, count = re.subn(pattern, text, path.read_text())
    assert count == 1, f"{pattern} in {path}"
    path.write_text(changed)


def served_by(machine: Machine) -> str:
    """The version that answers on the control socket."""
    version: str = json.loads(machine.run(WEIGHTFS, "status", "--json", "--cache", CACHE))["version"]
    return version


@pytest.fixture(scope="module")
def origin(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nginx]:
    root = tmp_path_factory.mktemp("origin")
    (root / "m.gguf").write_bytes(MODEL)
    with Nginx(root) as nginx:
        yield nginx


@pytest.fixture(scope="module")
def machine(installed: Path, origin: Nginx, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    """With version 1.0.0 installed."""
    tree = tmp_path_factory.mktemp("tree")
    subprocess.run(["cp", "-a", f"{installed}/.", tree], check=True)
    launcher = f'#!/bin/sh\nexport PYTHONPATH={PACKAGES}\nexec {sys.executable} -m weightfs "$@"\n'
    (tree / WEIGHTFS.lstrip("/")).write_text(launcher)
    with Machine(tree) as booted:
        booted.write("/etc/weightfs/config.toml", SETTINGS.format(origin.url("m.gguf")))
        install(booted, "1.0.0")
        yield booted


@pytest.fixture
def path(machine: Machine, origin: Nginx) -> str:
    """Of the model, once the service presents all of it."""
    machine.run("systemctl", "start", SERVICE)
    place = f"/mnt/models/models/http/127.0.0.1:{origin.port}/m.gguf"
    until(lambda: place in machine.run("find", "/mnt/models", user=NOBODY, check=False), "the model appears")
    digest = machine.run("sha256sum", place, user=NOBODY).split()[0]
    assert digest == hashlib.sha256(MODEL).hexdigest()
    return place


def test_what_is_open_goes_on_with_the_next_version(machine: Machine, path: str) -> None:
    """The old one runs on without its files until it is restarted."""
    riders = Riders(machine, RIDER, path, MODEL)
    device = machine.run("findmnt", "-no", "MAJ:MIN", "/mnt/models")
    install(machine, "1.1.0")
    riders.go_on()
    assert served_by(machine) == "1.0.0"
    machine.run("systemctl", "restart", SERVICE)
    assert served_by(machine) == "1.1.0"
    assert machine.run("findmnt", "-no", "MAJ:MIN", "/mnt/models") == device, "it is the same mount"
    riders.go_on()
    riders.end()
    assert machine.journal("-u", SERVICE).count("The mount at /mnt/models goes on") == 1


def test_a_version_that_cannot_take_over_makes_the_mount_anew(machine: Machine, path: str) -> None:
    """It says so in one line; who had something open is told by an error, and opens it again."""
    machine.write("/var/tmp/hold.py", HOLD)
    progress = machine.path("/var/tmp/hold")
    progress.write_text("")
    progress.chmod(0o666)
    command = f"{sys.executable} -I -S /var/tmp/hold.py {path} /var/tmp/hold"
    machine.write("/run/systemd/system/hold.service", f"[Service]\nUser=nobody\nExecStart={command}\n")
    machine.run("systemctl", "daemon-reload")
    machine.run("systemctl", "start", "hold.service")
    until(lambda: progress.read_text() == "open", "the client has it open")
    install(machine, "2.0.0", takeover=99)
    machine.run("systemctl", "restart", SERVICE)
    assert machine.show(SERVICE, "ActiveState") == "active"
    assert served_by(machine) == "2.0.0"
    line = (
        "The mount that an earlier daemon left is detached, and made anew: it is of version 1, not 99; "
        "what was open there is cut off"
    )
    said = machine.journal("-u", SERVICE, "-p", "warning", "-o", "cat", "SYSLOG_IDENTIFIER=weightfs")
    assert said.splitlines() == [line]
    until(lambda: progress.read_text() == errno.errorcode[errno.ENOTCONN], "the client has got its error")
    assert machine.run("findmnt", "-rno", "TARGET", "-t", "fuse.weightfs").split() == ["/mnt/models"]
    digest = machine.run("sha256sum", path, user=NOBODY).split()[0]
    assert digest == hashlib.sha256(MODEL).hexdigest()
    machine.run("systemctl", "stop", SERVICE)
