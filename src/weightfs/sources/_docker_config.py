"""The credentials that `docker login` left: docker's config.json and the helpers that it names.

Rules: a secret is in no log, error, repr or argv. A file that cannot be used is named in the log and counts as empty:
public models need no credentials. A helper is run as docker runs it (docker-credential-helpers, "Development"), with
a bounded time, and only if its name is a plain word.
"""

from __future__ import annotations

import base64
import binascii
import enum
import json
import logging
import re
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

import trio

logger = logging.getLogger(__name__)

MAX_CONFIG_BYTES = 1024 * 1024
MAX_HELPER_BYTES = 64 * 1024  # what a helper may answer; a token has some KiB
HELPER_SECONDS = 20.0  # a key ring may have to be unlocked by a program of its own
DOCKER_HUB_KEY = "https://index.docker.io/v1/"

_DOCKER_HUBS = frozenset({"docker.io", "index.docker.io", "registry-1.docker.io"})
_HELPER = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_IDENTITY_USER = "<token>"  # what a helper says in place of a user name when its secret is an identity token


class SecretKind(enum.Enum):
    """What a secret is good for."""

    PASSWORD = enum.auto()
    IDENTITY = enum.auto()  # a refresh token
    REGISTRY = enum.auto()  # a bearer token, ready to use


@dataclass(frozen=True, slots=True)
class Credentials:
    """For one registry."""

    username: str
    secret: str = field(repr=False)
    kind: SecretKind = SecretKind.PASSWORD

    @property
    def basic(self) -> str:
        """The value of an `Authorization` header (RFC 7617)."""
        return "Basic " + base64.b64encode(f"{self.username}:{self.secret}".encode()).decode()


async def credentials_for(config_file: str | None, authority: str) -> Credentials | None:
    """What docker's configuration has for the registry at `authority` (`host[:port]`); None if nothing."""
    if config_file is None:
        return None
    config = await trio.to_thread.run_sync(_read, Path(config_file))
    key = DOCKER_HUB_KEY if authority in _DOCKER_HUBS else authority
    helper = _of(_table(config, "credHelpers"), key) or config.get("credsStore")
    if isinstance(helper, str) and helper:
        found = await _ask(helper, key)
        if found is not None:
            return found
    return _from_auth(_of(_table(config, "auths"), key))


def login_name(authority: str) -> str:
    """What to write after `docker login` for a registry."""
    return "docker.io" if authority in _DOCKER_HUBS else authority


def _read(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_CONFIG_BYTES + 1)
        config = json.loads(data) if len(data) <= MAX_CONFIG_BYTES else None
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        logger.warning("docker's credentials in %s are not used: %s", path, type(error).__name__)
        return {}
    if not isinstance(config, dict):
        logger.warning("docker's credentials in %s are not used: it is no JSON object of at most 1 MiB", path)
        return {}
    return config


def _table(config: dict[str, Any], name: str) -> dict[str, Any]:
    table = config.get(name)
    return table if isinstance(table, dict) else {}


def _of(table: dict[str, Any], key: str) -> Any:
    """The entry of a registry: by its key, or by one that docker takes for the same."""
    if key in table:
        return table[key]
    wanted = _hostname(key)
    return next((value for name, value in table.items() if _hostname(name) == wanted), None)


def _hostname(key: str) -> str:
    """`host[:port]` of a key, which may be a URL."""
    host = re.sub(r"^https?://", "", key).partition("/")[0].lower()
    return "docker.io" if host in _DOCKER_HUBS else host


def _is_text(value: Any) -> TypeGuard[str]:
    """Whether it can be sent: JSON can say half of a surrogate pair, which no encoding has."""
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _from_auth(entry: Any) -> Credentials | None:
    if not isinstance(entry, dict):
        return None
    text = {name: value for name, value in entry.items() if _is_text(value)}
    username, password = text.get("username", ""), text.get("password", "")
    if text.get("auth"):
        try:
            username, _, password = base64.b64decode(text["auth"], validate=True).decode().partition(":")
        except (binascii.Error, ValueError):
            logger.warning(
                "an entry of docker's credentials is not used: its auth is not base64 of user:password"
            )
            return None
    if text.get("registrytoken"):
        return Credentials(username, text["registrytoken"], SecretKind.REGISTRY)
    if text.get("identitytoken"):
        return Credentials(username, text["identitytoken"], SecretKind.IDENTITY)
    return Credentials(username, password.rstrip("\x00")) if username and password else None


async def _ask(helper: str, key: str) -> Credentials | None:
    """`docker-credential-HELPER get`: the key on its stdin, JSON on its stdout."""
    if not _HELPER.fullmatch(helper):
        logger.warning("a credential helper of docker's configuration is not run: its name is no plain word")
        return None
    program = f"docker-credential-{helper}"
    try:
        with trio.fail_after(HELPER_SECONDS):
            done = await trio.run_process(
                [program, "get"],
                stdin=key.encode(),
                capture_stdout=True,
                stderr=subprocess.DEVNULL,
                check=False,
            )
    except trio.TooSlowError:
        logger.warning("%s did not answer within %g s", program, HELPER_SECONDS)
        return None
    except OSError as error:
        logger.warning("%s cannot be run: %s", program, error.strerror)
        return None
    if done.returncode:
        logger.debug("%s has no credentials for %s", program, key)
        return None
    return _from_helper(done.stdout, program)


def _from_helper(answer: bytes, program: str) -> Credentials | None:
    try:
        fields = json.loads(answer) if len(answer) <= MAX_HELPER_BYTES else None
    except (ValueError, RecursionError):
        fields = None
    username, secret = (
        (fields.get("Username"), fields.get("Secret")) if isinstance(fields, dict) else (None, None)
    )
    if not _is_text(username) or not _is_text(secret) or not secret:
        logger.warning("%s answered with something else than credentials", program)
        return None
    if username == _IDENTITY_USER:
        return Credentials("", secret, SecretKind.IDENTITY)
    return Credentials(username, secret)
