"""The settings in effect, and where each came from: for people, so that no secret is among them.

Of a header, a proxy and a token only that it is set, and from where. URLs lose what may be a password or a query.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

from weightfs.app.credentials import hub_endpoint, hub_token_and_place, registry_auth_file
from weightfs.app.settings import DEFAULT_RETRY
from weightfs.config.load import COMMAND_LINE, ENVIRONMENT, find_file, layers, load, variable_of
from weightfs.config.model import Config, HeaderRule, kebab, keys_of
from weightfs.engine.settings import default_workers
from weightfs.errors import ConfigError
from weightfs.logs import redact, redact_url

DEFAULT: Final = "default"


@dataclass(frozen=True, slots=True)
class Setting:
    """`value` is what JSON can hold; `place`: an option, a variable, a file's path or "default"."""

    key: str
    value: Any
    place: str


def effective(options: Mapping[str, Any], *, file: Path | None, env: Mapping[str, str]) -> list[Setting]:
    """Every setting by key, then the credentials. ConfigError as `load`."""
    config = load(options, file=file, env=env)
    places: dict[str, str] = {}
    for place, layer in layers(options, file=file, env=env):
        for name in layer.model_fields_set:
            places[kebab(name)] = _place(place, kebab(name))
    return [_setting(key, config, places, env) for key in keys_of(Config)] + _credentials(config, env)


def file_in_use(file: Path | None, env: Mapping[str, str]) -> Path | None:
    """The configuration file that is read."""
    return find_file(file, env)


def _place(place: str, key: str) -> str:
    match place:
        case _ if place == ENVIRONMENT:
            return f"variable {variable_of(key)}"
        case _ if place == COMMAND_LINE:
            return f"option --{key}"
    return place


def _setting(key: str, config: Config, places: Mapping[str, str], env: Mapping[str, str]) -> Setting:
    value = getattr(config, key.replace("-", "_"))
    place = places.get(key, DEFAULT)
    if value is None:
        return _unset(key, config, place, env)
    match key:
        case "header":
            return Setting(key, [_header(rule) for rule in value], place)
        case "proxy":
            return Setting(key, _proxy(value), place)
        case "cache" if place == DEFAULT and env.get("CACHE_DIRECTORY"):
            return Setting(key, str(value), "variable CACHE_DIRECTORY")
    return Setting(
        key,
        _plain(config.model_dump(mode="json", by_alias=True, include={key.replace("-", "_")})[key]),
        place,
    )


def _unset(key: str, config: Config, place: str, env: Mapping[str, str]) -> Setting:
    """What stands in for a setting that nobody made."""
    match key:
        case "hf-endpoint":
            place = "variable HF_ENDPOINT" if env.get("HF_ENDPOINT") else place
            return Setting(key, redact_url(hub_endpoint(config, env)), place)
        case "workers":
            return Setting(key, default_workers(), place)
        case "retry":
            return Setting(key, f"{DEFAULT_RETRY}; a mount: until read-timeout", place)
        case "min-free":
            return Setting(key, "1 % of the filesystem, at most 1 GiB", place)
        case "log-level":
            return Setting(key, "info for a mount, else warning", place)
    return Setting(key, None, place)


def _header(rule: HeaderRule) -> str:
    where = "its own line"
    if rule.value_env is not None:
        where = f"the variable {rule.value_env}"
    elif rule.value_file is not None:
        where = f"the file {rule.value_file}"
    return f"{rule.name}: set, from {where}"


def _proxy(url: str) -> str:
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}" + (
        " (with credentials)" if "@" in parts.netloc else ""
    )


def _credentials(config: Config, env: Mapping[str, str]) -> list[Setting]:
    found = []
    try:
        token, place = hub_token_and_place(config, env)
        found.append(Setting("Hub token", "set" if token else None, place or DEFAULT))
    except ConfigError as error:
        found.append(Setting("Hub token", f"not usable: {error}", "hf-token-file"))
    try:
        path = registry_auth_file(config, env)
        found.append(Setting("registry credentials", "set" if path else None, path or DEFAULT))
    except ConfigError as error:
        found.append(Setting("registry credentials", f"not usable: {error}", "registry-auth-file"))
    return found


def _plain(value: Any) -> Any:
    """Without secrets in any text, however deep."""
    match value:
        case str():
            return redact(value)
        case list():
            return [_plain(one) for one in value]
        case dict():
            return {name: _plain(one) for name, one in value.items()}
    return value
