"""What a person types to name a model file, brought to one canonical form.

Rules: `parse_ref(str(ref)) == ref`; two spellings of one URL (case of scheme, host and escapes, default port)
give one ref; whatever would need a secret in the text, or would lead out of a directory, is refused here.
Escapes of reserved characters stay as typed, for origins tell `+` from `%2B`. No error text repeats a query
or a password.
"""

from __future__ import annotations

import difflib
import ipaddress
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from urllib.parse import quote, unquote

from weightfs.core import hub, oci, ollama
from weightfs.core.manifest import check_path
from weightfs.errors import RefError

MAX_REF_CHARS = 4096
_SHOWN_CHARS = 160
_DEFAULT_PORTS = {"http": 80, "https": 443}
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_AUTHORITY = re.compile(r"(?P<host>\[[0-9a-f:.]+\]|[a-z0-9._-]{1,253})(?::(?P<port>[0-9]{0,5}))?")
_HTTP_URL = re.compile(
    r"(?P<scheme>https?)://(?P<authority>[^/?]*)(?P<path>[^?]*)(?:\?(?P<query>.*))?",
    re.IGNORECASE | re.DOTALL | re.ASCII,
)
_FRAGMENT = re.compile(r"sha256=([0-9A-Fa-f]{64})")
_PATH_FRAGMENT = re.compile(r"(.*)#(sha256=[0-9A-Fa-f]{64})", re.DOTALL)
_ESCAPE = re.compile(r"%(.{0,2})", re.DOTALL)
_HEX_PAIR = re.compile(r"[0-9A-Fa-f]{2}")
_UNRESERVED = re.compile(r"[A-Za-z0-9._~-]")  # RFC 3986 section 2.3: escaped or not, they mean the same
_PATH_SAFE = "/!$&'()*+,;=:@~%"  # section 3.3: pchar and "/"; "%" since escapes are made canonical apart
_QUERY_SAFE = _PATH_SAFE + "?"


@dataclass(frozen=True, slots=True)
class Ref:
    """One ref: `text` canonical, `url` the same without the fragment, `sha256` 32 bytes if named."""

    scheme: str
    text: str
    url: str
    sha256: bytes | None = None

    def __str__(self) -> str:
        return self.text


def parse_ref(text: str, schemes: Collection[str] = ("https", "http", "file", "ollama", "hf", "oci")) -> Ref:
    """Read `https://host[:port]/path[?query][#sha256=<64 hex>]`, `file:///abs/path` or an absolute path.

    Also `ollama://`, `hf://` and `oci://` with the names of `core.ollama`, `core.hub` and `core.oci`. Of any other
    scheme in `schemes`, only what holds for every ref is checked: its own source reads the rest. Raises RefError.
    """
    if len(text) > MAX_REF_CHARS:
        raise RefError(f"The ref has {len(text)} characters; {MAX_REF_CHARS} are allowed.")
    if _CONTROL.search(text):
        raise RefError(f"The ref {_shown(text)} holds a control character; remove it.")
    if text.startswith("/"):
        text = _path_to_url(text)
    url, _, fragment = text.partition("#")
    scheme = _scheme_of(url, schemes)
    match scheme:
        case "http" | "https":
            url = canonical_url(url)
        case "file":
            url = _canonical_file(url)
        case "ollama" | "hf" | "oci":
            return _named(scheme, text)
        case _:
            url = _canonical_other(url, scheme)
    sha256 = _digest_of(fragment, text)
    canonical = url if sha256 is None else f"{url}#sha256={sha256.hex()}"
    if len(canonical) > MAX_REF_CHARS:
        raise RefError(f"The ref {_shown(text)} has over {MAX_REF_CHARS} characters once it is escaped.")
    ref = Ref(scheme, canonical, url, sha256)
    if scheme in ("http", "https", "file"):
        tree_of(ref)
    return ref


