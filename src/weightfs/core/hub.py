"""Names on the Hugging Face Hub: `[datasets/|spaces/]org/name[@revision][/path or glob]`. Pure.

Rules: `parse_hub(str(name)) == name`; the revision is always said; a slash inside it is written `%2F`, as the Hub's own
client does in paths. A path selects one file, everything below a directory, or, as a glob, what the Hub's client would
select by `allow_patterns` (`*` matches slashes too).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Final

from weightfs.core.manifest import check_path
from weightfs.errors import RefError

SCHEME: Final = "hf"
DEFAULT_REVISION: Final = "main"
KINDS: Final = ("models", "datasets", "spaces")  # as the Hub's API names them

# What the Hub allows in names: letters, digits, "-", "_", "."; not "--" or ".." and no "-" or "." at either end.
_PART = re.compile(r"(?!.*(?:--|\.\.))[A-Za-z0-9_](?:[A-Za-z0-9_.-]{0,94}[A-Za-z0-9_])?")
# git-check-ref-format(1), as far as it matters in a URL and in a path.
_REVISION = re.compile(
    r"(?!.*(?:\.\.|//|@\{|/\.))[^\x00-\x20\x7f~^:?*\[\\%#/.-][^\x00-\x20\x7f~^:?*\[\\%#]{0,249}"
)
_GLOB = re.compile(r"[*?\[]")


@dataclass(frozen=True, slots=True)
class HubName:
    """A repository at a revision, and what of it. `path` is empty for everything."""

    kind: str
    repo: str  # org/name
    revision: str
    path: str = ""

    def __str__(self) -> str:
        prefix = "" if self.kind == "models" else f"{self.kind}/"
        path = f"/{self.path}" if self.path else ""
        return f"{prefix}{self.repo}@{self.escaped_revision}{path}"

    @property
    def escaped_revision(self) -> str:
        """The revision as one component of a path or URL."""
        return self.revision.replace("/", "%2F")

    @property
    def tree(self) -> str:
        """The directory below `models/`."""
        prefix = "" if self.kind == "models" else f"{self.kind}/"
        return f"{SCHEME}/{prefix}{self.repo}/{self.escaped_revision}"

    def selects(self, path: str) -> bool:
        """Whether a file of the repository is part of this ref."""
        if not self.path or path == self.path or path.startswith(f"{self.path}/"):
            return True
        return bool(_GLOB.search(self.path)) and fnmatchcase(path, self.path)


def parse_hub(text: str) -> HubName:
    """Read a name, without `hf://`. RefError."""
    kind, rest = "models", text
    for other in KINDS:
        if rest.startswith(f"{other}/") and rest.count("/") > 1:
            kind, rest = other, rest.removeprefix(f"{other}/")
            break
    org, slash, rest = rest.partition("/")
    found = re.fullmatch(r"([^@/]*)(?:@([^/]*))?(?:/(.*))?", rest, re.DOTALL)
    if not slash or found is None:
        raise RefError(f"{text[:200]!r} is no name on the Hub; write org/name[@revision][/path or glob].")
    name, revision, path = found[1], found[2], found[3] or ""
    if ":" in name:
        raise RefError(
            f"{text[:200]!r} is no name on the Hub; select files by a glob, as in org/name/*Q4_K_M*."
        )
    for part in (org, name):
        if org in KINDS or not _PART.fullmatch(part):
            raise RefError(f"{part[:100]!r} cannot be part of a repository's name; write org/name.")
    return HubName(kind, f"{org}/{name}", _revision(revision, text), _path(path, text))


def _revision(escaped: str | None, text: str) -> str:
    if escaped is None:
        return DEFAULT_REVISION
    revision = re.sub("%2f", "/", escaped, flags=re.IGNORECASE)
    if not _REVISION.fullmatch(revision) or revision.endswith(("/", ".", ".lock")):
        raise RefError(
            f"The revision of {text[:200]!r} cannot be a branch, tag or commit; write a slash in it as %2F."
        )
    return revision


def _path(path: str, text: str) -> str:
    path = path.rstrip("/")
    if not path:
        return ""
    try:
        return check_path(path)
    except ValueError as error:
        raise RefError(f"The path of {text[:200]!r} cannot be in a repository: {error}.") from None
