"""A Hugging Face Hub on loopback: its API, and a CDN at another host and port, as real HTTP servers in threads.

It answers what the Hub's own client (huggingface_hub) asks; tests hold it against that client, so that it is not bent
to ours. Plain and synchronous, so that tests, scripts and subprocesses can use it alike::

    with Hub() as hub:
        repo = hub.repo("org/name")
        sha = repo.commit({"config.json": b"{}", "model.gguf": data})
        ... HF_ENDPOINT=hub.endpoint ... hub.seen, hub.cdn_seen
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self
from urllib.parse import parse_qs, quote, unquote

from weightfs.testing.answers import OriginFile, Seen, plan_answer
from weightfs.testing.hubrepos import Repo, StoredFile

KINDS = ("models", "datasets", "spaces")
PAGE_ENTRIES = 1000
LINK_SECONDS = 3600
MAX_WHOLE_BYTES = 50 * 10**9  # the Hub gives larger files in ranges only


@dataclass(frozen=True, slots=True)
class Answer:
    """A response. Content-Length is added."""

    status: int
    headers: tuple[tuple[str, str], ...] = ()
    body: bytes = b""


def page(text: str = "<!DOCTYPE html><html><title>Log in</title></html>", status: int = 200) -> Answer:
    """An HTML page, as captive portals and log-in servers send it."""
    return Answer(status, (("Content-Type", "text/html; charset=utf-8"),), text.encode())


@dataclass
class Hub:
    """A running Hub, as a context manager. Change anything at any time.

    `tokens`: those that are valid. `public_url`: the beginning of the absolute URLs in its answers, which differs from
    `endpoint` when it plays a mirror.
    """

    tokens: set[str] = field(default_factory=set)
    page_entries: int = PAGE_ENTRIES
    max_whole_bytes: int = MAX_WHOLE_BYTES
    public_url: str = ""
    now: Callable[[], float] = time.time
    repos: dict[tuple[str, str], Repo] = field(default_factory=dict)
    moved: dict[tuple[str, str], str] = field(default_factory=dict)  # (kind, old id) → new id
    seen: list[Seen] = field(default_factory=list)
    cdn_seen: list[Seen] = field(default_factory=list)
    _scripts: dict[str, deque[Answer]] = field(default_factory=dict)
    _contents: dict[str, StoredFile] = field(default_factory=dict)
    _key: int = 0
    _servers: list[_Server] = field(default_factory=list)

    def __enter__(self) -> Self:
        self._servers = [_Server(self._answer, self.seen), _Server(self._answer_cdn, self.cdn_seen)]
        self.public_url = self.public_url or self.endpoint
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for server in self._servers:
            server.stop()

    @property
    def endpoint(self) -> str:
        """For HF_ENDPOINT."""
        return f"http://127.0.0.1:{self._servers[0].port}"

    @property
    def cdn(self) -> str:
        """Where the bytes of files in LFS are: another host, and another port."""
        return f"http://localhost:{self._servers[1].port}"

    def repo(self, id: str, kind: str = "models", *, private: bool = False, gated: str = "") -> Repo:  # noqa: A002
        """The repository of that id; a new one unless there is one. `kind` is models, datasets or spaces."""
        return self.repos.setdefault((kind, id), Repo(kind, id, private, gated))

    def rename(self, repo: Repo, new: str) -> None:
        """Give a repository another id; the old one redirects."""
        del self.repos[repo.kind, repo.id]
        self.moved[repo.kind, repo.id] = new
        repo.id = new
        self.repos[repo.kind, new] = repo

    def script(self, path: str, *answers: Answer) -> None:
        """Answer the next requests for a path of Hub or CDN so, one each; honestly again after that."""
        self._scripts.setdefault(path, deque()).extend(answers)

    def limit_rate(self, path: str, times: int = 1, *, retry_after: str = "") -> None:
        """Answer the next requests for a path with 429, as when the quota is used up."""
        headers = [
            ("RateLimit", '"api";r=0;t=0'),
            ("RateLimit-Policy", '"fixed window";"api";q=500;w=300'),
        ]
        if retry_after:
            headers.append(("Retry-After", retry_after))
        self.script(path, *[Answer(429, tuple(headers))] * times)

    def expire_links(self) -> None:
        """From now on no signed URL that was given out is good any more."""
        self._key += 1

    def requests(self, part: str = "") -> list[Seen]:
        """What the Hub (not the CDN) was asked, where `part` is in the path."""
        return [seen for seen in self.seen if part in seen.path]

    # ---- the Hub

    def _answer(self, seen: Seen) -> Answer:
        if script := self._scripts.get(seen.path):
            return script.popleft()
        if (token := _token_of(seen)) and token not in self.tokens:
            return _error(401, "", "Invalid credentials in Authorization header")
        return self._route(seen, token)

    def _route(self, seen: Seen, token: str) -> Answer:
        match seen.path.lstrip("/").split("/"):
            case ["api", "resolve-cache", kind, org, name, sha, *path] if kind in KINDS:
                return self._with_repo(
                    kind, f"{org}/{name}", token, lambda r: _small(r, sha, path, seen), seen
                )
            case ["api", kind, org, name, *rest] if kind in KINDS:
                return self._with_repo(kind, f"{org}/{name}", token, lambda r: self._api(r, rest, seen), seen)
            case [kind, org, name, "resolve", revision, *path] if kind in KINDS:
                return self._resolve(kind, f"{org}/{name}", revision, path, seen)
            case [org, name, "resolve", revision, *path]:
                return self._resolve("models", f"{org}/{name}", revision, path, seen)
        return _error(404, "", "Not found")

    def _with_repo(
        self, kind: str, id_: str, token: str, answer: Callable[[Repo], Answer], seen: Seen
    ) -> Answer:
        if (new := self.moved.get((kind, id_))) is not None:
            return _redirect(307, seen.target.replace(f"/{id_}/", f"/{new}/", 1))
        repo = self.repos.get((kind, id_))
        if repo is None or (repo.private and not token):
            # Without a token, nobody learns what there is.
            if token:
                return _error(404, "RepoNotFound", "Repository not found")
            return _error(401, "", "Invalid username or password.")
        return answer(repo)

    def _api(self, repo: Repo, rest: list[str], seen: Seen) -> Answer:
        asked = {name: values[0] for name, values in parse_qs(seen.target.partition("?")[2]).items()}
        match rest:
            case [] | ["revision", _]:
                sha = repo.find(unquote(rest[1]) if rest else "main")
                return _json(repo.info(sha)) if sha else _no_revision()
            case ["refs"]:
                return _json(repo.all_refs(pulls=asked.get("include_prs") == "1"))
            case ["tree", revision, *below]:
                sha = repo.find(unquote(revision))
                return self._tree(repo, sha, unquote("/".join(below)), asked, seen) if sha else _no_revision()
        return _error(404, "", "Not found")

    def _tree(self, repo: Repo, sha: str, below: str, asked: dict[str, str], seen: Seen) -> Answer:
        entries = repo.listing(sha, below, recursive=asked.get("recursive", "").lower() == "true")
        if below and not entries:
            return _error(404, "EntryNotFound", f"{below} does not exist on {sha}")
        start = int(base64.urlsafe_b64decode(asked["cursor"])) if "cursor" in asked else 0
        stop = start + self.page_entries
        headers: list[tuple[str, str]] = []
        if stop < len(entries):
            cursor = quote(base64.urlsafe_b64encode(b"%d" % stop).decode(), safe="")
            rest = "&".join(f"{key}={value}" for key, value in asked.items() if key != "cursor")
            headers.append(("Link", f'<{self.public_url}{seen.path}?{rest}&cursor={cursor}>; rel="next"'))
        return _json(entries[start:stop], *headers)

    def _resolve(self, kind: str, id_: str, revision: str, path: list[str], seen: Seen) -> Answer:
        token = _token_of(seen)

        def answer(repo: Repo) -> Answer:
            if repo.gated and token not in repo.accepted:
                text = f"Access to {kind} {repo.id} is restricted."
                return _error(403 if token else 401, "GatedRepo", text)
            sha = repo.find(unquote(revision))
            if sha is None:
                return _no_revision()
            file = repo.commits[sha].get(unquote("/".join(path)))
            commit = ("X-Repo-Commit", sha)
            if file is None:
                return _error(404, "EntryNotFound", "Entry not found", commit)
            linked = [("X-Linked-Size", str(len(file.data))), ("X-Linked-Etag", f'"{file.etag}"')]
            if not file.in_lfs:
                to = f"/api/resolve-cache/{kind}/{repo.id}/{sha}/{'/'.join(path)}?etag=%22{file.etag}%22"
                return _redirect(307, to, commit, *linked)
            auth = f"{self.public_url}/api/{kind}/{repo.id}/xet-read-token/{sha}"
            xet = [("X-Xet-Hash", file.xet_hash), ("Link", f'<{auth}>; rel="xet-auth"')]
            return _redirect(302, self.link_to(file), commit, *linked, *xet)

        return self._with_repo(kind, id_, token, answer, seen)

    # ---- the CDN

    def link_to(self, file: StoredFile) -> str:
        """The URL to which a request for a file in LFS is redirected: at the CDN, and signed. May be overridden."""
        self._contents[file.sha256] = file
        expires = str(int(self.now()) + LINK_SECONDS)
        return f"{self.cdn}/{file.sha256}?Expires={expires}&Signature={self._sign(file.sha256, expires)}"

    def _sign(self, sha256: str, expires: str) -> str:
        return hmac.digest(b"key %d" % self._key, f"{sha256} {expires}".encode(), hashlib.sha256).hex()

    def _answer_cdn(self, seen: Seen) -> Answer:
        if script := self._scripts.get(seen.path):
            return script.popleft()
        if "authorization" in seen.headers:  # as S3 does
            return _xml(400, "InvalidArgument")
        asked = parse_qs(seen.target.partition("?")[2])
        expires, signature = asked.get("Expires", ["0"])[0], asked.get("Signature", [""])[0]
        file = self._contents.get(seen.path.lstrip("/"))
        good = file is not None and hmac.compare_digest(signature, self._sign(file.sha256, expires))
        if file is None or not good or int(expires) < self.now():
            return _xml(403, "AccessDenied")
        if seen.method == "GET" and "range" not in seen.headers and len(file.data) > self.max_whole_bytes:
            return _xml(403, "AccessDenied")
        return _bytes(file, seen, etag=hashlib.md5(file.data, usedforsecurity=False).hexdigest())


def _token_of(seen: Seen) -> str:
    return seen.headers.get("authorization", "").removeprefix("Bearer ")


def _small(repo: Repo, sha: str, path: list[str], seen: Seen) -> Answer:
    file = repo.commits.get(sha, {}).get(unquote("/".join(path)))
    commit = ("X-Repo-Commit", sha)
    if file is None:
        return _error(404, "EntryNotFound", "Entry not found", commit)
    return _bytes(file, seen, commit, etag=file.etag)


def _bytes(file: StoredFile, seen: Seen, *headers: tuple[str, str], etag: str) -> Answer:
    plan = plan_answer(
        seen, OriginFile(file.data, etag=f'"{etag}"', headers=(("Accept-Ranges", "bytes"), *headers))
    )
    return Answer(plan.status, tuple(plan.headers), plan.body)


def _json(value: Any, *headers: tuple[str, str]) -> Answer:
    kind = ("Content-Type", "application/json; charset=utf-8")
    return Answer(200, (kind, *headers), json.dumps(value).encode())


def _error(status: int, code: str, text: str, *headers: tuple[str, str]) -> Answer:
    codes = [("X-Error-Code", code)] if code else []
    kind = ("Content-Type", "application/json; charset=utf-8")
    body = json.dumps({"error": text}).encode()
    return Answer(status, (kind, ("X-Error-Message", text), *codes, *headers), body)


def _no_revision() -> Answer:
    return _error(404, "RevisionNotFound", "Invalid rev id")


def _redirect(status: int, to: str, *headers: tuple[str, str]) -> Answer:
    text = f"Redirecting to {to}".encode()
    return Answer(status, (("Location", to), ("Content-Type", "text/plain"), *headers), text)


def _xml(status: int, code: str) -> Answer:
    body = f"<?xml version='1.0'?><Error><Code>{code}</Code></Error>".encode()
    return Answer(status, (("Content-Type", "application/xml"),), body)


class _Server(ThreadingHTTPServer):
    """One listening port; a thread for each connection, all ended by `stop`."""

    daemon_threads = False  # so that `server_close` waits for them
    request_queue_size = 128

    def __init__(self, answer: Callable[[Seen], Answer], seen: list[Seen]) -> None:
        self.answer = answer
        self.seen = seen
        self._open: set[socket.socket] = set()
        super().__init__(("127.0.0.1", 0), _Handler)
        self._thread = threading.Thread(target=self.serve_forever, args=(0.02,), name="weightfs-test-hub")
        self._thread.start()

    @property
    def port(self) -> int:
        return self.server_port

    def process_request(self, request: Any, client_address: Any) -> None:
        self._open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self._open.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is no news; whatever else is printed as usual, and fails the client's request."""
        import sys

        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)

    def stop(self) -> None:
        """Close every connection and wait for the threads."""
        self.shutdown()
        self._thread.join()
        for connection in list(self._open):
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    """Requests of one connection."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # head and body are two writes, 40 ms apart otherwise
    server: _Server

    def do_GET(self) -> None:
        """Also for HEAD."""
        headers = {name.lower(): ", ".join(self.headers.get_all(name, [])) for name in self.headers}
        seen = Seen(self.command, self.path, headers)
        self.server.seen.append(seen)
        answer = self.server.answer(seen)
        self.send_response(answer.status)
        names = {name.lower() for name, _ in answer.headers}
        for name, value in answer.headers:
            self.send_header(name, value)
        if "content-length" not in names:
            self.send_header("Content-Length", str(len(answer.body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.body)

    do_HEAD = do_GET  # noqa: N815  as above

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002  the parent's name
        """Requests are in `Hub.seen`."""
