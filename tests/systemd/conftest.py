"""The units, installed into a tree by `systemd/install.sh units`, as they are for an operator."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Protocol

import pytest

import weightfs

REPOSITORY = Path(__file__).parents[2]
LAUNCHER = "/opt/weightfs/bin/weightfs"


class RunInstaller(Protocol):
    """`systemd/install.sh COMMAND` with DESTDIR=tree."""

    def __call__(self, command: str, tree: Path, **variables: str) -> subprocess.CompletedProcess[str]: ...


@pytest.fixture(scope="session")
def run_installer() -> RunInstaller:
    def run(command: str, tree: Path, **variables: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(REPOSITORY / "systemd" / "install.sh"), command],
            env={"PATH": os.environ["PATH"], "DESTDIR": str(tree), **variables},
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )

    return run


@pytest.fixture(scope="session")
def installed(run_installer: RunInstaller, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tree with the units in /etc, and a `weightfs` that runs this interpreter and this package."""
    tree = tmp_path_factory.mktemp("installed")
    done = run_installer(
        "units",
        tree,
        PREFIX="/opt/weightfs",
        UNITDIR="/etc/systemd/system",
        USERUNITDIR="/etc/systemd/user",
        SYSUSERSDIR="/etc/sysusers.d",
    )
    assert done.returncode == 0, done.stderr
    launcher = tree / LAUNCHER.lstrip("/")
    launcher.parent.mkdir(parents=True)
    source = Path(weightfs.__file__).resolve().parents[1]
    launcher.write_text(f'#!/bin/sh\nexport PYTHONPATH={source}\nexec {sys.executable} -m weightfs "$@"\n')
    launcher.chmod(0o755)
    return tree