_PARSERS: dict[str, Callable[[str], ollama.OllamaName | hub.HubName | oci.OciName]] = {
    ollama.SCHEME: ollama.parse_ollama,
    hub.SCHEME: hub.parse_hub,
    oci.SCHEME: oci.parse_oci,
}


def _named(scheme: str, text: str) -> Ref:
    """A ref that is a name in a registry, not a URL."""
    name = text[len(scheme) + len("://") :]
    if re.search(r"[#?\s]", name) and (scheme != hub.SCHEME or "#" in name):
        raise RefError(
            f"The ref {_shown(text)} holds a character that no name in a registry has; what pins a digest there is "
            "the registry's manifest."
        )
    parsed = _PARSERS[scheme](name)
    try:
        check_path(parsed.tree)
    except ValueError as error:
        raise RefError(f"The ref {_shown(text)} cannot be a path below the mount: {error}.") from None
    canonical = f"{scheme}://{parsed}"  # at most 2,000 characters: every part of a name is bounded
    return Ref(scheme, canonical, canonical)


def tree_of(ref: Ref) -> tuple[str, str]:
    """(directory below `models/`, file name) of the ref, as `("https/host:8000/dir", "m.gguf")`.

    Percent-escapes are decoded. A query is not part of it. Raises RefError, which `parse_ref` has done
    already for http, https and file refs; for other schemes the source decides about its tree.
    """
    authority, _, path = ref.url.partition("://")[2].partition("?")[0].partition("/")
    try:
        names = [unquote(name, errors="strict") for name in path.split("/")]
    except UnicodeDecodeError:
        raise RefError(
            f"The path of {_shown(ref.url)} is not UTF-8; rename the file at the origin."
        ) from None
    if not names[-1]:
        raise RefError(f"The ref {_shown(ref.url)} names no file; add the file's name after the last slash.")
    if any("/" in name for name in names):
        raise RefError(
            f"The path of {_shown(ref.url)} holds an escaped slash (%2F); weightfs cannot name such a file."
        )
    tree = "/".join([ref.scheme, *([authority] if authority else []), *names[:-1]])
    try:
        check_path(f"{tree}/{names[-1]}")
    except ValueError as error:
        raise RefError(f"The ref {_shown(ref.url)} cannot be a path below the mount: {error}.") from None
    return tree, names[-1]


def canonical_url(url: str) -> str:
    """An http(s) URL in canonical form. RefError: other scheme, userinfo, bad host or port, a fragment."""
    if len(url) > MAX_REF_CHARS or _CONTROL.search(url):
        raise RefError(f"The URL {_shown(url)} is too long or holds a control character.")
    if "#" in url:
        raise RefError(f"The URL {_shown(url)} has a fragment, which no origin is ever sent; remove it.")
    # Not urlsplit: it drops some characters silently, and what it checks of a host differs by Python version.
    match = _HTTP_URL.fullmatch(url)
    if match is None:
        raise RefError(f"The URL {_shown(url)} is neither http nor https.")
    if "@" in match["authority"]:
        raise RefError(
            f"The URL {_shown(url)} holds a user name or password; put the token into the config instead."
        )
    scheme = match["scheme"].lower()
    authority = _canonical_authority(match["authority"], _DEFAULT_PORTS[scheme], url)
    path = _canonical_escapes(match["path"] or "/", _PATH_SAFE, url)
    query = f"?{_canonical_escapes(match['query'], _QUERY_SAFE, url)}" if match["query"] else ""
    return f"{scheme}://{authority}{path}{query}"


def without_secrets(url: str) -> str:
    """The URL without userinfo, query and fragment, which may hold tokens: for logs, errors and status."""
    if not any(mark in url for mark in "@?#"):  # nearly always, and 100,000 files are told of at a time
        return url
    scheme, separator, rest = url.partition("://")
    if not separator:
        return re.sub(r"[^/]*@", "", re.split(r"[?#]", url, maxsplit=1)[0])
    rest = re.split(r"[?#]", rest, maxsplit=1)[0]
    authority, slash, path = rest.partition("/")
    return f"{scheme}://{authority.rpartition('@')[2]}{slash}{path}"


