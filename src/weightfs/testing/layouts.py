"""What every layout must hold; subclass `LayoutTests` and say how to make yours. Needs pytest."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from weightfs.core.geometry import BlobShape, ByteSpan
from weightfs.core.hub import parse_hub
from weightfs.core.hubtree import HubFile, HubTree
from weightfs.core.manifest import Blob, BlobId, Entry, Manifest, Mirror, check_path
from weightfs.core.ollama import parse_ollama
from weightfs.layouts.base import Dir, File, Inline, Item, Layout, Link, group_of


def made_up_blob(name: str, size: int = 1 << 20) -> Blob:
    """A blob whose digest follows from `name`."""
    digest = hashlib.sha256(name.encode()).digest()
    return Blob(
        BlobId.of_digest(digest), BlobShape.of(size), digest, (Mirror(f"https://example.org/{name}"),)
    )


def made_up_manifest(tree: str, files: dict[str, str]) -> Manifest:
    """A manifest at `tree` with `{path: name of a made-up blob}`."""
    entries = tuple(Entry(path, made_up_blob(name)) for path, name in files.items())
    return Manifest(f"https://example.org/{tree}", "1", tree, entries)


def ollama_manifest(name: str, files: Mapping[str, Blob]) -> Manifest:
    """The manifest of `ollama://<name>`: `model.gguf` and the like, and `config.json`, which is the config."""
    parsed = parse_ollama(name)
    kinds = {"model.gguf": "model", "template": "template", "params.json": "params", "license": "license"}

    def layer(path: str, blob: Blob) -> dict[str, Any]:
        config = path == "config.json"
        kind = "docker.container.image.v1+json" if config else f"ollama.image.{kinds[path]}"
        return {"mediaType": f"application/vnd.{kind}", "digest": blob.digest, "size": blob.size}

    document = {
        "schemaVersion": 2,
        "mediaType": "application/vnd.docker.distribution.manifest.v2+json",
        "config": layer("config.json", files["config.json"]),
        "layers": [layer(path, blob) for path, blob in files.items() if path != "config.json"],
    }
    raw = json.dumps(document).encode()
    entries = tuple(Entry(path, blob) for path, blob in files.items())
    return Manifest(f"ollama://{parsed}", hashlib.sha256(raw).hexdigest(), parsed.tree, entries, raw)


def hub_manifest(
    name: str, commit: str, files: Mapping[str, Blob], *, others: Mapping[str, Blob] | None = None
) -> Manifest:
    """The manifest of `hf://<name>` at `commit`, with those of `files` that it selects; `others` are never selected."""
    parsed = parse_hub(name)
    everything = {**files, **(others or {})}
    tree = HubTree(commit, tuple(_listed(path, everything[path]) for path in sorted(everything)))
    entries = tuple(Entry(path, blob) for path, blob in files.items() if parsed.selects(path))
    return Manifest(f"hf://{parsed}", commit, parsed.tree, entries, tree.raw)


def _listed(path: str, blob: Blob) -> HubFile:
    pointer = hashlib.sha1(path.encode(), usedforsecurity=False).hexdigest()
    if blob.git_sha1 is not None:
        return HubFile(path, blob.size, blob.git_sha1.hex())
    assert blob.sha256 is not None
    return HubFile(path, blob.size, pointer, blob.sha256.hex(), blob.size)


def git_blob(name: str, size: int = 100) -> Blob:
    """A blob of which only git's SHA-1 is known; it follows from `name`."""
    sha1 = hashlib.sha1(name.encode(), usedforsecurity=False).digest()
    mirrors = (Mirror(f"https://example.org/{name}"),)
    return Blob(BlobId.of_git(sha1, size), BlobShape.of(size), None, mirrors, git_sha1=sha1)


def content_blob(data: bytes, *, git: bool = False) -> Blob:
    """The blob of these bytes, named by their SHA-256 or, as the Hub names small files, by git's SHA-1 alone."""
    if git:
        sha1 = hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).digest()
        return Blob(BlobId.of_git(sha1, len(data)), BlobShape.of(len(data)), None, (), git_sha1=sha1)
    digest = hashlib.sha256(data).digest()
    return Blob(BlobId.of_digest(digest), BlobShape.of(len(data)), digest, ())


