"""Where tokens come from, who wins, and that none of them is told."""

from __future__ import annotations

import errno
import logging
from pathlib import Path

import pytest

from weightfs.app.credentials import hub_endpoint, hub_token, registry_auth_file
from weightfs.app.settings import engine_settings, fetch_settings, with_header_origins
from weightfs.config import Config, load
from weightfs.engine import wire
from weightfs.errors import ConfigError
from weightfs.logs import redact
from weightfs.sources.base import FetchSettings

SECRET = "hf_SeCrEt"


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path


def config_of(home: Path, text: str = "") -> Config:
    file = home / "config.toml"
    file.write_text(text)
    return load({}, file=file, env={"HOME": str(home)})


def put(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


# ---- the Hub


def test_where_the_token_of_the_hub_comes_from(home: Path) -> None:
    """Each place beats the next ones."""
    env = {"HOME": str(home)}
    plain = config_of(home)
    assert hub_token(plain, env) == ""
    put(home / ".cache" / "huggingface" / "token", "hf_default\n")
    assert hub_token(plain, env) == "hf_default"
    put(home / "xdg" / "huggingface" / "token", "hf_xdg")
    env |= {"XDG_CACHE_HOME": str(home / "xdg")}
    assert hub_token(plain, env) == "hf_xdg"
    put(home / "hf" / "token", "hf_home")
    env |= {"HF_HOME": str(home / "hf")}
    assert hub_token(plain, env) == "hf_home"
    env |= {"HF_TOKEN_PATH": str(put(home / "t", "hf_path"))}
    assert hub_token(plain, env) == "hf_path"
    env |= {"CREDENTIALS_DIRECTORY": str(home / "creds")}
    assert hub_token(plain, env) == "hf_path"
    put(home / "creds" / "hf-token", "hf_service")
    assert hub_token(plain, env) == "hf_service"
    configured = config_of(home, f"hf-token-file = '{put(home / 'mine', '  hf_mine  ')}'")
    assert hub_token(configured, env) == "hf_mine"
    env |= {"HF_TOKEN": "hf_env"}
    assert hub_token(configured, env) == "hf_env"
    env |= {"HF_TOKEN": " "}
    assert hub_token(configured, env) == "hf_mine"


@pytest.mark.parametrize("text", ["", f"{SECRET} two", f"{SECRET}\n{SECRET}", f"{SECRET}\x07", "ü"])
def test_what_was_named_must_be_a_token(home: Path, text: str) -> None:
    path = put(home / "mine", text)
    configured = config_of(home, f"hf-token-file = '{path}'")
    service = {"CREDENTIALS_DIRECTORY": str(put(home / "creds" / "hf-token", text).parent)}
    for config, env, says in (
        (configured, {}, f"hf-token-file: {path} holds no token"),
        (config_of(home), service, "the credential hf-token"),
        *([(config_of(home), {"HF_TOKEN": text}, "the variable HF_TOKEN holds no token")] if text else []),
    ):
        with pytest.raises(ConfigError, match=says) as caught:
            hub_token(config, env)
        assert SECRET not in str(caught.value)
        assert redact(str(caught.value)) == str(caught.value), "and the log takes nothing of it for a secret"


def test_a_credential_that_cannot_be_read_is_said_in_full(home: Path) -> None:
    service = {"CREDENTIALS_DIRECTORY": str(put(home / "creds" / "hf-token", "").parent)}
    (home / "creds" / "hf-token").write_bytes(b"\xff")
    with pytest.raises(ConfigError, match="is not text") as caught:
        hub_token(config_of(home), service)
    assert redact(str(caught.value)) == str(caught.value)


def test_a_file_that_was_named_must_be_there(home: Path) -> None:
    with pytest.raises(ConfigError, match=r"hf-token-file: .*cannot be read: No such file.*set HF_TOKEN"):
        hub_token(config_of(home, "hf-token-file = '/no/such'"), {})
    with pytest.raises(ConfigError, match="registry-auth-file: there is no file /no/such"):
        registry_auth_file(config_of(home, "registry-auth-file = '/no/such'"), {})


def test_one_that_is_only_looked_for_may_be_broken(home: Path, caplog: pytest.LogCaptureFixture) -> None:
    env = {"HF_TOKEN_PATH": str(put(home / "t", f"{SECRET} {SECRET}"))}
    with caplog.at_level(logging.WARNING):
        assert hub_token(config_of(home), env) == ""
    assert "asked without a token" in caplog.text
    assert SECRET not in caplog.text


def test_where_nobody_may_look_there_is_nothing(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: Path) -> bool:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "is_file", refuse)
    env = {"HOME": str(home / "closed"), "CREDENTIALS_DIRECTORY": str(home / "closed")}
    config = load({}, env=env)
    assert (hub_token(config, env), registry_auth_file(config, env)) == ("", None)