def _shown(text: str) -> str:
    text = without_secrets(text)
    return repr(text if len(text) <= _SHOWN_CHARS else text[:_SHOWN_CHARS] + "…")


def _scheme_of(url: str, schemes: Collection[str]) -> str:
    known = ", ".join(f"{scheme}://" for scheme in sorted(schemes))
    match = _SCHEME.match(url)
    if match is None:
        raise RefError(f"{_shown(url)} is not a ref; begin with {known} or give an absolute path.")
    scheme = match[1].lower()
    if scheme in schemes:
        return scheme
    nearest = difflib.get_close_matches(scheme, sorted(schemes), n=1)
    hint = f"did you mean {nearest[0]}://?" if nearest else f"the known ones are {known}."
    raise RefError(f"The scheme of {_shown(url)} is unknown; {hint}")


def _path_to_url(path: str) -> str:
    match = _PATH_FRAGMENT.fullmatch(path)
    plain, fragment = (match[1], f"#{match[2]}") if match else (path, "")
    try:
        return "file://" + quote(re.sub("/+", "/", plain), safe=_PATH_SAFE.replace("%", "")) + fragment
    except UnicodeEncodeError:
        raise RefError(f"The path {_shown(plain)} is not valid UTF-8; rename the file.") from None


def _canonical_file(url: str) -> str:
    rest = url[len("file://") :]
    host, slash, path = rest.partition("/")
    if host.lower() not in ("", "localhost"):
        raise RefError(
            f"The ref {_shown(url)} names the host {host!r}; a file ref has none: file:///dir/file."
        )
    if "?" in path:
        raise RefError(
            f"The ref {_shown(url)} has a query, which files do not have; write ? as %3F in a file's name."
        )
    return f"file://{slash}{_canonical_escapes(path, _PATH_SAFE, url)}"


def _canonical_other(url: str, scheme: str) -> str:
    rest = url[len(scheme) + len("://") :]
    if not rest.strip("/"):
        raise RefError(f"The ref {_shown(url)} says nothing after {scheme}://.")
    return f"{scheme}://{rest}"


def _digest_of(fragment: str, text: str) -> bytes | None:
    if not fragment:
        return None
    match = _FRAGMENT.fullmatch(fragment)
    if match is None:
        raise RefError(f"The fragment of {_shown(text)} is not understood; only #sha256=<64 hex digits> is.")
    return bytes.fromhex(match[1])


def _canonical_authority(authority: str, default_port: int, url: str) -> str:
    if not authority.isascii():
        raise RefError(f"The host of {_shown(url)} is not ASCII; write it in its xn-- form.")
    match = _AUTHORITY.fullmatch(authority.lower())
    if match is None:
        raise RefError(f"The URL {_shown(url)} names no host, or what it names is none.")
    host = match["host"]
    if host.startswith("["):
        try:
            host = f"[{ipaddress.IPv6Address(host[1:-1]).compressed}]"
        except ValueError:
            raise RefError(f"The host of {_shown(url)} is not an IPv6 address.") from None
    port = int(match["port"] or default_port)
    if not 0 < port < 1 << 16:
        raise RefError(f"The port of {_shown(url)} is not within 1 to 65535.")
    return host if port == default_port else f"{host}:{port}"


def _canonical_escapes(text: str, safe: str, url: str) -> str:
    def canonical(match: re.Match[str]) -> str:
        if not _HEX_PAIR.fullmatch(match[1]):
            raise RefError(
                f"The URL {_shown(url)} has a % that two hex digits do not follow; write it as %25."
            )
        char = chr(int(match[1], 16))
        return char if _UNRESERVED.fullmatch(char) else match[0].upper()

    try:
        return quote(_ESCAPE.sub(canonical, text), safe=safe)
    except UnicodeEncodeError:
        raise RefError(f"The URL {_shown(url)} is not valid UTF-8.") from None
