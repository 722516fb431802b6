"""Types of single values: each turns what a person wrote into a plain value, or says how it is written.

Every validator raises ValueError with one clause; `config.load` puts the place and the key before it.
"""

from __future__ import annotations

import base64
import binascii
import ipaddress
import re
from pathlib import Path
from typing import Annotated, Final

from pydantic import AfterValidator, BeforeValidator

from weightfs.core.bandwidth import Timetable
from weightfs.core.geometry import GIB, KIB
from weightfs.core.hosts import MAX_PORT
from weightfs.core.oci import DOCKER_HUB, DOCKER_HUB_ALIASES
from weightfs.core.ref import canonical_url, without_secrets
from weightfs.errors import RefError
from weightfs.units import format_duration, format_size, parse_duration, parse_size

MAX_SECRET_BYTES: Final = 64 * KIB
# RFC 9110 section 5.6.2: token, beside letters and digits
_TOKEN_SIGNS: Final = frozenset("!#$%&'*+-.^_`|~")
# As the refs' own rules have it: core.ollama, core.oci.
_REGISTRY_HOST: Final = re.compile(r"(?:[a-z0-9_][a-z0-9_.-]{0,252}|\[[0-9a-f:]{2,45}\])(?::[0-9]{1,5})?")
_OWN_HEADERS: Final = frozenset(
    ("host", "range", "if-range", "accept-encoding", "content-length", "connection", "transfer-encoding")
)


def seconds(low: float, high: float, *, zero: bool = False) -> BeforeValidator:
    """A duration within bounds, as float seconds; with `zero`, 0 is allowed too and means "no bound"."""

    def check(value: object) -> float:
        match value:
            case str():
                number = parse_duration(value)
            case int() | float() if not isinstance(value, bool):
                number = float(value)
            case _:
                raise ValueError("must be a duration such as 30, '30s' or '10m'")
        if (zero and number == 0) or low <= number <= high:
            return number
        or_zero = ", or 0 for no bound" if zero else ""
        raise ValueError(f"must be from {format_duration(low)} to {format_duration(high)}{or_zero}")

    return BeforeValidator(check)


def size(low: int, high: int) -> BeforeValidator:
    """A number of bytes within bounds."""

    def check(value: object) -> int:
        match value:
            case str():
                number = parse_size(value)
            case int() if not isinstance(value, bool):
                number = value
            case _:
                raise ValueError("must be a size such as 1048576 or '64MiB'")
        if low <= number <= high:
            return number
        raise ValueError(f"must be from {format_size(low)} to {format_size(high)}")

    return BeforeValidator(check)


MIN_BANDWIDTH: Final = 128 * KIB  # less, and an origin takes one of our many requests for dead
MAX_BANDWIDTH: Final = 1024 * GIB
_MAX_STEPS: Final = 48
_STEP: Final = re.compile(r"([01]?[0-9]|2[0-3]):([0-5][0-9]),(\S+)")


def parse_bandwidth(text: str) -> Timetable:
    """`10MiB`, or `08:00,2MiB 18:00,off`: bytes per second from a time of the day on. ValueError in one clause."""
    parts = text.split() or [""]
    if len(parts) == 1 and "," not in parts[0]:
        return Timetable(((0, _rate(parts[0])),))
    steps: dict[int, int | None] = {}
    for part in parts[: _MAX_STEPS + 1]:
        match = _STEP.fullmatch(part)
        minute = int(match[1]) * 60 + int(match[2]) if match else -1
        if match is None or minute in steps or len(parts) > _MAX_STEPS:
            raise ValueError(
                f"{text[:80]!r} is no limit; write bytes per second such as 10MiB, or up to {_MAX_STEPS} times of the "
                "day, each once, such as '08:00,2MiB 18:00,off'"
            )
        steps[minute] = _rate(match[3])
    return Timetable(tuple(sorted(steps.items())))


def _rate(text: str) -> int | None:
    if text == "off":
        return None
    number = parse_size(text.removesuffix("/s"))
    if MIN_BANDWIDTH <= number <= MAX_BANDWIDTH:
        return number
    low, high = format_size(MIN_BANDWIDTH), format_size(MAX_BANDWIDTH)
    raise ValueError(f"must be from {low} to {high} a second, or off")


def _bandwidth(value: object) -> str:
    match value:
        case str() | int() if not isinstance(value, bool):
            parse_bandwidth(str(value))
            return " ".join(str(value).split())
    raise ValueError(
        "must be bytes per second such as '10MiB', or a timetable such as '08:00,2MiB 18:00,off'"
    )


def count(low: int, high: int) -> BeforeValidator:
    """A whole number within bounds."""

    def check(value: object) -> int:
        number: object = value
        if (
            isinstance(value, str)
            and value.isascii()
            and value.removeprefix("-").isdigit()
            and len(value) <= 18
        ):
            number = int(value)
        if isinstance(number, int) and not isinstance(number, bool) and low <= number <= high:
            return number
        raise ValueError(f"must be a whole number from {low} to {high}")

    return BeforeValidator(check)


def _header_name(value: str) -> str:
    if not value or not all((char.isascii() and char.isalnum()) or char in _TOKEN_SIGNS for char in value):
        raise ValueError(f"{value!r} is not the name of an HTTP header")
    if value.lower() in _OWN_HEADERS:
        raise ValueError(f"the header {value} belongs to weightfs and cannot be set")
    return value


