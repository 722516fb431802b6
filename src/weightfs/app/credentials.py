"""Where the Hub and the registries are reached, and the secrets for them: from the environment, files, the service.

Rules: what was named must be usable; what is only looked for may be missing. No text of an error or of the log holds a
secret, and none is kept anywhere but in `FetchSettings`, whose repr leaves it out.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from weightfs.config import Config
from weightfs.config.load import is_there, user_directory
from weightfs.config.values import base_url, check_header_value, read_small
from weightfs.errors import ConfigError
from weightfs.sources.base import FetchSettings

log = logging.getLogger(__name__)

# Names of systemd credentials (systemd.exec(5), LoadCredential=).
HUB_CREDENTIAL: Final = "hf-token"
REGISTRY_CREDENTIAL: Final = "registry-auth"


def hub_endpoint(config: Config, env: Mapping[str, str]) -> str:
    """`hf-endpoint`, else `HF_ENDPOINT`, else the Hub itself. ConfigError."""
    if config.hf_endpoint is not None:
        return config.hf_endpoint
    if not env.get("HF_ENDPOINT"):
        return FetchSettings().hf_endpoint
    try:
        return base_url(env["HF_ENDPOINT"])
    except ValueError as error:
        raise ConfigError(f"the variable HF_ENDPOINT: {error}") from None


def hub_token(config: Config, env: Mapping[str, str]) -> str:
    """`HF_TOKEN`, else `hf-token-file`, else the service's credential, else where the Hub's client keeps it.

    Empty if there is none. ConfigError if what was named cannot be a token.
    """
    return hub_token_and_place(config, env)[0]


def hub_token_and_place(config: Config, env: Mapping[str, str]) -> tuple[str, str]:
    """The same, and where it was found; both are empty if there is none."""
    if given := env.get("HF_TOKEN", "").strip():
        return _token(given, "the variable HF_TOKEN"), "HF_TOKEN"
    if config.hf_token_file is not None:
        return _token_of_file(config.hf_token_file, "hf-token-file"), f"hf-token-file {config.hf_token_file}"
    credential = _credential(env, HUB_CREDENTIAL)
    if credential is not None:
        place = f"the credential {HUB_CREDENTIAL} of the service"
        return _token_of_file(credential, place), place
    path = _clients_token_file(env)
    if not is_there(path):
        return "", ""
    try:
        return _token_of_file(path, "the token of the Hub's own client"), str(path)
    except ConfigError as error:
        log.warning("%s; the Hub is asked without a token", error)
        return "", ""


def registry_auth_file(config: Config, env: Mapping[str, str]) -> str | None:
    """`registry-auth-file`, else the service's credential, else docker's own file, if one is there. ConfigError."""
    if config.registry_auth_file is not None:
        path = config.registry_auth_file
        if not is_there(path):
            raise ConfigError(
                f"registry-auth-file: there is no file {path}; name one like docker's config.json"
            )
        return str(path)
    credential = _credential(env, REGISTRY_CREDENTIAL)
    if credential is not None:
        return str(credential)
    given = env.get("DOCKER_CONFIG", "")
    path = (Path(given) if given else user_directory(env, "", ".docker")) / "config.json"
    return str(path) if is_there(path) else None


def _clients_token_file(env: Mapping[str, str]) -> Path:
    """As huggingface_hub has it: `HF_TOKEN_PATH`, else `$HF_HOME/token`, else in the user's cache directory."""
    for variable, rest in (("HF_TOKEN_PATH", ""), ("HF_HOME", "token")):
        if env.get(variable):
            return Path(os.path.expanduser(env[variable])) / rest  # noqa: PTH111  # without a home it stays as it is
    return user_directory(env, "XDG_CACHE_HOME", ".cache") / "huggingface" / "token"


def _credential(env: Mapping[str, str], name: str) -> Path | None:
    directory = env.get("CREDENTIALS_DIRECTORY", "")
    path = Path(directory) / name
    return path if directory and is_there(path) else None


def _token_of_file(path: Path, place: str) -> str:
    try:
        text = read_small(path, "token")
    except ValueError as error:
        raise ConfigError(f"{place}: {error}; name another file, or set HF_TOKEN") from None
    return _token(text.strip(), f"{place}: {path}")


def _token(text: str, place: str) -> str:
    try:
        token = check_header_value(text)
    except ValueError:
        token = ""
    if not token or " " in token:
        # No colon after "token": the log takes what follows for one.
        raise ConfigError(f"{place} holds no token; that is one line of letters and digits such as hf_…")
    return token
