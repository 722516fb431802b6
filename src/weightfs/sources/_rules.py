"""What a response must look like before one byte of it counts. Pure: headers and times come in as arguments.

Rule: whatever is not exactly what was asked for is a `SourceError`, and its text never holds a query,
userinfo or fragment of a URL, because those may be secrets.
"""

from __future__ import annotations

import base64
import binascii
import ipaddress
import json
import re
from dataclasses import dataclass
from datetime import UTC, datetime
from urllib.parse import parse_qsl, urlsplit

import httpx

from weightfs.core.geometry import MAX_BLOB_SIZE, ByteSpan
from weightfs.core.hosts import MAX_PORT
from weightfs.core.retry import parse_retry_after
from weightfs.errors import FailureKind, SourceError

REDIRECTS = frozenset({301, 302, 303, 307, 308})
# A signed URL answers with these when its time is over (S3: 403; others: 401, 404 or 410).
EXPIRED = frozenset({401, 403, 404, 410})
# The way on where a token or password was refused: docs/configuration.md, "Tokens".
NEW_SECRET = "a running mount takes another one from a file by `weightfs reload`, else by a restart"  # noqa: S105
MAX_LABEL = 300
MAX_URL = 16 * 1024  # signed URLs of several KiB exist

_BUSY = frozenset(
    {408, 425, 429, 500, 502, 503, 504, *range(520, 531)}
)  # 52x: a CDN that cannot reach its origin
_CONTENT_RANGE = re.compile(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18})")
_UNSATISFIED = re.compile(r"bytes \*/(\d{1,18})")
_HOST = re.compile(r"[A-Za-z0-9._-]{1,253}")
_DIGITS = re.compile(r"\d{1,18}")
_SAFE_MARGIN = 15.0  # seconds before its end from which a signed URL is no longer used


def label(url: str | httpx.URL) -> str:
    """A URL without query, userinfo and fragment, for error texts and logs."""
    try:
        parts = urlsplit(str(url))
        host = parts.hostname or ""
        port = f":{parts.port}" if parts.port else ""
    except ValueError:
        return "an invalid URL"
    host = f"[{host}]" if ":" in host else host
    return f"{parts.scheme}://{host}{port}{parts.path}"[:MAX_LABEL]


def failure(kind: FailureKind, url: str | httpx.URL, what: str, **fields: float | None) -> SourceError:
    """A SourceError about one mirror: "<mirror> <what>"."""
    mirror = label(url)
    status, retry_after = fields.get("status"), fields.get("retry_after")
    return SourceError(
        f"{mirror} {what}.",
        kind=kind,
        mirror=mirror,
        status=None if status is None else int(status),
        retry_after=retry_after,
    )


def single(headers: httpx.Headers, name: str, url: str | httpx.URL) -> str | None:
    """The value of a header that may occur once. SourceError if it occurs with two different values."""
    values = {value.strip() for value in headers.get_list(name)}
    if len(values) > 1:
        raise failure(FailureKind.PROTOCOL, url, f"sent {len(values)} different {name} headers")
    return values.pop() if values else None


def content_length(headers: httpx.Headers, url: str | httpx.URL) -> int | None:
    """Content-Length, or None where there is none. SourceError if it is no number or absurd."""
    text = single(headers, "content-length", url)
    if text is None:
        return None
    if not _DIGITS.fullmatch(text) or int(text) > MAX_BLOB_SIZE:
        raise failure(FailureKind.PROTOCOL, url, "sent a Content-Length that is not a sane number")
    return int(text)


def strong_etag(value: str | None) -> str:
    """The ETag if it is a strong one (RFC 9110 section 8.8.3), else ''."""
    if value and len(value) <= 1024 and re.fullmatch(r'"[\x21\x23-\x7e\x80-\xff]*"', value):
        return value
    return ""


def validator_of(headers: httpx.Headers) -> str:
    """What pins this version: a strong ETag, else Last-Modified, else ''."""
    return strong_etag(headers.get("etag")) or headers.get("last-modified", "")[:100]


def check_validator(headers: httpx.Headers, validator: str, url: str | httpx.URL) -> None:
    """SourceError (CHANGED) if the response is of another version than `validator` says."""
    if not validator:
        return
    seen = headers.get("etag") if validator.startswith('"') else headers.get("last-modified")
    if seen is None:
        return
    if validator.startswith('"') and seen.startswith("W/"):
        seen = seen[
            2:
        ]  # weakened on the way, by a proxy that compresses other responses: compare the tag itself
    if seen != validator:
        raise failure(
            FailureKind.CHANGED, url, "now has another version of the file than the one that was resolved"
        )