def check_header_value(value: str) -> str:
    """`value` without outer blanks, if it can stand in a header."""
    value = value.strip()
    if not value.isprintable() or not value.isascii():
        raise ValueError("the value of a header must be printable ASCII on one line")
    return value


def _trusted_key(value: str) -> str:
    text = value.strip()
    if not _is_key(text) and ("/" in text or text.endswith(".pub")):
        lines = [line.strip() for line in read_small(Path(text).expanduser(), "key").splitlines()]
        keys = [line for line in lines if line and not line.startswith("untrusted comment:")]
        text = keys[0] if len(keys) == 1 else ""
    if not _is_key(text):
        raise ValueError(f"{value!r} is not a minisign public key; give its base64 line or its .pub file")
    return text


def _is_key(text: str) -> bool:
    # minisign(1), "Public key format": "Ed", an 8-byte key id, 32 bytes of ed25519 key
    try:
        raw = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        return False
    return len(raw) == 42 and raw[:2] == b"Ed"


def _url(value: str) -> str:
    scheme, separator, rest = value.partition("://")
    if (
        scheme.lower() not in ("http", "https")
        or not separator
        or not rest.strip("/")
        or not value.isprintable()
    ):
        raise ValueError(f"{value.partition('?')[0]!r} is not an http:// or https:// URL")
    if "/" not in rest or "?" in rest:
        # Without the slash, a prefix would match other hosts whose names begin alike.
        raise ValueError(f"{value.partition('?')[0]!r} needs a slash after the host, and no query")
    return value


def base_url(value: str) -> str:
    """An http(s) URL below which an API is, canonical, without a slash at the end. ValueError."""
    try:
        if "?" in value or "#" in value:
            raise RefError("it has a query")
        return canonical_url(value).rstrip("/")
    except RefError:
        raise ValueError(
            f"{without_secrets(value)!r} is not the URL of an API, such as https://hub.lan or http://127.0.0.1:5000"
        ) from None


def _loopback_port(value: str) -> str:
    split_loopback_port(value)
    return value


def split_loopback_port(value: str) -> tuple[str, int]:
    """`127.0.0.1:9637` or `[::1]:9637` as an address and a port. ValueError."""
    host, _, port = value.rpartition(":")
    try:
        address = ipaddress.ip_address(host[1:-1] if host.startswith("[") and host.endswith("]") else host)
        number = int(port) if port.isascii() and port.isdigit() and len(port) <= 5 else 0
    except ValueError:
        number = 0
    if not 0 < number <= MAX_PORT or (address.version == 6) != host.startswith("["):
        raise ValueError(f"{value!r} is not an address and a port, such as 127.0.0.1:9637 or [::1]:9637")
    if not address.is_loopback:
        raise ValueError(
            f"{value!r} is not on this machine's loopback, and metrics have no password; "
            "use 127.0.0.1, and let a proxy or tunnel of your own carry them further"
        )
    return str(address), number


def _registry_host(value: str) -> str:
    host = value.lower()
    if not _REGISTRY_HOST.fullmatch(host):
        raise ValueError(f"{value!r} is not a registry's host as refs name it, such as registry.lan:5000")
    return DOCKER_HUB if host in DOCKER_HUB_ALIASES else host


def _proxy(value: str) -> str:
    scheme, separator, rest = value.partition("://")
    if (
        scheme.lower() not in ("http", "https")
        or not separator
        or not rest
        or not rest.isprintable()
        or " " in rest
        # In a password they would end the host: no client understands it, and half of it would count as the host.
        or re.search(r"[/?#]", rest.removesuffix("/"))
    ):
        raise ValueError(
            "a proxy is written http://host:port or https://host:port, and / ? # in a password as %2F %3F %23"
        )
    return value


def _host(value: str) -> str:
    if not value or "/" in value or any(char.isspace() for char in value):
        raise ValueError(f"{value!r} is not a host name or address")
    return value.lower()


def _path(value: object) -> object:
    if not isinstance(value, str):
        return value
    if not value or "\0" in value:
        raise ValueError(f"{value!r} is not a path")
    try:
        return Path(value).expanduser()
    except RuntimeError:
        raise ValueError(f"{value!r} names a home directory that does not exist") from None


def read_small(path: Path, what: str) -> str:
    """The text of a small file that holds a secret or a key. ValueError in one clause."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_SECRET_BYTES + 1)
        if len(data) > MAX_SECRET_BYTES:
            raise ValueError(f"the {what} file {path} has over {MAX_SECRET_BYTES} bytes")
        return data.decode()
    except UnicodeDecodeError:
        raise ValueError(f"the {what} file {path} is not text") from None
    except OSError as error:
        raise ValueError(f"the {what} file {path} cannot be read: {error.strerror}") from None


LoopbackPort = Annotated[str, AfterValidator(_loopback_port)]
HeaderName = Annotated[str, AfterValidator(_header_name)]
HeaderValue = Annotated[str, AfterValidator(check_header_value)]
TrustedKey = Annotated[str, AfterValidator(_trusted_key)]
HttpUrl = Annotated[str, AfterValidator(_url)]
BaseUrl = Annotated[str, AfterValidator(base_url)]
RegistryHost = Annotated[str, AfterValidator(_registry_host)]
ProxyUrl = Annotated[str, AfterValidator(_proxy)]
Host = Annotated[str, AfterValidator(_host)]
Bandwidth = Annotated[str, BeforeValidator(_bandwidth)]
HostPath = Annotated[Path, BeforeValidator(_path)]
