"""The command line. Start-up is quick: a command imports what it needs when it runs, and `--help` only click."""

from __future__ import annotations

import sys

import click

import weightfs
from weightfs.cli.adding import add, pin, unpin, update
from weightfs.cli.cleaning import gc
from weightfs.cli.completing import completion
from weightfs.cli.configuring import config
from weightfs.cli.debugging import debug
from weightfs.cli.doctoring import doctor
from weightfs.cli.group import CONTEXT_SETTINGS, WeightfsGroup
from weightfs.cli.keeping import rm, verify
from weightfs.cli.linking import env, link
from weightfs.cli.looking import ls, status
from weightfs.cli.mapping import map_
from weightfs.cli.mounting import mount, umount
from weightfs.cli.publishing import publish
from weightfs.cli.pulling import pull
from weightfs.cli.reloading import reload
from weightfs.cli.repairing import repair
from weightfs.cli.steering import fill, pause, resume
from weightfs.cli.topping import top
from weightfs.undumpable import forbid_core_dumps

EPILOG = """\b
Examples:
  weightfs mount ~/models ollama://aya:8b hf://Qwen/Qwen3-8B-GGUF
  weightfs mount ~/models https://models.example.com/tiny.gguf
  llama-cli -m ~/models/models/https/models.example.com/tiny.gguf
  weightfs pull https://models.example.com/tiny.gguf
  weightfs umount ~/models

\b
Exit codes:
  0    done; for pull, verify and repair: and everything is as it should be
  1    a fault of weightfs itself (-v shows the traceback)
  2    what was typed or configured is wrong; nothing was done
  3    an origin did not give what was asked of it
  4    bytes, digests or signatures disagree
  5    the cache cannot be used: busy, full, damaged, no permission
  6    the mount point, /dev/fuse or fusermount3
  7    the daemon did not answer, or ended before it served
  8    weightfs doctor found a problem
  75   a mount was told by SIGUSR1 to make room for the next daemon: start it again
  130  stopped by Ctrl-C (143: by SIGTERM); what has landed is kept

\b
Settings come from options, WEIGHTFS_… variables and a TOML file with the same names:
--config, $WEIGHTFS_CONFIG, ~/.config/weightfs/config.toml, /etc/weightfs/config.toml.
"""


@click.group("weightfs", cls=WeightfsGroup, context_settings=CONTEXT_SETTINGS, epilog=EPILOG)
@click.version_option(weightfs.__version__, prog_name="weightfs", message="%(prog)s %(version)s")
def cli() -> None:
    """Model weights, without the wait: a lazy, verifying filesystem for model files.

    A REF names a model: ollama://[host/][namespace/]model[:tag], hf://[datasets/|spaces/]org/name[@revision][/path or
    glob], oci://host/name[:tag|@digest], https://host/path/model.gguf, with #sha256=<hex> where its digest is known,
    or file:///path/model.gguf.
    """


for command in (
    *(mount, umount, reload, add, pull, update, pin, unpin, fill, pause, resume),
    *(status, top, ls, map_, verify, repair, gc, rm, link, env, publish, doctor, debug, config, completion),
):
    cli.add_command(command)


def main() -> None:
    """The entry point `weightfs`."""
    forbid_core_dumps()
    cli.main(args=sys.argv[1:], prog_name="weightfs")
