"""The token server of a registry, on loopback, and what small servers in threads need.

`TokenServer` gives JWTs that a docker-registry accepts (distribution's "Token Authentication Specification").
"""

from __future__ import annotations

import base64
import http.server
import json
import secrets
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from urllib.parse import parse_qs, urlsplit

from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.x509 import load_pem_x509_certificate

from weightfs.testing.tls import TlsFiles

SERVICE, ISSUER = "weightfs test registry", "weightfs test token server"
POLL_SECONDS = 0.01

Request = http.server.BaseHTTPRequestHandler


class TokenServer:
    """Change `accounts`, `public`, `lifetime` and `status` at any time.

    `seen` has (user or "", scopes) of each request. A docker-registry takes a token for a minute after its end.
    """

    def __init__(self, tls: TlsFiles, accounts: Mapping[str, str]) -> None:
        self._certificate = load_pem_x509_certificate(tls.certificate.read_bytes())
        key = serialization.load_pem_private_key(tls.key.read_bytes(), None)
        assert isinstance(key, ec.EllipticCurvePrivateKey)
        self._key = key
        self.accounts = dict(accounts)
        self.public = True  # whether anonymous tokens may pull
        self.lifetime = 300
        self.said_lifetime: int | None = None  # what `expires_in` says, if not the truth
        self.field = "token"  # or "access_token"
        self.status = 0  # an error status for every request
        self.seen: list[tuple[str, tuple[str, ...]]] = []
        self.server = serve(self._answer)

    @property
    def realm(self) -> str:
        """Its URL."""
        return f"http://127.0.0.1:{self.server.server_port}/token"

    def issue(self, scopes: Sequence[str], user: str = "", actions: Sequence[str] | None = None) -> str:
        """A token for the scopes; with `actions` in place of those that they name."""
        now = int(time.time())
        access = []
        for scope in scopes:
            kind, name, asked = scope.split(":", 2)
            access.append({"type": kind, "name": name, "actions": list(actions or asked.split(","))})
        claims = {
            "iss": ISSUER,
            "sub": user,
            "aud": SERVICE,
            "exp": now + self.lifetime,
            "nbf": now - 60,  # the registry allows a minute of difference between clocks
            "iat": now,
            "jti": secrets.token_hex(8),
            "access": access,
        }
        der = self._certificate.public_bytes(serialization.Encoding.DER)
        head = {"typ": "JWT", "alg": "ES256", "x5c": [base64.b64encode(der).decode()]}
        text = f"{b64url(json.dumps(head).encode())}.{b64url(json.dumps(claims).encode())}"
        r, s = decode_dss_signature(self._key.sign(text.encode(), ec.ECDSA(hashes.SHA256())))
        return f"{text}.{b64url(r.to_bytes(32, 'big') + s.to_bytes(32, 'big'))}"

    def stop(self) -> None:
        """End it."""
        stop_server(self.server)

    def _answer(self, request: Request) -> None:
        query = parse_qs(urlsplit(request.path).query)
        scopes = tuple(query.get("scope", ()))
        user, password = _basic_of(request.headers.get("Authorization"))
        self.seen.append((user, scopes))
        if self.status:
            reply(request, self.status, b"{}")
            return
        known = bool(user) and self.accounts.get(user) == password
        if query.get("service") != [SERVICE] or (user and not known) or not (known or self.public):
            reply(request, 401, b'{"errors":[{"code":"UNAUTHORIZED"}]}')
            return
        said = self.lifetime if self.said_lifetime is None else self.said_lifetime
        answer = {self.field: self.issue(scopes, user, ["pull"]), "expires_in": said}
        reply(request, 200, json.dumps(answer).encode())


def serve(answer: Callable[[Request], None]) -> http.server.ThreadingHTTPServer:
    """A server in a thread that answers GET by `answer(request handler)`."""

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            answer(self)

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(POLL_SECONDS,), daemon=True).start()
    return server


def stop_server(server: http.server.ThreadingHTTPServer) -> None:
    """End what `serve` began."""
    server.shutdown()
    server.server_close()


def reply(
    request: Request,
    status: int,
    body: bytes,
    headers: Mapping[str, str] | None = None,
) -> None:
    """Answer a request."""
    request.send_response(status)
    for name, value in (headers or {}).items():
        request.send_header(name, value)
    request.send_header("Content-Type", "application/json")
    request.send_header("Content-Length", str(len(body)))
    request.end_headers()
    request.wfile.write(body)


def _basic_of(header: str | None) -> tuple[str, str]:
    """User and password of an `Authorization: Basic` header; empty if there is none."""
    if header is None or not header.startswith("Basic "):
        return "", ""
    user, _, password = base64.b64decode(header.removeprefix("Basic ")).decode().partition(":")
    return user, password


def b64url(data: bytes) -> str:
    """base64url without padding, as in JWTs and secure_link."""
    return base64.urlsafe_b64encode(data).decode().rstrip("=")
