"""`weightfs publish`: a chunk list (Metalink 4, RFC 5854) beside a file, signed if there is a key."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Final

import click

from weightfs.cli.group import examples
from weightfs.cli.options import json_option, verbose_option
from weightfs.errors import UsageError

PASSWORD_VARIABLE: Final = "WEIGHTFS_SIGN_PASSWORD"  # noqa: S105  # the name of a variable
MAX_KEY_BYTES: Final = 16 * 1024

_EXAMPLES = examples(
    "weightfs publish model.gguf --url https://models.example.com/model.gguf",
    "weightfs publish model.gguf --sign ~/.minisign/minisign.key \\",
    "    --url https://a.example.com/model.gguf --url https://b.example.com/model.gguf",
)


@click.command(short_help="Write a chunk list for a file.", epilog=_EXAMPLES)
@click.argument("file", metavar="FILE")
@click.option(
    "--url", "urls", metavar="URL", multiple=True, required=True, help="Where FILE will be; repeatable."
)
@click.option("--sign", "key", metavar="KEY", help="Sign with this minisign secret key file.")
@json_option
@verbose_option
def publish(file: str, urls: tuple[str, ...], key: str | None, as_json: bool) -> int:
    """Hash FILE once and write FILE.meta4: its SHA-256, and one for each of its chunks.

    Host FILE.meta4 beside FILE; weightfs and aria2c find it there and check every chunk as it arrives. With --sign,
    FILE.meta4.minisig is written too. The password of the key is asked for, or taken from WEIGHTFS_SIGN_PASSWORD.
    """
    from weightfs.cli.progress import make_progress
    from weightfs.core import merkle
    from weightfs.core.metalink import write_metalink
    from weightfs.sources.publish import describe

    path = Path(file)
    # Before hashing for minutes: a wrong key or password is told at once.
    secret = None if key is None else _SecretKey(Path(key).expanduser())
    with make_progress(quiet=as_json) as progress:
        progress.begin(file, path.name, 0)
        metalink = describe(path, urls, lambda done, total: progress.update(file, done, total))
    data = write_metalink(metalink)
    written = [_write(path.with_name(path.name + ".meta4"), data)]
    if secret is not None:
        written.append(_write(written[0].with_name(written[0].name + ".minisig"), secret.sign(data)))
    digest = "" if metalink.sha256 is None else metalink.sha256.hex()
    root = merkle.root(metalink.digests).hex()
    if as_json:
        document = {
            "files": [str(one) for one in written],
            "sha256": digest,
            "size_bytes": metalink.size,
            "merkle_root": root,
        }
        click.echo(json.dumps(document, indent=2))
    else:
        for one in written:
            click.echo(one)
        click.echo(f"ref: {urls[0]}#sha256={digest}")
        click.echo(f"chunk list: {len(metalink.digests) // 32} chunks, Merkle root {root}")
    return 0


class _SecretKey:
    """A key that was opened once, so that its password is known to be right."""

    def __init__(self, path: Path) -> None:
        from weightfs.sources.minisign import public_key_of

        try:
            with path.open("rb") as file:
                self._text = file.read(MAX_KEY_BYTES).decode()
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not text"
            raise UsageError(
                f"the key {path} cannot be read: {reason}; name a minisign secret key file"
            ) from None
        self._password = _password(path, encrypted=self._is_encrypted())
        public_key_of(self._text, self._password)

    def _is_encrypted(self) -> bool:
        from weightfs.errors import SignatureError
        from weightfs.sources.minisign import public_key_of

        try:
            public_key_of(self._text, None)
        except SignatureError as error:
            return "encrypted" in str(error)
        return False

    def sign(self, data: bytes) -> bytes:
        """The text of a .minisig file."""
        from weightfs.sources.minisign import sign

        return sign(data, self._text, self._password).encode()


def _password(path: Path, *, encrypted: bool) -> str | None:
    if not encrypted:
        return None
    if PASSWORD_VARIABLE in os.environ:
        return os.environ[PASSWORD_VARIABLE]
    if not sys.stdin.isatty():
        raise UsageError(
            f"the key {path} has a password and there is no terminal to ask; set {PASSWORD_VARIABLE}"
        )
    answer: str = click.prompt(f"Password of {path}", hide_input=True, err=True)
    return answer


def _write(path: Path, data: bytes) -> Path:
    """Write all of it or nothing. UsageError."""
    try:
        descriptor, draft = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            Path(draft).chmod(0o644)
            Path(draft).replace(path)
        except BaseException:
            Path(draft).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise UsageError(
            f"{path} cannot be written: {error.strerror}; copy the file to a directory of yours"
        ) from None
    return path
