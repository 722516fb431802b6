"""What each runtime has to be told so that it finds the mount: environment variables, for a shell or for systemd.

Rule: only what the runtime itself reads, and no secret. Where it writes something of its own, that stays elsewhere: the
mount is read-only.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from weightfs.errors import UsageError

RUNTIMES: Final = ("ollama", "hf", "llama.cpp", "vllm")
SERVICE: Final = "weightfs.service"  # our own unit

_HOME_NOTE: Final = "HF_HOME stays where it is, and writable: tokens, locks and compiled code go there."
_OTHER_USER: Final = "If the service runs as another user than the mount, mount with --allow-other."


@dataclass(frozen=True, slots=True)
class RuntimeSettings:
    """`variables` to set, `unset` those that would win over them, `notes` one line each."""

    variables: tuple[tuple[str, str], ...]
    unset: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def settings_for(runtime: str, mountpoint: Path) -> RuntimeSettings:
    """What `runtime` (one of `RUNTIMES`) needs of the mount at `mountpoint`. UsageError: its path cannot be said."""
    if re.search(r"[\x00-\x1f\x7f]", str(mountpoint)):
        raise UsageError(f"the path {str(mountpoint)!r} holds a control character; mount at another place")
    hub = ("HF_HUB_CACHE", str(mountpoint / "huggingface/hub"))
    match runtime:
        case "ollama":
            variables = (
                ("OLLAMA_MODELS", str(mountpoint / "ollama")),
                ("OLLAMA_NOPRUNE", "1"),  # it would try to delete what no manifest names
                ("OLLAMA_LOAD_TIMEOUT", "0"),  # no bound: a cold model loads as fast as it is fetched
            )
            return RuntimeSettings(variables, notes=("`ollama pull` and `create` need a store of their own:",
                                                     "see `weightfs link ollama DIR`."))  # fmt: skip
        case "llama.cpp":
            # common/hf-cache.cpp: LLAMA_CACHE is looked at before HF_HUB_CACHE.
            return RuntimeSettings((hub, ("LLAMA_ARG_OFFLINE", "1")), ("LLAMA_CACHE",))
        case "vllm":
            prefetch = "A cold model loads faster with --safetensors-load-strategy prefetch."
            return RuntimeSettings((hub, ("HF_HUB_OFFLINE", "1")), notes=(_HOME_NOTE, prefetch))
        case _:
            return RuntimeSettings((hub, ("HF_HUB_OFFLINE", "1")), notes=(_HOME_NOTE,))


def as_shell(settings: RuntimeSettings) -> list[str]:
    """Lines for `eval "$(weightfs env …)"` in a POSIX shell."""
    return [
        *(f"# {note}" for note in settings.notes),
        *(f"unset {name}" for name in settings.unset),
        *(f"export {name}={shlex.quote(value)}" for name, value in settings.variables),
    ]


def as_systemd(settings: RuntimeSettings, mountpoint: Path) -> list[str]:
    """A drop-in for the runtime's service (systemd.unit(5), systemd.exec(5))."""
    return [
        *(f"# {note}" for note in (*settings.notes, _OTHER_USER)),
        "[Unit]",
        f"RequiresMountsFor={_quoted(str(mountpoint))}",
        f"After={SERVICE}",
        "",
        "[Service]",
        *(f"Environment={_quoted(f'{name}={value}')}" for name, value in settings.variables),
        *(f"UnsetEnvironment={name}" for name in settings.unset),
    ]


def _quoted(text: str) -> str:
    """systemd.syntax(7): in double quotes, with C escapes; `%` begins a specifier. `$` means nothing here."""
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%") + '"'
