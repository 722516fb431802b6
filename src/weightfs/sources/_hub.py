"""The API of the Hugging Face Hub, as far as it says what a revision is: its commit and its files.

Rules:

- Every request goes to the endpoint. A link to the next page gives its query and nothing else: mirrors pass on the
  original's absolute URLs, and the token is for the endpoint alone.
- Pages come in bounded number and size, no page twice.
- What the Hub refuses is one sentence that says what may be the matter, and the way out. To those without a token the
  Hub answers 401 for what is missing, too, so that nobody learns which private repositories exist.
"""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import quote, urlsplit

import httpx
import trio

from weightfs.core.geometry import MIB
from weightfs.core.hub import HubName
from weightfs.core.hubtree import MAX_PAGE_BYTES, HubTree, TreeReader, is_commit, load_json
from weightfs.errors import FailureKind, SourceError
from weightfs.sources import _rules
from weightfs.sources._client import HttpClient, Reply

MAX_INFO_BYTES = 32 * MIB  # it lists every file by name, and may hold a card and a config
MAX_INFO_VALUES = 1_000_000  # a file takes three
MAX_LINK_CHARS = 16 * 1024  # of a Link header; the cursor in it has a few hundred

_REFUSALS = frozenset({401, 403, 404, 410})


@dataclass(frozen=True, slots=True)
class Revision:
    """A branch, tag or commit, pinned. `gated`: files are given only to those who have accepted a licence."""

    sha: str
    gated: bool
    reply: Reply


@dataclass(frozen=True, slots=True)
class Listing:
    """The files of a revision, and the answers that told them."""

    tree: HubTree
    replies: tuple[Reply, ...]