def check_coding(headers: httpx.Headers, url: str | httpx.URL) -> None:
    """SourceError if the body is not the file's own bytes."""
    codings = [part.strip().lower() for part in ",".join(headers.get_list("content-encoding")).split(",")]
    if any(coding not in ("", "identity") for coding in codings):
        raise failure(FailureKind.PROTOCOL, url, "sent an encoded body although identity was asked for")
    if headers.get("content-type", "").strip().lower().startswith("multipart/"):
        raise failure(FailureKind.PROTOCOL, url, "sent a multipart body for a single range")


def check_partial(
    status: int, headers: httpx.Headers, span: ByteSpan, size: int, validator: str, url: str | httpx.URL
) -> None:
    """Accept only the answer to `Range: bytes=<span>` of a file of `size` bytes (RFC 9110, 14.4, 15.3.7)."""
    asked = f"bytes {span.start}-{span.stop - 1}"
    if status == 200:
        _refuse_whole(headers, size, validator, url)
    if status == 416:
        found = _UNSATISFIED.fullmatch(single(headers, "content-range", url) or "")
        changed = found is not None and int(found[1]) != size
        kind = FailureKind.CHANGED if changed else FailureKind.PROTOCOL
        raise failure(kind, url, f"says that it has no {asked}", status=status)
    if status != 206:
        raise failure(
            FailureKind.PROTOCOL, url, f"answered a request for {asked} with status {status}", status=status
        )
    check_coding(headers, url)
    text = single(headers, "content-range", url)
    found = _CONTENT_RANGE.fullmatch(text or "")
    if found is None:
        raise failure(FailureKind.PROTOCOL, url, f"sent no valid Content-Range for {asked}")
    start, last, total = (int(number) for number in found.groups())
    if total != size:
        raise failure(FailureKind.CHANGED, url, f"has {total} bytes now, not {size}")
    if (start, last + 1) != (span.start, span.stop):
        raise failure(FailureKind.PROTOCOL, url, f"sent bytes {start}-{last} when asked for {asked}")
    # Without Content-Length the body is chunked, or ends with the connection; its bytes are counted in
    # either case.
    length = content_length(headers, url)
    if length is not None and length != len(span):
        raise failure(FailureKind.PROTOCOL, url, f"announced {length} bytes for {asked}")
    check_validator(headers, validator, url)


def check_whole(status: int, headers: httpx.Headers, size: int, validator: str, url: str | httpx.URL) -> None:
    """Accept only a 200 with the whole file of `size` bytes."""
    if status != 200:
        raise failure(
            FailureKind.PROTOCOL, url, f"answered a request for all bytes with status {status}", status=status
        )
    check_coding(headers, url)
    length = content_length(headers, url)
    if length is not None and length != size:
        if _is_page(headers):
            raise failure(FailureKind.PROTOCOL, url, "sent an HTML page instead of the file")
        raise failure(FailureKind.CHANGED, url, f"has {length} bytes now, not {size}")
    check_validator(headers, validator, url)


def _refuse_whole(headers: httpx.Headers, size: int, validator: str, url: str | httpx.URL) -> None:
    """A 200 to a range request: say why it cannot be used."""
    check_coding(headers, url)
    check_whole(200, headers, size, validator, url)
    if content_length(headers, url) is None and _is_page(headers):
        raise failure(FailureKind.PROTOCOL, url, "sent an HTML page instead of the file")
    raise failure(FailureKind.NO_RANGES, url, "ignores Range and can only send the whole file", status=200)


def _is_page(headers: httpx.Headers) -> bool:
    return headers.get("content-type", "").partition(";")[0].strip().lower() in (
        "text/html",
        "application/xhtml+xml",
    )


def status_failure(
    status: int, headers: httpx.Headers, url: str | httpx.URL, now: datetime
) -> SourceError | None:
    """What an error status means; None for statuses below 400 and for 416, which need a closer look."""
    if status < 400 or status == 416:
        return None
    kind, what = FailureKind.PROTOCOL, f"answered with status {status}"
    if status in (401, 403, 407):
        kind, what = FailureKind.AUTH, f"refuses access (status {status}); check the credentials"
    elif status in (404, 410):
        kind, what = FailureKind.NOT_FOUND, f"has no such file (status {status})"
    elif status == 412:
        kind, what = FailureKind.CHANGED, "now has another version of the file (status 412)"
    elif status in _BUSY:
        kind, what = FailureKind.BUSY, f"is busy or broken (status {status})"
    return failure(kind, url, what, status=status, retry_after=retry_after(headers, now))


def retry_after(headers: httpx.Headers, now: datetime) -> float | None:
    """Seconds from Retry-After, or from an exhausted `RateLimit: "x";r=0;t=55` (httpapi-ratelimit draft)."""
    text = headers.get("retry-after")
    seconds = parse_retry_after(text.strip(), now) if text else None
    if seconds is not None:
        return seconds
    waits = [
        int(found[1])
        for item in headers.get("ratelimit", "")[:1000].split(",")
        if re.search(r";\s*r=0\b", item) and (found := re.search(r";\s*t=(\d{1,9})\b", item))
    ]
    return float(max(waits)) if waits else None


