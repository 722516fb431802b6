"""How every command ends: an exit code, and if something went wrong, one sentence on stderr with the way out."""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NoReturn

import click

from weightfs.app.groups import most_telling
from weightfs.errors import WeightfsError

CONTEXT_SETTINGS: dict[str, Any] = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


def examples(*lines: str) -> str:
    """The end of a command's help; each line stays as it is."""
    return "\b\nExamples:\n" + "\n".join(f"  {line}" for line in lines)


@dataclass(slots=True)
class Invocation:
    """What one run of the program was told about itself; `ctx.obj` of every command."""

    verbose: bool = False


class Stopped(Exception):  # noqa: N818  # it is no error: somebody asked for the end
    """The command was ended by a signal, in order; the text says what is kept."""

    def __init__(self, signum: int, text: str) -> None:
        super().__init__(text)
        self.signum = signum


class WeightfsGroup(click.Group):
    """A group whose `main` is the only place where errors become exit codes."""

    def main(  # type: ignore[override]  # click's overloads tell apart what we never use (standalone_mode)
        self, args: Sequence[str] | None = None, prog_name: str | None = None, **extra: Any
    ) -> NoReturn:
        """Run and end the process."""
        invocation = Invocation()
        extra["standalone_mode"] = False
        extra.setdefault("obj", invocation)
        try:
            result = super().main(args, prog_name or "weightfs", **extra)
            sys.stdout.flush()
        except BaseException as error:  # noqa: BLE001  # the process ends here, with a word and a code
            sys.exit(report(error, verbose=invocation.verbose))
        sys.exit(result if isinstance(result, int) else 0)


def report(error: BaseException, *, verbose: bool) -> int:
    """Say on stderr what went wrong; the exit code."""
    error = most_telling(error)
    code, text = _verdict(error)
    if verbose and not isinstance(error, click.exceptions.Exit | click.Abort | Stopped | KeyboardInterrupt):
        from weightfs.logs import traceback_of

        click.echo(traceback_of(error), err=True, nl=False)
    elif code == 1 and text:
        text += "; run it again with -v for the traceback"
    if text:
        say(text, "ERROR")
    return code


def _verdict(error: BaseException) -> tuple[int, str]:
    """Exit code and sentence; an empty one if there is nothing to say."""
    code, text = 1, f"a fault of weightfs itself: {type(error).__name__}: {_sentence(str(error))}"
    match error:
        case click.exceptions.Exit():
            code, text = error.exit_code, ""
        case SystemExit():  # also click's quiet end when the reader of our output has gone (`weightfs ls | head`)
            code, text = error.code if isinstance(error.code, int) else 1, ""
        case Stopped():
            code, text = 128 + error.signum, str(error)
        case KeyboardInterrupt() | click.Abort():
            code, text = 128 + signal.SIGINT, "stopped"
        case click.exceptions.NoArgsIsHelpError():
            click.echo(error.format_message(), err=True)  # as it is: its lines are its sense
            code, text = error.exit_code, ""
        case click.UsageError():
            path = error.ctx.command_path if error.ctx is not None else "weightfs"
            code, text = error.exit_code, f"{_sentence(error.format_message())}; see `{path} --help`"
        case WeightfsError():
            from weightfs.control.documents import exit_code_of

            code, text = exit_code_of(error), _sentence(str(error))
    return code, text


def say(text: str, level: Literal["WARNING", "ERROR"] = "WARNING") -> None:
    """One line on stderr, without secrets; in a service's journal with its priority."""
    from weightfs.journal import is_journal
    from weightfs.logs import PRIORITIES

    priority = PRIORITIES[level] if is_journal(sys.stderr) else ""
    click.echo(f"{priority}weightfs: {presentable(text)}", err=True)


def presentable(text: str) -> str:
    """One line without secrets, and without a full stop."""
    from weightfs.logs import one_line, redact

    return one_line(redact(_sentence(text)))


def _sentence(text: str) -> str:
    return " ".join(text.split()).removesuffix(".")
