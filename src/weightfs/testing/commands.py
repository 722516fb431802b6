"""The command line within the process of a test: a home and a cache of its own, and no settings of the machine's."""

from __future__ import annotations

from pathlib import Path

from click.testing import CliRunner, Result

from weightfs.cli import cli


def invoke(home: Path, *arguments: str, cache: bool = True, **env: str) -> Result:
    """What `weightfs ARGUMENTS` does and says; with `cache`, on the one at `home/cache`."""
    clean = {"HOME": str(home), "XDG_CONFIG_HOME": "", "XDG_CACHE_HOME": "", "WEIGHTFS_CONFIG": ""}
    options = ["--cache", str(home / "cache")] if cache else []
    return CliRunner(env={**clean, **env}).invoke(cli, [*arguments, *options])


def run(home: Path, *arguments: str, code: int = 0, cache: bool = True, **env: str) -> Result:
    """The same, which has to end with `code`."""
    result = invoke(home, *arguments, cache=cache, **env)
    assert result.exit_code == code, (result.stdout, result.stderr)
    return result