@dataclass(frozen=True, slots=True)
class Hop:
    """One redirect: where it leads, and whether that is another origin (scheme, host, port)."""

    url: httpx.URL
    leaves: bool


def next_hop(current: httpx.URL, headers: httpx.Headers) -> Hop:
    """Where a redirect leads. SourceError if it may not: not http(s), https to http, userinfo, too long."""
    location = headers.get("location", "")
    if not location or len(location) > MAX_URL:
        raise failure(FailureKind.REDIRECT, current, "redirects without a usable Location")
    try:
        target = current.join(location).copy_with(fragment=None)
    except (httpx.InvalidURL, ValueError) as error:
        raise failure(FailureKind.REDIRECT, current, "redirects to an invalid URL") from error
    if not can_be_asked(target):
        raise failure(FailureKind.REDIRECT, current, "redirects to an invalid URL")
    if target.scheme not in ("http", "https"):
        raise failure(FailureKind.REDIRECT, current, f"redirects to the scheme {target.scheme[:20]!r}")
    if current.scheme == "https" and target.scheme == "http":
        raise failure(FailureKind.REDIRECT, current, f"redirects from https to http ({label(target)})")
    if target.userinfo:
        raise failure(FailureKind.REDIRECT, current, "redirects to a URL with credentials in it")
    return Hop(target, leaves=origin_of(target) != origin_of(current))


def host_of(url: str | httpx.URL) -> str:
    """The host as it is sent, in lower case. Not `httpx.URL.host`: that decodes xn--, and fails where it cannot."""
    return httpx.URL(url).raw_host.decode("ascii").lower()


def can_be_asked(url: httpx.URL) -> bool:
    """Whether host and port can be those of a server: httpx takes any, and fails later, when they are looked at."""
    return is_host(host_of(url)) and (url.port is None or 0 < url.port <= MAX_PORT)


def is_host(host: str) -> bool:
    """Whether this can be a DNS name or an address; httpx takes anything and escapes it."""
    if ":" in host:
        try:
            ipaddress.IPv6Address(host)
        except ValueError:
            return False
        return True
    return _HOST.fullmatch(host) is not None


def origin_of(url: str | httpx.URL) -> str:
    """`scheme://host:port`, the port always given: two URLs with the same one share credentials."""
    parsed = httpx.URL(url)
    port = parsed.port or {"http": 80, "https": 443}.get(parsed.scheme, 0)
    return f"{parsed.scheme}://{host_of(parsed)}:{port}"


def expires_at(url: str | httpx.URL) -> float | None:
    """When a signed URL ends, in seconds since 1970 and less a margin; None if it does not say.

    Knows `Expires` (CloudFront, GCS v2), `X-Amz-Date` + `X-Amz-Expires` (S3 v4) and Google's same, `se`
    (Azure), and the `exp` of a JWT (RFC 7519) in any parameter.
    """
    try:
        query = {
            name.lower(): value for name, value in parse_qsl(urlsplit(str(url)).query, max_num_fields=100)
        }
    except ValueError:
        return None
    ends = [end for end in (_plain_end(query), _dated_end(query), _azure_end(query), _jwt_end(query)) if end]
    return min(ends) - _SAFE_MARGIN if ends else None


def _plain_end(query: dict[str, str]) -> float | None:
    text = query.get("expires", "")
    return float(text) if re.fullmatch(r"\d{9,11}", text) else None


def _dated_end(query: dict[str, str]) -> float | None:
    for vendor in ("amz", "goog"):
        lasting = query.get(f"x-{vendor}-expires", "")
        if re.fullmatch(r"\d{1,7}", lasting):
            try:
                start = datetime.strptime(query.get(f"x-{vendor}-date", ""), "%Y%m%dT%H%M%SZ").replace(
                    tzinfo=UTC
                )
            except ValueError:
                continue
            return start.timestamp() + int(lasting)
    return None


def _azure_end(query: dict[str, str]) -> float | None:
    if "sig" not in query:
        return None
    try:
        end = datetime.fromisoformat(query.get("se", ""))
    except ValueError:
        return None
    return (end if end.tzinfo else end.replace(tzinfo=UTC)).timestamp()


def _jwt_end(query: dict[str, str]) -> float | None:
    for value in query.values():
        parts = value.split(".")
        if len(parts) != 3 or not value.startswith("eyJ"):
            continue
        try:
            claims = json.loads(base64.urlsafe_b64decode(parts[1] + "=" * (-len(parts[1]) % 4)))
        except (ValueError, binascii.Error, RecursionError):
            continue
        end = claims.get("exp") if isinstance(claims, dict) else None
        if isinstance(end, int | float) and 0 < end < 1e11:
            return float(end)
    return None
