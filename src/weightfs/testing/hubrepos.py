"""Repositories as the Hugging Face Hub keeps them: commits of files, some in LFS, under branches and tags.

Names are git's own where clients check them (objects, LFS pointers). A commit's name is only as unique as its content.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from weightfs.core.hubtree import git_oid

LFS_SUFFIXES = (
    ".gguf",
    ".safetensors",
    ".bin",
    ".parquet",
    ".onnx",
    ".pt",
)  # of the Hub's default .gitattributes


@dataclass(frozen=True)
class StoredFile:
    """Content, and whether it is in LFS: then git has a pointer to it."""

    data: bytes
    in_lfs: bool

    @cached_property
    def sha256(self) -> str:
        """The content's SHA-256, in hex."""
        return hashlib.sha256(self.data).hexdigest()

    @cached_property
    def pointer(self) -> bytes:
        """What git stores in its place (git-lfs specification, "The Pointer")."""
        text = (
            f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(self.data)}\n"
        )
        return text.encode()

    @cached_property
    def oid(self) -> str:
        """Git's name of what git stores."""
        return git_oid(self.pointer if self.in_lfs else self.data)

    @property
    def etag(self) -> str:
        """What the Hub says in ETag or X-Linked-Etag, without the quotes."""
        return self.sha256 if self.in_lfs else self.oid

    @cached_property
    def xet_hash(self) -> str:
        """A stand-in of the right form: nobody can check it without the chunks."""
        return hashlib.blake2s(self.data).hexdigest()

    def listed(self, path: str) -> dict[str, Any]:
        """As the tree API shows it."""
        shown: dict[str, Any] = {"type": "file", "oid": self.oid, "size": len(self.data), "path": path}
        if self.in_lfs:
            lfs = {"oid": self.sha256, "size": len(self.data), "pointerSize": len(self.pointer)}
            shown |= {"lfs": lfs, "xetHash": self.xet_hash}
        return shown


@dataclass
class Repo:
    """One repository. `accepted`: the tokens of those who have accepted the licence of a gated one."""

    kind: str
    id: str
    private: bool = False
    gated: str = ""  # "auto" or "manual"
    accepted: set[str] = field(default_factory=set)
    commits: dict[str, dict[str, StoredFile]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)  # "refs/heads/main" → commit
    _listed: tuple[tuple[str, str, bool], list[dict[str, Any]]] | None = (
        None  # the last: each page asks for it again
    )

    def commit(self, files: Mapping[str, bytes], *, ref: str = "main", lfs: bool | None = None) -> str:
        """A new commit that holds exactly `files`, under a branch (or a full ref, as "refs/pr/1"); its name.

        `lfs`: whether they are in LFS; by default their names decide.
        """
        stored = {
            path: StoredFile(data, path.endswith(LFS_SUFFIXES) if lfs is None else lfs)
            for path, data in sorted(files.items())
        }
        text = "\n".join([str(len(self.commits)), *(f"{file.oid} {path}" for path, file in stored.items())])
        sha = hashlib.sha1(f"commit {self.id}\n{text}".encode(), usedforsecurity=False).hexdigest()
        self.commits[sha] = stored
        self.refs[ref if ref.startswith("refs/") else f"refs/heads/{ref}"] = sha
        return sha

    def tag(self, name: str, sha: str) -> None:
        """Name a commit for ever."""
        self.refs[f"refs/tags/{name}"] = sha

    def find(self, revision: str) -> str | None:
        """The commit that a branch, tag, ref or commit means."""
        if revision in self.commits:
            return revision
        for name in (revision, f"refs/heads/{revision}", f"refs/tags/{revision}"):
            if name in self.refs:
                return self.refs[name]
        return None

    def info(self, sha: str) -> dict[str, Any]:
        """As the repository API shows it."""
        return {
            "_id": "0" * 24,
            "id": self.id,
            "author": self.id.partition("/")[0],
            "sha": sha,
            "private": self.private,
            "gated": self.gated or False,
            "disabled": False,
            "downloads": 0,
            "likes": 0,
            "tags": [],
            "lastModified": "2026-01-01T00:00:00.000Z",
            "createdAt": "2026-01-01T00:00:00.000Z",
            "siblings": [{"rfilename": path} for path in self.commits[sha]],
        }

    def listing(self, sha: str, below: str, *, recursive: bool) -> list[dict[str, Any]]:
        """The entries of a directory as the tree API shows them, in order of their paths."""
        asked = (sha, below, recursive)
        if self._listed is None or self._listed[0] != asked:  # a commit never changes
            self._listed = asked, self._list(sha, below, recursive=recursive)
        return self._listed[1]

    def _list(self, sha: str, below: str, *, recursive: bool) -> list[dict[str, Any]]:
        prefix = f"{below}/" if below else ""
        shown: dict[str, dict[str, Any]] = {}
        for path, file in self.commits[sha].items():
            if path.startswith(prefix):
                for parent in _parents(path.removeprefix(prefix)):
                    oid = hashlib.sha1(parent.encode(), usedforsecurity=False).hexdigest()
                    shown[prefix + parent] = {
                        "type": "directory",
                        "oid": oid,
                        "size": 0,
                        "path": prefix + parent,
                    }
                shown[path] = file.listed(path)
        return [
            entry
            for path, entry in sorted(shown.items())
            if recursive or "/" not in path.removeprefix(prefix)
        ]

    def all_refs(self, *, pulls: bool) -> dict[str, list[dict[str, str]]]:
        """As the refs API shows them."""
        kinds = {"branches": "refs/heads/", "tags": "refs/tags/", "converts": "refs/convert/"}
        if pulls:
            kinds["pullRequests"] = "refs/pr/"
        return {
            kind: [
                {"name": ref.removeprefix(prefix), "ref": ref, "targetCommit": sha}
                for ref, sha in self.refs.items()
                if ref.startswith(prefix)
            ]
            for kind, prefix in kinds.items()
        }


def _parents(path: str) -> Iterator[str]:
    names = path.split("/")[:-1]
    for count in range(1, len(names) + 1):
        yield "/".join(names[:count])
