"""`systemd/install.sh` in a tree of its own: again and again, and away again."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = pytest.mark.systemd

UNIT = "lib/systemd/system/weightfs.service"
CONFIG = "etc/weightfs/config.toml"

Installer = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def installer(run_installer: Installer, tmp_path: Path) -> Installer:
    """Into `dest`; with the exit code that is expected."""

    def run(command: str, code: int = 0, **variables: str) -> subprocess.CompletedProcess[str]:
        done = run_installer(command, tmp_path / "dest", **variables)
        assert done.returncode == code, done.stderr
        return done

    return run


def contents(tree: Path) -> dict[str, tuple[int, bytes]]:
    return {
        str(path.relative_to(tree)): (path.stat().st_mode & 0o777, path.read_bytes())
        for path in tree.rglob("*")
        if path.is_file()
    }


def test_twice_is_once_and_nothing_stays(installer: Installer, tmp_path: Path) -> None:
    tree = tmp_path / "dest"
    theirs = tree / "lib/systemd/system/other.service"
    theirs.parent.mkdir(parents=True)
    theirs.write_text("")
    installer("units")
    once = contents(tree)
    assert {
        UNIT,
        CONFIG,
        "usr/lib/systemd/user/weightfs.service",
        "usr/lib/sysusers.d/weightfs.conf",
    } <= once.keys()
    assert once[UNIT][0] == 0o644
    installer("units")
    assert contents(tree) == once
    installer("uninstall")
    assert list(contents(tree)) == ["lib/systemd/system/other.service"]
    assert not list(tree.rglob("*weightfs*"))


def test_what_an_installed_page_leads_to_is_installed(installer: Installer, tmp_path: Path) -> None:
    installer("units")
    pages = list((tmp_path / "dest/usr/local/share/doc/weightfs").rglob("*.md"))
    assert len(pages) > 5
    for page in pages:
        for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.name} leads to {link}"


def test_other_places(installer: Installer, tmp_path: Path) -> None:
    installer("units", PREFIX="/opt/w", WEIGHTFS="/opt/pipx/weightfs", UNITDIR="/etc/systemd/system")
    text = (tmp_path / "dest/etc/systemd/system/weightfs.service").read_text()
    assert "ExecStart=/opt/pipx/weightfs mount" in text
    assert "/opt/w/lib/weightfs/weightfs-mountpoint" in text
    assert "/usr/local/" not in text
    assert "nothing to remove" in installer("uninstall", code=1).stderr, "another PREFIX knows nothing of it"


def test_the_operators_settings_stay(installer: Installer, tmp_path: Path) -> None:
    config = tmp_path / "dest" / CONFIG
    config.parent.mkdir(parents=True)
    config.write_text("fill = 'all'\n")
    installer("units")
    assert config.read_text() == "fill = 'all'\n"
    installer("uninstall")
    assert config.read_text() == "fill = 'all'\n", "one that was there before"
    config.unlink()
    installer("units")
    with config.open("a") as file:
        file.write("fill = 'never'\n")
    installer("units")
    assert "config.toml was changed, and stays" in installer("uninstall").stdout
    assert config.read_text().endswith("fill = 'never'\n"), "one that was changed since"


def test_what_is_not_ours_is_not_replaced(installer: Installer, tmp_path: Path) -> None:
    unit = tmp_path / "dest" / UNIT
    unit.parent.mkdir(parents=True)
    unit.write_text("a package's\n")
    assert "is there already, and not from here" in installer("units", code=1).stderr
    assert unit.read_text() == "a package's\n"
    installer("uninstall")
    assert unit.read_text() == "a package's\n"


def test_what_cannot_be_written_into_a_unit_is_refused(installer: Installer) -> None:
    assert "may hold letters" in installer("units", code=1, PREFIX="/opt/a b").stderr
    assert "not an absolute path" in installer("units", code=1, PREFIX="opt").stderr
    assert "say install, units or uninstall" in installer("instal", code=1).stderr


@pytest.mark.skipif(
    not os.environ.get("WEIGHTFS_SOAK"), reason="builds everything from source: `make soak` does it"
)
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_whole(installer: Installer, tmp_path: Path) -> None:
    tree = tmp_path / "dest"
    installer("install", PREFIX="/opt/w")
    launcher = tree / "opt/w/bin/weightfs"
    assert launcher.stat().st_mode & 0o777 == 0o755
    python = tree / "opt/w/lib/weightfs/venv/bin/python"
    command = launcher.read_text().replace("/opt/w/", f"{tree}/opt/w/")
    said = subprocess.run(
        ["/bin/sh", "-c", command, "sh", "--version"], capture_output=True, text=True, check=True
    )
    assert said.stdout.startswith("weightfs ")
    for path in (
        "man/man1/weightfs-mount.1",
        "bash-completion/completions/weightfs",
        "zsh/site-functions/_weightfs",
    ):
        assert (tree / "opt/w/share" / path).is_file()
    for module in ("pyfuse3", "lmdb", "weightfs.mount.serve"):
        subprocess.run([str(python), "-I", "-c", f"import {module}"], check=True)
    assert not list((tree / "opt/w/lib/weightfs/venv").rglob("pytest")), (
        "what only development needs is not there"
    )
    installer("uninstall", PREFIX="/opt/w")
    assert not list(tree.rglob("*weightfs*"))
