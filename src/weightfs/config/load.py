"""File, environment, command line: each layer is checked on its own, so that an error names its place."""

from __future__ import annotations

import difflib
import os
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from pydantic import ValidationError

from weightfs.config.model import SECTIONS, Config, kebab, keys_of
from weightfs.core.geometry import MIB
from weightfs.errors import ConfigError

MAX_FILE_BYTES: Final = MIB
ENV_PREFIX: Final = "WEIGHTFS_"
SYSTEM_FILE: Final = Path("/etc/weightfs/config.toml")
COMMAND_LINE: Final = "command line"
ENVIRONMENT: Final = "environment"
# Settings that take several values; a variable holds one per line.
_LISTS: Final = ("refs", "trusted-keys", "private-hosts")
_FILE_ONLY: Final = ("mirror", "endpoint", "host")


def default_cache(env: Mapping[str, str]) -> Path:
    """CACHE_DIRECTORY as set by systemd, else `$XDG_CACHE_HOME/weightfs`, else `~/.cache/weightfs`."""
    if env.get("CACHE_DIRECTORY"):
        return Path(env["CACHE_DIRECTORY"].partition(":")[0])
    return user_directory(env, "XDG_CACHE_HOME", ".cache") / "weightfs"


def find_file(explicit: Path | None, env: Mapping[str, str], *, system: Path = SYSTEM_FILE) -> Path | None:
    """`--config`, `$WEIGHTFS_CONFIG`, the user's file, the system's; None if there is none."""
    if explicit is not None:
        return explicit
    if env.get("WEIGHTFS_CONFIG"):
        return Path(env["WEIGHTFS_CONFIG"])
    user = user_directory(env, "XDG_CONFIG_HOME", ".config") / "weightfs" / "config.toml"
    return next((path for path in (user, system) if is_there(path)), None)


def is_there(path: Path) -> bool:
    """Whether there is a file; no, where one may not even look (a service with `ProtectHome=`)."""
    try:
        return path.is_file()
    except OSError:
        return False


def user_directory(env: Mapping[str, str], variable: str, fallback: str) -> Path:
    """`$variable`, else `fallback` in the home directory."""
    # XDG Base Directory Specification: a relative path is invalid and is ignored
    given = env.get(variable, "")
    if given.startswith("/"):
        return Path(given)
    home = env.get("HOME", "")
    return (Path(home) if home.startswith("/") else Path("/")) / fallback


def load(
    options: Mapping[str, Any], *, file: Path | None = None, env: Mapping[str, str] | None = None
) -> Config:
    """All layers, merged and checked.

    Args:
        options: What was given on the command line, by kebab-case key; absent where nothing was given.
        file: `--config`.
        env: The environment (default: this process's).

    Raises:
        ConfigError: One sentence with the place, the key and what may stand there.
    """
    env = os.environ if env is None else env
    merged: dict[str, Any] = {"cache": default_cache(env)}
    for _, layer in layers(options, file=file, env=env):
        merged.update({name: getattr(layer, name) for name in layer.model_fields_set})
    # A daemon that detaches leaves the directory that relative paths belong to.
    merged = {
        name: Path.cwd() / value if isinstance(value, Path) else value for name, value in merged.items()
    }
    return Config().model_copy(update=merged)


def layers(
    options: Mapping[str, Any], *, file: Path | None, env: Mapping[str, str]
) -> list[tuple[str, Config]]:
    """Each layer with its place, checked, the lowest first; see `check` and `load`. ConfigError."""
    given: list[tuple[str, Mapping[str, Any]]] = []
    path = find_file(file, env)
    if path is not None:
        given.append((str(path), read_file(path)))
    given.append((ENVIRONMENT, read_env(env)))
    given.append((COMMAND_LINE, options))
    return [(place, check(values, place)) for place, values in given]


def read_file(path: Path) -> dict[str, Any]:
    """The TOML of one file. ConfigError if it cannot be read or parsed."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise ConfigError(
            f"the configuration file {path} cannot be read: {error.strerror}; name another with --config"
        ) from None
    if len(data) > MAX_FILE_BYTES:
        raise ConfigError(f"the configuration file {path} has over {MAX_FILE_BYTES} bytes; it cannot be ours")
    try:
        return tomllib.loads(data.decode())
    except UnicodeDecodeError:
        raise ConfigError(f"the configuration file {path} is not UTF-8 text; save it as UTF-8") from None
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise ConfigError(f"the configuration file {path} is not valid TOML: {error}") from None


def read_env(env: Mapping[str, str]) -> dict[str, Any]:
    """Settings from `WEIGHTFS_<KEY>`; an empty variable counts as absent, other names are not looked at."""
    values: dict[str, Any] = {}
    for key in keys_of(Config):
        text = env.get(variable_of(key), "")
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        if not lines or key in _FILE_ONLY:
            continue
        if key == "header":
            values[key] = parse_headers(lines, variable_of(key))
        else:
            values[key] = lines if key in _LISTS else text
    return values


def variable_of(key: str) -> str:
    """`read-timeout` → `WEIGHTFS_READ_TIMEOUT`."""
    return ENV_PREFIX + key.replace("-", "_").upper()


def parse_headers(lines: Sequence[str], place: str) -> list[dict[str, str]]:
    """`Name: value` lines as `[[header]]` tables. ConfigError, without the value: a secret."""
    rules = []
    for line in lines:
        name, colon, value = line.partition(":")
        if not colon:
            raise ConfigError(f"{place}: a header is written 'Name: value', and the one given has no colon")
        rules.append({"name": name.strip(), "value": value.strip()})
    return rules


def check(values: Mapping[str, Any], place: str) -> Config:
    """One layer as a Config that holds only what was given (`model_fields_set`). ConfigError."""
    try:
        return Config.model_validate(dict(values))
    except ValidationError as error:
        found = error.errors(include_url=False, include_input=False)
        # A misspelt key is often the cause of what else is wrong in its table.
        first = next((one for one in found if one["type"] == "extra_forbidden"), found[0])
        location = list(first["loc"])
        raise ConfigError(_sentence(first["type"], str(first["msg"]), location, place)) from None


def _sentence(kind: str, message: str, location: Sequence[str | int], place: str) -> str:
    """One sentence for pydantic's first complaint about a layer."""
    key = str(location[0]) if location else ""
    if kind == "extra_forbidden":
        section = SECTIONS.get(key, Config) if len(location) > 1 else Config
        nearest = _nearest(location[-1], section)
        return f"{place}: unknown key {_path_text(location)!r}; the nearest known one is {nearest!r}"
    where = {
        COMMAND_LINE: f"--{key.removesuffix('s') if key in _LISTS else key}",
        ENVIRONMENT: variable_of(key),
    }.get(place, f"{place}: {_path_text(location)}")
    if kind == "missing":
        return f"{where} is missing; add it"
    if kind.startswith("bool"):
        message = "must be true or false"
    elif kind in ("tuple_type", "model_type", "model_attributes_type"):
        message = "must be a list" if kind == "tuple_type" else "must be a table"
    message = message.removeprefix("Value error, ").replace("Input should be", "must be")
    return f"{where}: {message}"


def _path_text(location: Sequence[str | int]) -> str:
    """`("header", 0, "name")` → `header[1].name`: people count from one."""
    text = ""
    for part in location:
        if isinstance(part, int):
            text += f"[{part + 1}]"
        else:
            text += f".{part}" if text else part
    return text


def _nearest(key: str | int, section: type[Any]) -> str:
    names = [kebab(name) for name in keys_of(section)]
    return difflib.get_close_matches(str(key).replace("_", "-").lower(), names, n=1, cutoff=0.0)[0]
