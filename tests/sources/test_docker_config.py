"""What `docker login` left: config.json in all its forms, and helpers as real programs."""

from __future__ import annotations

import base64
import json
import logging
from pathlib import Path
from typing import Any

import pytest

from weightfs.sources import _docker_config
from weightfs.sources._docker_config import DOCKER_HUB_KEY, Credentials, SecretKind, credentials_for

AUTH = base64.b64encode(b"ann:se:cret").decode()
ANN = Credentials("ann", "se:cret")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "config.json"


async def found(path: Path, config: Any, host: str = "reg.lan:5000") -> Credentials | None:
    path.write_text(config if isinstance(config, str) else json.dumps(config))
    return await credentials_for(str(path), host)


@pytest.mark.parametrize(
    "key",
    [
        "reg.lan:5000",
        "https://reg.lan:5000",
        "https://reg.lan:5000/v2/",
        "http://reg.lan:5000/v1/",
        "REG.lan:5000",
    ],
)
async def test_the_keys_of_a_registry(path: Path, key: str) -> None:
    assert await found(path, {"auths": {"other.lan": {"auth": "x"}, key: {"auth": AUTH}}}) == ANN
    assert await credentials_for(str(path), "reg.lan") is None
    assert await credentials_for(str(path), "reg.lan:5001") is None


@pytest.mark.parametrize("key", [DOCKER_HUB_KEY, "docker.io", "https://registry-1.docker.io/v2/"])
async def test_the_keys_of_docker_hub(path: Path, key: str) -> None:
    assert await found(path, {"auths": {key: {"auth": AUTH}}}, "registry-1.docker.io") == ANN
    assert await credentials_for(str(path), "docker.io.evil.lan") is None


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ({"username": "ann", "password": "se:cret"}, ANN),
        ({"auth": base64.b64encode(b"ann:se:cret\0\0").decode()}, ANN),
        ({"auth": AUTH, "identitytoken": "it"}, Credentials("ann", "it", SecretKind.IDENTITY)),
        ({"registrytoken": "rt"}, Credentials("", "rt", SecretKind.REGISTRY)),
        ({"auth": "not base64!"}, None),
        ({"auth": base64.b64encode(b"\xff\xfe").decode()}, None),
        ({"auth": base64.b64encode(b"nocolon").decode()}, None),
        ({"auth": 7, "username": []}, None),
        ({}, None),
        ([], None),
    ],
)
async def test_entries(path: Path, entry: Any, expected: Credentials | None) -> None:
    assert await found(path, {"auths": {"reg.lan:5000": entry}}) == expected


@pytest.mark.parametrize(
    "config",
    [
        "",
        "[]",
        "{",
        "[" * 100_000,
        '{"auths":7}',
        '{"credHelpers":[],"credsStore":7}',
        " " * (1 << 20) + "{}",
    ],
)
async def test_files_that_cannot_be_used_count_as_empty(path: Path, config: str) -> None:
    assert await found(path, config) is None


