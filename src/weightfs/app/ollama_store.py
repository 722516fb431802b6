"""A real, writable OLLAMA_MODELS whose blobs are symbolic links into the mount.

Rules. What Ollama itself has put there wins: its blobs and its manifests are never overwritten, nor deleted. What this
module made it remembers in `.weightfs.json`, and changes or deletes only that, and only while it is still as it was
made. Every file appears whole, by a rename; a link appears by one call. Blobs come before the manifest that names them,
and go after it, so that Ollama never sees a model without its blobs. Doing it twice changes nothing. What cannot be
done for one model does not stop the others, and nothing of that model is taken away.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import stat
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from weightfs.core.manifest import check_path

RECORD: Final = ".weightfs.json"  # Ollama looks at nothing beside its own directories
_SCRATCH: Final = ".weightfs-"
_BLOB = re.compile(r"sha256-[0-9a-f]{64}")
MAX_MANIFEST: Final = 16 << 20  # bytes; as the source of such manifests reads them


@dataclass(slots=True)
class Outcome:
    """What was done. `kept` are paths that are Ollama's own, and were left alone though the mount has others."""

    linked: list[str] = field(default_factory=list)
    updated: list[str] = field(default_factory=list)
    unchanged: list[str] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    failed: dict[str, OSError] = field(default_factory=dict)  # by path, and why

    def document(self) -> dict[str, Any]:
        """For JSON."""
        return {
            name: sorted(getattr(self, name))
            for name in ("linked", "updated", "unchanged", "removed", "kept")
        }

    @contextlib.contextmanager
    def noting(self, path: str) -> Iterator[None]:
        """An OSError inside is noted for `path`, and goes no further."""
        try:
            yield
        except OSError as error:
            self.failed[path] = error


@dataclass(frozen=True, slots=True)
class _Model:
    path: str  # below `manifests`
    raw: bytes = field(repr=False)
    blobs: tuple[str, ...]


class OllamaStore:
    """The store at `directory` for the mount's `ollama` directory at `source`."""

    def __init__(self, directory: Path, source: Path) -> None:
        self._directory = directory
        self._source = source
        self._manifests = directory / "manifests"
        self._blobs = directory / "blobs"
        self._ours: dict[str, str] = {}  # path below `manifests` → SHA-256 of what we wrote
        self._links: set[str] = set()  # names below `blobs`

    def update(self) -> Outcome:
        """Bring the store to what the mount has. OSError: it cannot be read or written at all."""
        outcome = Outcome()
        models = self._models(outcome)
        for place in (self._manifests, self._blobs):
            place.mkdir(parents=True, exist_ok=True)
        self._recall()
        unread = set(outcome.failed)
        wanted = {model.path for model in models} | unread
        try:
            for model in models:
                with outcome.noting(model.path):
                    for blob in model.blobs:
                        self._link(blob, outcome)
                    self._write(model, outcome)
            for path in sorted(self._ours.keys() - wanted):
                with outcome.noting(path):
                    self._remove_manifest(path, outcome)
            # Which blobs an unread manifest names nobody knows, and one that stays keeps its own.
            named = {blob for model in models for blob in model.blobs}
            for blob in [] if outcome.failed else sorted(self._links - named):
                with outcome.noting(blob):
                    self._remove_link(blob, outcome)
        finally:
            self._remember()  # also of what was done before it failed
        return outcome

    def _models(self, outcome: Outcome) -> list[_Model]:
        """Everything that the mount shows, whose blobs it has."""
        root = self._source / "manifests"
        there = set(os.listdir(self._source / "blobs"))  # noqa: PTH208 - names
        models = []
        for place in sorted(root.glob("*/*/*/*")):
            path = place.relative_to(root).as_posix()
            with outcome.noting(path), place.open("rb") as file:
                raw = file.read(MAX_MANIFEST)
                names = set(_BLOB.findall(raw.decode(errors="replace").replace("sha256:", "sha256-")))
                models.append(_Model(path, raw, tuple(sorted(names & there))))
        return models

    def _link(self, name: str, outcome: Outcome) -> None:
        place, target = self._blobs / name, str(self._source / "blobs" / name)
        try:
            place.symlink_to(target)
        except FileExistsError:
            if not place.is_symlink():
                if name not in outcome.kept:
                    outcome.kept.append(name)  # downloaded by Ollama: the same bytes, and its own
                return
            if os.readlink(place) == target:  # noqa: PTH115 - the text
                self._links.add(name)
                return
            if name not in self._links:
                outcome.kept.append(name)
                return
            self._replace_link(place, target)  # the mount is at another place now
        self._links.add(name)

    def _replace_link(self, place: Path, target: str) -> None:
        with tempfile.TemporaryDirectory(prefix=_SCRATCH, dir=self._blobs) as scratch:
            new = Path(scratch) / "link"
            new.symlink_to(target)
            new.replace(place)

    def _write(self, model: _Model, outcome: Outcome) -> None:
        place = self._manifests / model.path
        digest = hashlib.sha256(model.raw).hexdigest()
        found = _digest_of(place)
        ours = self._ours.get(model.path)
        if found is not None and found != ours:
            outcome.kept.append(model.path)
            return
        if found == digest:
            outcome.unchanged.append(model.path)
            return
        place.parent.mkdir(parents=True, exist_ok=True)
        _write_whole(place, model.raw, self._manifests)
        self._ours[model.path] = digest
        (outcome.linked if found is None else outcome.updated).append(model.path)

    def _remove_manifest(self, path: str, outcome: Outcome) -> None:
        place = self._manifests / path
        if _digest_of(place) == self._ours[path]:
            place.unlink()
            outcome.removed.append(path)
        del self._ours[path]

    def _remove_link(self, name: str, outcome: Outcome) -> None:
        place = self._blobs / name
        if place.is_symlink() and os.readlink(place).endswith(f"/ollama/blobs/{name}"):  # noqa: PTH115
            place.unlink()
            outcome.removed.append(name)
        self._links.discard(name)

    def _recall(self) -> None:
        """What cannot be read, or leads elsewhere, was not made by us: then everything there is Ollama's."""
        with contextlib.suppress(FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
            record = json.loads((self._directory / RECORD).read_bytes())
            ours = {check_path(path): str(digest) for path, digest in record["manifests"].items()}
            links = {name for name in record["blobs"] if _BLOB.fullmatch(name)}
            self._ours, self._links = ours, links

    def _remember(self) -> None:
        record = {"manifests": dict(sorted(self._ours.items())), "blobs": sorted(self._links)}
        text = json.dumps(record, indent=1) + "\n"
        _write_whole(self._directory / RECORD, text.encode(), self._directory)


def _write_whole(place: Path, data: bytes, near: Path) -> None:
    """By a rename from a directory in `near`, of the same filesystem and where Ollama does not look for models."""
    with tempfile.TemporaryDirectory(prefix=_SCRATCH, dir=near) as scratch:
        new = Path(scratch) / "file"
        with new.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        new.chmod(0o644)
        new.replace(place)


def _digest_of(path: Path) -> str | None:
    """SHA-256 of a manifest that is there; None if there is none. Empty for what is no regular file: never ours."""
    try:
        # Not followed: a link may lead to a disk that is away now. Not opened: that waits for ever on a pipe.
        if not stat.S_ISREG(path.lstat().st_mode):
            return ""
        with path.open("rb") as file:
            return hashlib.sha256(file.read(MAX_MANIFEST + 1)).hexdigest()
    except FileNotFoundError:
        return None
