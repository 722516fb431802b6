"""What a path below `models/` would be if it were pinned: for a mount where naming a path is enough. Pure.

Rules: a path names a ref only if that ref's tree is exactly this path, so that what was resolved is found where it was
looked for. Between the scheme and the ref there are directories that exist as soon as they are named, for nobody has to
be asked about them. Everything else is nothing, and nobody is asked about that either: hidden names and others that no
origin can have, whatever lies below a ref. What is ambiguous without asking (OCI repositories of more or less than two
parts, Ollama registries whose host has neither dot nor port) cannot be browsed.
"""

from __future__ import annotations

import enum
import re

from weightfs.core import hub, oci, ollama
from weightfs.core.ref import Ref, parse_ref
from weightfs.errors import RefError

_A_HOST = re.compile(r"localhost|.*[.:].*", re.DOTALL)
_DIGEST = re.compile(r"sha256-[0-9a-f]{64}")
# What stands for the parts that are not there yet: whether a directory is on the way to any ref.
_HUB = ("org", "name", hub.DEFAULT_REVISION)
_OLLAMA = (ollama.DEFAULT_NAMESPACE, "model", ollama.DEFAULT_TAG)
_OCI = ("host.example", "namespace", "name", oci.DEFAULT_TAG)


class Between(enum.Enum):
    """A directory on the way to refs."""

    DIRECTORY = "directory"


def target_of(path: str) -> Ref | Between | None:
    """What `path` (below `models/`, as `hf/Qwen/Qwen3-8B-GGUF/main`) is: a ref, a directory on the way, or nothing."""
    scheme, *parts = path.split("/")
    examples: tuple[str, ...]
    match scheme:
        case hub.SCHEME:
            prefix = _taken(parts, parts[:1] != [] and parts[0] in hub.KINDS[1:])
            examples = _HUB
        case ollama.SCHEME:
            prefix = _taken(parts, parts[:1] != [] and _A_HOST.fullmatch(parts[0]) is not None)
            examples = _OLLAMA
        case oci.SCHEME:
            prefix, examples = "", _OCI
        case _:
            return None
    missing = len(examples) - len(parts)
    if missing < 0:
        return None
    *names, last = *parts, *examples[len(parts) :]
    return _checked(_text(scheme, prefix + "/".join(names), last), path, whole=not missing)


def _taken(parts: list[str], optional: bool) -> str:
    """Take the first part away, if it is the optional one (kind or host): it with its slash, or nothing."""
    return f"{parts.pop(0)}/" if optional else ""


def _text(scheme: str, name: str, last: str) -> str:
    """The ref, of the name of a repository and what of it."""
    if scheme == oci.SCHEME and _DIGEST.fullmatch(last):
        return f"{scheme}://{name}@{last.replace('-', ':')}"
    return f"{scheme}://{name}{'@' if scheme == hub.SCHEME else ':'}{last}"


def _checked(text: str, path: str, *, whole: bool) -> Ref | Between | None:
    try:
        ref = parse_ref(text)
    except RefError:
        return None
    tree = _tree_of(ref)
    if whole:
        return ref if tree == path else None
    return Between.DIRECTORY if tree.startswith(f"{path}/") else None


def _tree_of(ref: Ref) -> str:
    name = ref.text.partition("://")[2]
    match ref.scheme:
        case hub.SCHEME:
            return hub.parse_hub(name).tree
        case ollama.SCHEME:
            return ollama.parse_ollama(name).tree
        case _:
            return oci.parse_oci(name).tree
