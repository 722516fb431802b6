"""What every layout must hold; subclass `LayoutTests` and say how to make yours. Needs pytest."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from weightfs.core.geometry import BlobShape
from weightfs.core.manifest import Blob, BlobId, Entry, Manifest, Mirror, check_path
from weightfs.layouts.base import Dir, File, Layout, Link


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


class LayoutTests:
    """Conformance: what the mount relies on."""

    def layout(self) -> Layout:
        """Return the layout to test."""
        raise NotImplementedError

    def manifests(self) -> Sequence[Manifest]:
        """Return manifests that the layout knows how to show; at least one."""
        return (
            made_up_manifest("https/one.example/dir", {"a.gguf": "1", "sub/b.gguf": "2"}),
            made_up_manifest("https/two.example/dir", {"a.gguf": "1", "größe.gguf": "3"}),
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
        shown = {
            entry.blob.id for _, entry in self.layout().entries(self.manifests()) if isinstance(entry, File)
        }
        assert shown == {entry.blob.id for manifest in self.manifests() for entry in manifest.entries}

    def test_links_are_relative_and_lead_to_a_file(self) -> None:
        """They hold wherever the mount is."""
        entries = dict(self.layout().entries(self.manifests()))
        for path, entry in entries.items():
            if isinstance(entry, Link):
                assert not entry.target.startswith("/")
                parts = path.split("/")[:-1]
                for part in entry.target.split("/"):
                    parts = parts[:-1] if part == ".." else [*parts, part]
                assert isinstance(entries["/".join(parts)], File)

    def test_it_is_a_pure_function(self) -> None:
        """Twice the same, and nothing without manifests fails."""
        layout = self.layout()
        assert list(layout.entries(self.manifests())) == list(layout.entries(self.manifests()))
        assert all(not isinstance(entry, File) for _, entry in layout.entries(()))
