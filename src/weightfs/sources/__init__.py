"""Where bytes come from: one module per URL scheme, found by its name; other packages may add more.

`open_source` looks a scheme up among the modules of this package (`https.py` serves `https`; a module
with more schemes lists them in `SCHEMES`), then among the entry points of the group `weightfs.sources`,
which are named by scheme. Either holds `open_source(settings) -> Source`.
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from collections.abc import Callable
from importlib.metadata import EntryPoint, entry_points
from typing import cast

from weightfs.errors import RefError
from weightfs.sources._homes import base_url, home_of, keeps_headers
from weightfs.sources.base import FetchSettings, Source

__all__ = ["ENTRY_POINTS", "base_url", "home_of", "keeps_headers", "open_source", "schemes"]

ENTRY_POINTS = "weightfs.sources"
_NOT_SCHEMES = frozenset({"base", "minisign", "publish"})

Opener = Callable[[FetchSettings], Source]


def open_source(scheme: str, settings: FetchSettings) -> Source:
    """A new source for refs and mirrors of `scheme`. RefError, naming the nearest known one."""
    module = _modules().get(scheme)
    if module is not None:
        return cast("Opener", importlib.import_module(module).open_source)(settings)
    plugin = _plugins().get(scheme)
    if plugin is not None:
        return cast("Opener", plugin.load())(settings)
    known = schemes()
    nearest = difflib.get_close_matches(scheme, known, n=1)
    hint = f"did you mean {nearest[0]}://?" if nearest else f"known are {', '.join(known)}."
    raise RefError(f"No source serves the scheme {scheme[:40]!r}; {hint}")


def schemes() -> tuple[str, ...]:
    """Every scheme that `open_source` knows, sorted."""
    return tuple(sorted({*_modules(), *_plugins()}))


def _modules() -> dict[str, str]:
    found = {}
    for module in pkgutil.iter_modules(__path__):
        if not module.name.startswith("_") and module.name not in _NOT_SCHEMES:
            name = f"{__name__}.{module.name}"
            found.update(dict.fromkeys(_schemes_of(name, module.name), name))
    return found


def _schemes_of(module: str, default: str) -> tuple[str, ...]:
    return cast("tuple[str, ...]", getattr(importlib.import_module(module), "SCHEMES", (default,)))


def _plugins() -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=ENTRY_POINTS)}
