"""What tests of several sources share."""

from __future__ import annotations

import os
import shutil
import subprocess

import pytest


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything here is on loopback, whatever the machine's environment says."""
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)


@pytest.fixture(scope="session")
def keys(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, str]]:
    """Name → (public line, secret file text), by Debian's minisign."""
    if shutil.which("minisign") is None:
        pytest.skip("minisign is not installed")
    made = {}
    for name in ("publisher", "stranger"):
        home = tmp_path_factory.mktemp(name)
        command = ["minisign", "-G", "-W", "-p", str(home / "k.pub"), "-s", str(home / "k.key")]
        subprocess.run(command, check=True, capture_output=True)
        made[name] = ((home / "k.pub").read_text().splitlines()[1], (home / "k.key").read_text())
    return made