class LayoutTests:
    """Conformance: what the mount relies on. `scheme`: of the refs that the layout shows; empty: it shows all."""

    scheme = ""

    def layout(self) -> Layout:
        """Return the layout to test."""
        raise NotImplementedError

    def manifests(self) -> Sequence[Manifest]:
        """Return manifests, of which the layout shows at least one."""
        shared = made_up_blob("weights")
        gguf = {"model.gguf": shared, "config.json": made_up_blob("config", 400)}
        files = {"config.json": git_blob("c"), "sub/größe/w.safetensors": shared, "a.gguf": made_up_blob("1")}
        return (
            made_up_manifest("https/one.example/dir", {"a.gguf": "1", "sub/b.gguf": "2"}),
            made_up_manifest("https/two.example/dir", {"a.gguf": "1", "größe.gguf": "3"}),
            ollama_manifest("aya:8b", gguf),
            ollama_manifest("host:5000/user/aya", {**gguf, "template": made_up_blob("template", 90)}),
            hub_manifest("org/name", "a" * 40, files),
            hub_manifest("org/name@v1/*.gguf", "b" * 40, files),
            hub_manifest("datasets/org/name@refs%2Fpr%2F1", "c" * 40, files),
        )

    def test_everything_is_below_the_layouts_name(self) -> None:
        """No two layouts can get into each other's way."""
        layout = self.layout()
        assert check_path(layout.name) == layout.name
        assert "/" not in layout.name
        for path, _ in layout.entries(self.manifests()):
            assert path == layout.name or path.startswith(layout.name + "/")

    def test_paths_are_safe_and_taken_once(self) -> None:
        """`check_path` accepts each, and none is a file and a directory at once."""
        entries = list(self.layout().entries(self.manifests()))
        paths = [check_path(path) for path, _ in entries]
        assert len(paths) == len(set(paths))
        leaves = {path for path, entry in entries if not isinstance(entry, Dir)}
        for path in paths:
            parts = path.split("/")
            assert not leaves & {"/".join(parts[:depth]) for depth in range(1, len(parts))}

    def test_every_blob_is_there_and_none_is_made_up(self) -> None:
        """Nothing is lost between the manifests and the tree."""
        wanted = {
            (entry.blob.id, entry.span)
            for manifest in self.manifests()
            for entry in manifest.entries
            if manifest.ref.startswith(self.scheme)
        }
        assert wanted
        assert self._files(self.layout().entries(self.manifests())) == wanted

    @staticmethod
    def _files(entries: Any) -> set[tuple[BlobId, ByteSpan | None]]:
        return {(entry.blob.id, entry.span) for _, entry in entries if isinstance(entry, File)}

    def test_links_are_relative_and_lead_to_a_file(self) -> None:
        """They hold wherever the mount is."""
        entries = dict(self.layout().entries(self.manifests()))
        for path, entry in entries.items():
            if isinstance(entry, Link):
                assert not entry.target.startswith("/")
                parts = path.split("/")[:-1]
                for part in entry.target.split("/"):
                    parts = parts[:-1] if part == ".." else [*parts, part]
                assert isinstance(entries["/".join(parts)], File | Inline)

    def test_a_group_of_manifests_says_what_it_says_alone(self) -> None:
        """The tree is joined from what each group makes: see `layouts.base`."""
        layout = self.layout()
        groups: dict[str, list[Manifest]] = {"": []}
        for manifest in self.manifests():
            groups.setdefault(group_of(manifest), []).append(manifest)
        apart: dict[str, object] = {}
        for mine in groups.values():
            for path, entry in layout.entries(mine):
                assert apart.setdefault(path, _said(entry)) == _said(entry)
        assert apart == {path: _said(entry) for path, entry in layout.entries(self.manifests())}

    def test_it_is_a_pure_function(self) -> None:
        """Twice the same, whichever other manifests there are; and nothing without manifests fails."""
        layout = self.layout()
        assert list(layout.entries(self.manifests())) == list(layout.entries(self.manifests()))
        shown = [manifest for manifest in self.manifests() if manifest.ref.startswith(self.scheme)]
        assert list(layout.entries(self.manifests())) == list(layout.entries(shown))
        assert all(not isinstance(entry, File) for _, entry in layout.entries(()))


def _said(entry: Item) -> object:
    return (entry.blob.id, entry.span) if isinstance(entry, File) else entry


def tree_of(layout: Layout, *manifests: Manifest) -> dict[str, Item]:
    """All paths of a layout, for golden trees."""
    return dict(layout.entries(manifests))