def test_where_the_hub_is(home: Path) -> None:
    plain, configured = config_of(home), config_of(home, "hf-endpoint = 'HTTPS://Hub.LAN:443/api/'")
    assert hub_endpoint(plain, {}) == "https://huggingface.co"
    assert hub_endpoint(plain, {"HF_ENDPOINT": "http://hub.lan:8080/"}) == "http://hub.lan:8080"
    assert hub_endpoint(configured, {"HF_ENDPOINT": "http://hub.lan"}) == "https://hub.lan/api"
    for wrong in ("hub.lan", "ftp://hub.lan", f"https://me:{SECRET}@hub.lan", f"https://hub.lan/?t={SECRET}"):
        with pytest.raises(
            ConfigError, match=r"the variable HF_ENDPOINT: .* is not the URL of an API"
        ) as caught:
            hub_endpoint(plain, {"HF_ENDPOINT": wrong})
        assert SECRET not in str(caught.value)


# ---- registries


def test_where_the_credentials_of_registries_are(home: Path) -> None:
    env = {"HOME": str(home)}
    plain = config_of(home)
    assert registry_auth_file(plain, env) is None
    default = put(home / ".docker" / "config.json", "{}")
    assert registry_auth_file(plain, env) == str(default)
    env |= {"DOCKER_CONFIG": str(home / "docker")}
    assert registry_auth_file(plain, env) is None
    docker = put(home / "docker" / "config.json", "{}")
    assert registry_auth_file(plain, env) == str(docker)
    service = put(home / "creds" / "registry-auth", "{}")
    env |= {"CREDENTIALS_DIRECTORY": str(service.parent)}
    assert registry_auth_file(plain, env) == str(service)
    mine = put(home / "auth.json", "{}")
    assert registry_auth_file(config_of(home, f"registry-auth-file = '{mine}'"), env) == str(mine)


# ---- in the settings


ENDPOINTS = """
[[endpoint]]
host = "Index.Docker.io"
url = "https://mirror.lan/v2-proxy/"
[[endpoint]]
host = "registry.ollama.ai"
url = "http://127.0.0.1:5000"
[[header]]
name = "X-Api-Key"
value = "SeCrEt"
"""


@pytest.fixture
def fetch(home: Path) -> FetchSettings:
    env = {"HOME": str(home), "HF_TOKEN": SECRET}
    config = config_of(home, f"proxy = 'http://me:{SECRET}@proxy.lan:1'\n{ENDPOINTS}")
    return fetch_settings(config, chunks=None, env=env)


def test_all_of_it_reaches_the_sources(fetch: FetchSettings) -> None:
    assert (fetch.hf_endpoint, fetch.hf_token) == ("https://huggingface.co", SECRET)
    assert fetch.endpoints == (
        ("docker.io", "https://mirror.lan/v2-proxy"),
        ("registry.ollama.ai", "http://127.0.0.1:5000"),
    )
    assert wire.fetch_settings_from_wire(wire.fetch_settings_to_wire(fetch)) == fetch


def test_no_repr_tells_a_secret(fetch: FetchSettings, home: Path) -> None:
    config = config_of(home, f"proxy = 'http://me:{SECRET}@proxy.lan:1'\n{ENDPOINTS}")
    hello = wire.Hello(wire.fetch_settings_to_wire(fetch), 1)
    for thing in (fetch, config, hello, engine_settings(config, fetch, mounted=True)):
        assert "SeCrEt" not in repr(thing)


def test_headers_go_to_the_registries_that_were_named(home: Path, fetch: FetchSettings) -> None:
    settings = engine_settings(config_of(home), fetch, mounted=True)
    refs = ["hf://o/m@main", "ollama://aya:8b", "oci://h.example/m:t", "swift://h/m", "https://h/m"]
    assert with_header_origins(settings, refs).fetch.header_origins == (
        "http://127.0.0.1:5000",
        "https://h.example",
        "https://h/m",
    )