async def test_a_file_that_is_not_there_is_no_fault(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert await credentials_for(None, "reg.lan") is None
    assert await credentials_for(str(tmp_path / "none"), "reg.lan") is None
    assert not caplog.records
    assert await credentials_for(str(tmp_path), "reg.lan") is None
    assert "are not used" in caplog.text


HALF = json.loads('"\\ud800"')  # half of a surrogate pair: JSON can say it, and no encoding has it


@pytest.mark.parametrize(
    "entry",
    [
        {"username": HALF, "password": "p"},
        {"username": "ann", "password": f"p{HALF}"},
        {"registrytoken": HALF},
        {"identitytoken": HALF},
        {"auth": HALF},
    ],
)
async def test_text_that_no_encoding_has_is_no_credential(path: Path, entry: Any) -> None:
    """Regression: `basic` raised UnicodeEncodeError amid a request."""
    assert await found(path, {"auths": {"reg.lan:5000": entry}}) is None


async def test_a_helper_may_not_say_it_either(
    path: Path, helper: Path, caplog: pytest.LogCaptureFixture
) -> None:
    say(helper, {"Username": "ann", "Secret": HALF})
    assert await found(path, {"credsStore": "test"}) is None
    assert "something else than credentials" in caplog.text


def test_no_secret_is_shown() -> None:
    assert "se:cret" not in repr(ANN)
    assert ANN.basic == f"Basic {AUTH}"


# ---- helpers


@pytest.fixture
def helper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`docker-credential-test`: says what stands in `answer`, and notes what it was asked."""
    program = tmp_path / "docker-credential-test"
    program.write_text(
        f'#!/bin/sh\ncat > "{tmp_path}/asked"\necho "$*" > "{tmp_path}/arguments"\n. "{tmp_path}/answer"\n'
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    say(tmp_path, {"ServerURL": "x", "Username": "ann", "Secret": "se:cret"})
    return tmp_path


def say(directory: Path, answer: Any) -> None:
    (directory / "said").write_text(answer if isinstance(answer, str) else json.dumps(answer))
    (directory / "answer").write_text(f'cat "{directory}/said"')


async def test_helpers_are_asked_as_docker_asks_them(path: Path, helper: Path) -> None:
    assert await found(path, {"credsStore": "test"}) == ANN
    assert (helper / "asked").read_text() == "reg.lan:5000"
    assert (helper / "arguments").read_text() == "get\n"
    assert await found(path, {"credHelpers": {"docker.io": "test"}}, "registry-1.docker.io") == ANN
    assert (helper / "asked").read_text() == DOCKER_HUB_KEY
    say(helper, {"Username": "<token>", "Secret": "it"})
    assert await found(path, {"credsStore": "test"}) == Credentials("", "it", SecretKind.IDENTITY)


async def test_the_helper_of_a_registry_goes_before_the_store(path: Path, helper: Path) -> None:
    config = {"credsStore": "absent", "credHelpers": {"reg.lan:5000": "test"}}
    assert await found(path, config) == ANN


async def test_what_the_helper_does_not_have_may_be_in_the_file(
    path: Path, helper: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (helper / "answer").write_text("echo credentials not found in native keychain; exit 1")
    config = {"credsStore": "test", "auths": {"reg.lan:5000": {"auth": AUTH}}}
    assert await found(path, config) == ANN
    assert not [record for record in caplog.records if record.levelno >= logging.INFO]


@pytest.mark.parametrize(
    "answer", ["", "[]", "{}", "[" * 9000, '{"Username":"x"}', '{"Username":7,"Secret":"s"}', "x" * 70_000]
)
async def test_helpers_that_answer_nonsense(
    path: Path, helper: Path, answer: str, caplog: pytest.LogCaptureFixture
) -> None:
    say(helper, answer)
    assert await found(path, {"credsStore": "test"}) is None
    assert "something else than credentials" in caplog.text


@pytest.mark.parametrize("name", ["../evil", "-x", "a/b", "a b", "", "x" * 65, ";id", 7, {}])
async def test_helpers_with_names_that_are_no_words_are_not_run(path: Path, helper: Path, name: Any) -> None:
    assert await found(path, {"credsStore": name}) is None
    assert not (helper / "asked").exists()


async def test_a_helper_is_not_looked_for_in_a_folder(
    path: Path, helper: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(helper)
    (helper / "docker-credential-a").mkdir()
    (helper / "docker-credential-test").rename(helper / "docker-credential-a" / "b")
    assert await found(path, {"credsStore": "a/b"}) is None
    assert not (helper / "asked").exists()


async def test_helpers_that_are_not_there(path: Path, helper: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert await found(path, {"credsStore": "absent"}) is None
    assert "docker-credential-absent cannot be run" in caplog.text


async def test_helpers_that_never_answer(
    path: Path, helper: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(_docker_config, "HELPER_SECONDS", 0.2)
    (helper / "answer").write_text("exec sleep 600")
    assert await found(path, {"credsStore": "test"}) is None
    assert "did not answer" in caplog.text
