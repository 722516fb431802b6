"""`weightfs config check` and `show`: what is wrong is named; values have their places; no secret is shown."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from click.testing import CliRunner, Result

from weightfs.cli import cli
from weightfs.config.model import Config, keys_of


def run(tmp_path: Path, *arguments: str, **env: str) -> Result:
    clean: dict[str, str | None] = dict.fromkeys(
        ("XDG_CONFIG_HOME", "XDG_CACHE_HOME", "WEIGHTFS_CONFIG", "HF_TOKEN", "HF_TOKEN_PATH", "HF_HOME",
         "HF_ENDPOINT", "DOCKER_CONFIG", "CACHE_DIRECTORY", "CREDENTIALS_DIRECTORY")
    )  # fmt: skip
    return CliRunner(env={**clean, "HOME": str(tmp_path), **env}).invoke(cli, ["config", *arguments])


def written(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "given.toml"
    file.write_text(text)
    return file


def shown(tmp_path: Path, *arguments: str, **env: str) -> dict[str, tuple[Any, str]]:
    result = run(tmp_path, "show", "--json", *arguments, **env)
    assert result.exit_code == 0, result.output
    return {one["key"]: (one["value"], one["from"]) for one in json.loads(result.stdout)["settings"]}


def test_a_good_file_is_ok_and_named(tmp_path: Path) -> None:
    file = written(tmp_path, 'fill = "all"\nrefs = ["ollama://aya:8b"]\n')
    result = run(tmp_path, "check", str(file))
    assert (result.exit_code, result.stdout) == (0, f"ok: {file}\n")
    result = run(tmp_path, "check", WEIGHTFS_CONFIG=str(file))
    assert (result.exit_code, result.stdout) == (0, f"ok: {file}\n")


def test_a_typo_is_named_with_file_and_nearest_key(tmp_path: Path) -> None:
    file = written(tmp_path, 'read-timeuot = "1m"\n')
    for result in (run(tmp_path, "check", str(file)), run(tmp_path, "check", WEIGHTFS_CONFIG=str(file))):
        assert result.exit_code == 2
        assert str(file) in result.stderr
        assert "'read-timeuot'" in result.stderr
        assert "'read-timeout'" in result.stderr


def test_refs_and_variables_are_checked_too(tmp_path: Path) -> None:
    file = written(tmp_path, 'refs = ["olama://aya:8b"]\n')
    result = run(tmp_path, "check", str(file))
    assert (result.exit_code, str(file) in result.stderr, "refs" in result.stderr) == (2, True, True)
    result = run(tmp_path, "check", WEIGHTFS_CONFIG="/dev/null", WEIGHTFS_FILL="some")
    assert (result.exit_code, "WEIGHTFS_FILL" in result.stderr) == (2, True)
    assert run(tmp_path, "check", str(tmp_path / "none.toml")).exit_code == 2


def test_every_setting_is_shown_with_the_place_that_won(tmp_path: Path) -> None:
    file = written(tmp_path, 'fill = "all"\nread-timeout = "1m"\nmax-jobs = 9\n')
    found = shown(
        tmp_path, "--config", str(file), "--max-jobs", "7", WEIGHTFS_READ_TIMEOUT="2m", WEIGHTFS_MAX_JOBS="8",
        HF_ENDPOINT="https://hub.lan",
    )  # fmt: skip
    assert set(keys_of(Config)) <= set(found)
    assert found["fill"] == ("all", str(file))
    assert found["read-timeout"] == (120, "variable WEIGHTFS_READ_TIMEOUT")
    assert found["max-jobs"] == (7, "option --max-jobs")
    assert found["readahead"] == (64 << 20, "default")
    assert found["hf-endpoint"] == ("https://hub.lan", "variable HF_ENDPOINT")
    text = run(tmp_path, "show", "--config", str(file)).stdout
    (line,) = (line for line in text.splitlines() if line.startswith("fill "))
    assert line.split() == ["fill", "all", str(file)]


def test_sizes_and_durations_are_shown_as_they_are_written(tmp_path: Path) -> None:
    file = written(tmp_path, 'max-size = "3GiB"\nmin-free = 1000\nmax-age = "36h"\nretry-delay = "0.25s"\n')
    text = run(tmp_path, "show", "--config", str(file)).stdout
    seen = {line.split()[0]: line.split()[1] for line in text.splitlines()}
    expected = {
        "max-size": "3GiB", "min-free": "1000", "max-age": "36h", "retry-delay": "0.25s", "readahead": "64MiB",
        "commit-size": "16MiB", "read-timeout": "10m", "commit-interval": "1s", "max-jobs": "32",
    }  # fmt: skip
    assert {key: seen[key] for key in expected} == expected


def test_secrets_are_said_to_be_set_and_never_shown(tmp_path: Path) -> None:
    token_file = tmp_path / "token"
    token_file.write_text("hf_s3cretfile\n")
    file = written(
        tmp_path,
        f"""
        proxy = "http://me:s3cretproxy@proxy.lan:3128"
        hf-token-file = "{token_file}"
        refs = ["https://models.lan/m.gguf?sig=s3cretsig"]
        [[header]]
        name = "Authorization"
        value = "Bearer s3cretheader"
        [[header]]
        name = "X-Key"
        prefix = "s3cretprefix "
        value-env = "MY_KEY"
        [[mirror]]
        prefix = "https://models.lan/"
        url = "https://mirror.lan/"
        """,
    )
    for arguments in (["show"], ["show", "--json"]):
        result = run(tmp_path, *arguments, "--config", str(file), MY_KEY="s3cretkey")
        assert result.exit_code == 0, result.stderr
        assert "s3cret" not in result.output
        assert "Authorization: set" in result.stdout
        assert "MY_KEY" in result.stdout
        assert "proxy.lan:3128" in result.stdout
    assert shown(tmp_path, "--config", str(file))["Hub token"] == ("set", f"hf-token-file {token_file}")
    found = shown(tmp_path, "--config", "/dev/null", HF_TOKEN="hf_s3cret")
    assert found["Hub token"] == ("set", "HF_TOKEN")
    assert shown(tmp_path, "--config", "/dev/null")["Hub token"] == (None, "default")
    broken = shown(tmp_path, "--config", "/dev/null", "--hf-token-file", "/none")["Hub token"]
    assert "not usable" in broken[0]
