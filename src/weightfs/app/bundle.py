"""`weightfs debug bundle`: what a bug report needs, in one small archive.

Rules. Whatever cannot be had is named in `about.json`, with the reason, and the rest is there all the same. No secret
is in it: everything passes `logs.redact`, refs too lose their query, and the values of the configured headers, tokens
and proxies are taken out wherever they stand. Each part is cut at `PART_BYTES`; nothing waits without a bound. The file
is new, and its owner's alone.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import json
import os
import platform
import subprocess
import sys
import tarfile
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final
from urllib.parse import unquote

import trio

import weightfs
from weightfs.app.credentials import hub_token
from weightfs.app.doctor.examine import Order, examine
from weightfs.app.effective import effective
from weightfs.config import Config
from weightfs.config.load import layers
from weightfs.control.client import find_daemon
from weightfs.control.ports import Document
from weightfs.errors import ConfigError, DaemonError, UsageError, WeightfsError
from weightfs.logs import redact

PART_BYTES: Final = 4 * 1024 * 1024  # a status of some 10,000 files; a dozen parts at most
LOG_BYTES: Final = 1024 * 1024  # the end of a log: some 8,000 lines
JOURNAL_LINES: Final = 4000
JOURNAL_SECONDS: Final = 10.0
DOCTOR_SECONDS: Final = 60.0  # twice its own bound
MIN_SECRET: Final = 4  # characters: a shorter one would be found everywhere, and tells nobody anything
PACKAGES: Final = ("pyfuse3", "trio", "httpx", "lmdb", "hypercorn", "starlette", "pydantic", "cryptography")


@dataclass(slots=True)
class Bundle:
    """`parts` by file name; `missing` says what is not there, and why."""

    parts: dict[str, bytes] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)


async def collect(
    config: Config, options: Mapping[str, Any], file: Path | None, env: Mapping[str, str]
) -> Bundle:
    """Everything. Takes as long as the doctor: half a minute at most, seconds where all is well.

    Args:
        config: What is configured.
        options: As for `effective`, and `file` with them.
        file: The configuration file that was named.
        env: The environment.
    """
    bundle = Bundle()
    secrets = secrets_of(options, file, env)
    steps: dict[str, Callable[[], Awaitable[Any]]] = {
        "config.json": partial(_settings, options, file, env),
        "doctor.json": partial(_doctor, config, env),
        "log.txt": partial(_log, config),
        **{
            f"{name}.json": partial(_ask, config.cache, name)
            for name in ("health", "status", "inflight", "stacks")
        },
    }

    async def run(name: str, step: Callable[[], Awaitable[Any]]) -> None:
        try:
            found = await step()
        except WeightfsError as error:
            bundle.missing[name] = str(scrubbed(str(error), secrets))
        except Exception as error:  # noqa: BLE001 - the other parts are all the more wanted
            bundle.missing[name] = f"a fault of weightfs itself: {type(error).__name__}"
        else:
            bundle.parts[name] = await trio.to_thread.run_sync(_bytes, found, secrets)

    async with trio.open_nursery() as nursery:
        for name, step in steps.items():
            nursery.start_soon(run, name, step)
    about = {**await trio.to_thread.run_sync(_about), "missing": bundle.missing}
    bundle.parts["about.json"] = _bytes(about, secrets)
    return bundle


def write(bundle: Bundle, path: Path, now: float) -> int:
    """Make the archive; its size in bytes. UsageError if there is such a file, or it cannot be written."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz", compresslevel=6) as archive:
        for name, data in sorted(bundle.parts.items()):
            entry = tarfile.TarInfo(f"weightfs-debug/{name}")
            entry.size, entry.mode, entry.mtime = len(data), 0o600, int(now)
            archive.addfile(entry, io.BytesIO(data))
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        with os.fdopen(fd, "wb") as out:
            out.write(packed.getvalue())
    except FileExistsError:
        raise UsageError(f"{path} is there already; name another file with -o") from None
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror}; name another file with -o") from None
    return packed.tell()


# --- secrets


def secrets_of(options: Mapping[str, Any], file: Path | None, env: Mapping[str, str]) -> tuple[str, ...]:
    """Every secret value that any layer of the configuration leads to, the longest first.

    Also of what another layer replaces: a daemon may have been started without that one.
    """
    found: set[str] = {env.get("HF_TOKEN", "")}
    urls = [value for name, value in env.items() if name.lower().endswith("_proxy")]
    for _, layer in layers(options, file=file, env=env):
        urls.append(layer.proxy or "")
        for rule in layer.header:
            # One that cannot be had now is in no text of this moment either.
            with contextlib.suppress(ConfigError):
                found.update(rule.resolve(env)[1].split())  # `Bearer <token>`
        with contextlib.suppress(ConfigError):
            found.add(hub_token(layer, env) or "")
    for url in urls:
        found.update(_userinfo(url))
    return tuple(sorted((one for one in found if len(one) >= MIN_SECRET), key=len, reverse=True))


