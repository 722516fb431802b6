"""The manual pages and completions that `make install` places: complete, and such that their readers take them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from weightfs.cli import cli

SCRIPT = Path(__file__).parents[2] / "systemd" / "manpages.py"


@pytest.fixture(scope="module")
def share(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tree = tmp_path_factory.mktemp("share")
    env = {**os.environ, "SOURCE_DATE_EPOCH": "86400"}
    subprocess.run([sys.executable, str(SCRIPT), str(tree)], check=True, env=env, timeout=60)
    return tree


def commands(command: click.Command, name: str) -> Iterator[tuple[str, click.Command]]:
    yield name, command
    for child, one in getattr(command, "commands", {}).items():
        yield from commands(one, f"{name}-{child}")


def test_every_command_has_a_page_with_all_of_its_options(share: Path) -> None:
    pages = {path.stem: path.read_text() for path in (share / "man/man1").iterdir()}
    found = dict(commands(cli, "weightfs"))
    assert pages.keys() == found.keys()
    for name, command in found.items():
        page = pages[name].replace("\\-", "-")
        assert '"1970-01-02"' in page
        for option in (text for one in command.params for text in one.opts if text.startswith("--")):
            assert option in page, f"{option} is not in the page of {name}"
        for line in (line for line in (command.epilog or "").splitlines() if line.startswith("  ")):
            assert line.strip() in page.replace("\\e", "\\")
        assert "\b" not in page


def test_groff_has_nothing_to_say(share: Path) -> None:
    for page in (share / "man/man1").iterdir():
        done = subprocess.run(
            ["groff", "-k", "-man", "-ww", "-z", "-Tutf8", str(page)],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert (done.returncode, done.stderr) == (0, ""), page.name


def test_bash_completes(share: Path, tmp_path: Path) -> None:
    launcher = tmp_path / "weightfs"
    launcher.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m weightfs "$@"\n')
    launcher.chmod(0o755)
    script = (
        f". {share}/bash-completion/completions/weightfs; "
        "COMP_WORDS=(weightfs mount --pass); COMP_CWORD=2; "
        f'_weightfs_completion "{launcher}"; echo "${{COMPREPLY[@]}}"'
    )
    done = subprocess.run(
        ["bash", "--norc", "-c", script], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.split() == ["--passthrough"], done.stderr


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_command_prints_the_same(share: Path, shell: str) -> None:
    said = subprocess.run(
        [sys.executable, "-m", "weightfs", "completion", shell],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    ).stdout
    (path,) = [
        path for path in share.rglob("*weightfs*") if shell in str(path.relative_to(share)) and path.is_file()
    ]
    assert said == path.read_text() + "\n"