class HubApi:
    """Asks `settings.hf_endpoint`, with its token, if there is one."""

    def __init__(self, client: HttpClient) -> None:
        self._client = client
        self._endpoint = client.settings.hf_endpoint

    def page_of(self, name: HubName) -> str:
        """The repository's page, for people; below it are its files."""
        return f"{self._endpoint}/{'' if name.kind == 'models' else f'{name.kind}/'}{name.repo}"

    def file_url(self, name: HubName, sha: str, path: str) -> str:
        """Where the bytes of a file are: redirects to a signed URL."""
        return f"{self.page_of(name)}/resolve/{sha}/{quote(path)}"

    async def revision(self, name: HubName) -> Revision:
        """What the revision of a name is now. SourceError."""
        url = f"{self._api_of(name)}/revision/{quote(name.revision, safe='')}"
        reply = await self._get(name, url, MAX_INFO_BYTES)
        try:
            info = await trio.to_thread.run_sync(load_json, reply.body, MAX_INFO_VALUES)
        except ValueError as error:
            raise _unusable(reply, str(error)) from error
        sha = info.get("sha") if isinstance(info, dict) else None
        if not isinstance(info, dict) or not isinstance(sha, str) or not is_commit(sha):
            raise _unusable(reply, "it names no commit")
        if is_commit(name.revision) and sha != name.revision:
            raise _unusable(reply, "it names another commit than the one that was asked for")
        return Revision(sha, bool(info.get("gated")), reply)

    async def tree(self, name: HubName, sha: str) -> Listing:
        """Every file of a commit. SourceError."""
        base = f"{self._api_of(name)}/tree/{sha}"
        query: str | None = "recursive=true"
        reader = TreeReader(sha)
        replies: list[Reply] = []
        asked: set[str] = set()
        while query is not None:
            asked.add(query)
            reply = await self._get(name, f"{base}?{query}", MAX_PAGE_BYTES)
            try:
                await trio.to_thread.run_sync(reader.add, reply.body)
                query = _next_query(reply.headers)
                if query in asked:
                    raise ValueError("its pages are in a loop")
            except ValueError as error:
                raise _unusable(reply, str(error)) from error
            # For where it came from; the body has been read.
            replies.append(Reply(reply.status, reply.headers, b"", reply.url))
        try:
            return Listing(await trio.to_thread.run_sync(reader.tree), tuple(replies))
        except ValueError as error:
            raise _unusable(replies[-1], str(error)) from error

    def gated(self, name: HubName) -> SourceError:
        """The error for a repository whose licence was not accepted."""
        page = _rules.label(self.page_of(name))
        way = "set HF_TOKEN to that account's token, or run `hf auth login`"
        if self._client.settings.hf_token:
            way = (
                "make sure that the token in use (HF_TOKEN, or of `hf auth login`) is that account's; "
                + _rules.NEW_SECRET
            )
        return self._error(FailureKind.AUTH, page, f"is gated: accept its licence at {page}, and {way}")

    def _api_of(self, name: HubName) -> str:
        return f"{self._endpoint}/api/{name.kind}/{name.repo}"

    async def _get(self, name: HubName, url: str, limit: int) -> Reply:
        reply = await self._client.fetch(url, limit=limit, accept=frozenset({200, *_REFUSALS}))
        if reply.status != 200:
            raise self._refusal(name, reply)
        return reply

    def _refusal(self, name: HubName, reply: Reply) -> SourceError:
        page, has_token = _rules.label(self.page_of(name)), bool(self._client.settings.hf_token)
        token = "the token in use (HF_TOKEN, or of `hf auth login`)"  # noqa: S105  no secret, but words about it
        match reply.headers.get("x-error-code", ""), reply.status:
            case "GatedRepo", _:
                return self.gated(name)
            case "RepoNotFound", _:
                kind, what = FailureKind.NOT_FOUND, "does not exist, or is private: check the name, or "
                what += (
                    f"use another token than {token}" if has_token else "set HF_TOKEN, or run `hf auth login`"
                )
            case "RevisionNotFound", _:
                kind, what = FailureKind.NOT_FOUND, f"has no branch, tag or commit {name.revision!r}"
                what += "; `hf://org/name@revision` names another one"
            case "EntryNotFound", _:
                kind, what = FailureKind.NOT_FOUND, f"has no files at {name.revision!r}"
            case _, 401 if has_token:
                kind, what = FailureKind.AUTH, f"cannot be read with {token}: renew it; {_rules.NEW_SECRET}"
            case _, 401:
                kind, what = (
                    FailureKind.AUTH,
                    "does not exist, is private or is gated: check the name, accept the ",
                )
                what += f"licence at {page} if it has one, and set HF_TOKEN, or run `hf auth login`"
            case _, 403:
                kind = FailureKind.AUTH
                what = (
                    f"may not be read with {token}: use one that may; {_rules.NEW_SECRET}"
                    if has_token
                    else "may not be read without a token: set HF_TOKEN"
                )
            case _:
                kind, what = (
                    FailureKind.NOT_FOUND,
                    "does not exist: check the name, and the endpoint (HF_ENDPOINT)",
                )
        return self._error(kind, page, what, reply.status)

    def _error(self, kind: FailureKind, page: str, what: str, status: int | None = None) -> SourceError:
        return _rules.failure(kind, page, what, status=status)


def _next_query(headers: httpx.Headers) -> str | None:
    """The query of `Link: <…>; rel="next"` (RFC 8288), None on the last page. ValueError."""
    text = headers.get("link", "")
    if len(text) > MAX_LINK_CHARS:
        raise ValueError(f"it has a Link of more than {MAX_LINK_CHARS} characters")
    link = httpx.Response(200, headers={"link": text}).links.get("next")
    if link is None:
        return None
    query = urlsplit(link.get("url", "")).query
    if not query:
        raise ValueError("its link to the next page leads nowhere")
    return query


def _unusable(reply: Reply, why: str) -> SourceError:
    if reply.headers.get("content-type", "").lower().startswith("text/html"):
        why = "it is a page for people, of a proxy or a log-in perhaps"
    return _rules.failure(FailureKind.PROTOCOL, reply.url, f"did not answer as the Hub's API does: {why}")