def _userinfo(url: str) -> set[str]:
    """The password of a proxy, which may lack its scheme and may have been written wrongly, with a slash in it."""
    password = url.rpartition("://")[2].rpartition("@")[0].partition(":")[2]
    return {password, unquote(password)}


def scrubbed(value: Any, secrets: tuple[str, ...]) -> Any:
    """The same value of JSON's kinds, without secrets in any text of it, keys included."""
    match value:
        case str():
            text = value
            for secret in secrets:
                text = text.replace(secret, "***")
            return redact(text)
        case list() | tuple():
            return [scrubbed(one, secrets) for one in value]
        case dict():
            return {scrubbed(str(key), secrets): scrubbed(one, secrets) for key, one in value.items()}
    return value


def _bytes(found: Any, secrets: tuple[str, ...]) -> bytes:
    """As a part of the archive: text as it is, line by line; everything else as JSON."""
    if isinstance(found, str):
        text = "\n".join(scrubbed(line, secrets) for line in found.splitlines()) + "\n"
    else:
        text = json.dumps(scrubbed(found, secrets), indent=1) + "\n"
    data = text.encode(errors="replace")
    note = b"\n... cut here\n"
    return data if len(data) <= PART_BYTES else data[: PART_BYTES - len(note)] + note


# --- parts


async def _ask(cache: Path, name: str) -> Document:
    async with find_daemon(cache) as daemon:
        if daemon is None:
            raise DaemonError("no daemon has the cache")
        question: Callable[[], Awaitable[Document]] = getattr(daemon, name)
        return await question()


async def _settings(options: Mapping[str, Any], file: Path | None, env: Mapping[str, str]) -> list[Document]:
    rows = await trio.to_thread.run_sync(partial(effective, options, file=file, env=env))
    return [{"key": one.key, "value": one.value, "from": one.place} for one in rows]


async def _doctor(config: Config, env: Mapping[str, str]) -> list[Document]:
    with trio.move_on_after(DOCTOR_SECONDS):
        verdicts = await examine(Order(config, (), env))
        return [{"check": one.check, "level": str(one.level), "text": one.text} for one in verdicts]
    raise DaemonError(f"the doctor did not end within {DOCTOR_SECONDS:g} s")


async def _log(config: Config) -> str:
    file = config.log_file or config.cache / "weightfs.log"
    pid = None
    with trio.move_on_after(JOURNAL_SECONDS):
        try:
            pid = int((await _ask(config.cache, "health"))["pid"])
        except DaemonError:
            pid = None
    with trio.move_on_after(2 * JOURNAL_SECONDS):
        return await trio.to_thread.run_sync(_end_of_log, file, pid, abandon_on_cancel=True)
    raise DaemonError("the log did not come in time")


def _end_of_log(file: Path, pid: int | None) -> str:
    """Of the log file, else of the journal. DaemonError if there is neither."""
    try:
        with file.open("rb") as log:
            log.seek(max(0, log.seek(0, os.SEEK_END) - LOG_BYTES))
            return log.read(LOG_BYTES).decode(errors="replace")
    except OSError as error:
        reason = f"{file}: {error.strerror}"
    if pid is None:
        raise DaemonError(f"{reason}; and no daemon runs whose journal could be read")
    command = ["journalctl", f"_PID={pid}", "-n", str(JOURNAL_LINES), "-o", "short-iso", "--no-pager", "-q"]
    try:
        done = subprocess.run(  # noqa: S603 - fixed words and a number
            command, stdin=subprocess.DEVNULL, capture_output=True, timeout=JOURNAL_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise DaemonError(f"{reason}; and the journal cannot be read ({type(error).__name__})") from None
    if not done.stdout:
        raise DaemonError(f"{reason}; and the journal has nothing of process {pid}")
    return done.stdout[-LOG_BYTES:].decode(errors="replace")


def _about() -> Document:
    system = os.uname()
    return {
        "weightfs": weightfs.__version__,
        "made_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "python": sys.version,
        "kernel": f"{system.sysname} {system.release} {system.version} {system.machine}",
        "system": _release(),
        "libfuse": _libfuse(),
        "packages": {name: _version(name) for name in PACKAGES},
        "uid": os.geteuid(),
    }


def _release() -> str:
    try:
        return platform.freedesktop_os_release().get("PRETTY_NAME", "unknown")
    except OSError:
        return "unknown"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"


def _libfuse() -> str:
    """Its own word (fuse_pkgversion of <fuse_common.h>)."""
    try:
        said = ctypes.CDLL("libfuse3.so.3").fuse_pkgversion
    except (OSError, AttributeError):
        return "unknown"
    said.restype = ctypes.c_char_p
    return (said() or b"unknown").decode(errors="replace")
