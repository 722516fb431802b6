"""What two spellings of a ref have in common, and whether what a ref names may move. Pure.

Rule: whoever looks a ref up among those that are known compares `identity`, never the texts: Ollama matches names
without regard to case, so `ollama://Aya:8b` is what was added as `ollama://aya:8b`.
"""

from __future__ import annotations

import re

from weightfs.core import hub, oci, ollama

_COMMIT = re.compile(r"[0-9a-f]{40}")


def identity(ref: str) -> str:
    """The same for every spelling of one ref. `ref` is canonical (`core.ref.parse_ref`)."""
    scheme, _, name = ref.partition("://")
    # Read again, for `Library/aya` is `aya` too.
    return f"{scheme}://{ollama.parse_ollama(name.casefold())}" if scheme == ollama.SCHEME else ref


def moves(ref: str) -> bool:
    """Whether the origin may say something else of this ref tomorrow: it names a tag, a branch, or a bare URL.

    What is named by a digest or a commit stays as it is. `ref` is canonical.
    """
    scheme, _, name = ref.partition("://")
    match scheme:
        case ollama.SCHEME:
            return True
        case oci.SCHEME:
            return not oci.parse_oci(name).by_digest
        case hub.SCHEME:
            return _COMMIT.fullmatch(hub.parse_hub(name).revision) is None
        case _:
            return "#sha256=" not in name
