"""Minisign signatures (https://jedisct1.github.io/minisign/): made and checked as its own tool does.

A signature file has four lines: an untrusted comment; base64 of `alg[2] key_id[8] signature[64]`; the trusted
comment; base64 of the global signature over `signature ‖ trusted comment`. `Ed` signs the data, `ED` its
BLAKE2b-512. A signature counts only if both signatures are right. Key ids are printed as minisign does: the
eight bytes as a little-endian number, in hex capitals.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import time
from collections.abc import Sequence
from dataclasses import dataclass

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from weightfs.errors import SignatureError

MAX_SIGNATURE_BYTES = 16 * 1024
_TRUSTED = "trusted comment: "
_UNTRUSTED = "untrusted comment:"
_LEGACY, _PREHASHED = b"Ed", b"ED"
_SCRYPT, _NO_KDF, _BLAKE2B = b"Sc", b"\0\0", b"B2"
_MAX_SCRYPT_BYTES = 2 << 30  # minisign itself uses 1 GiB


class UnknownKeyError(SignatureError):
    """A well-formed signature by a key that is not among the trusted ones."""


@dataclass(frozen=True, slots=True)
class PublicKey:
    """An ed25519 public key and the id by which signatures name it."""

    key_id: bytes
    raw: bytes

    def __str__(self) -> str:
        return self.key_id[::-1].hex().upper()

    @property
    def line(self) -> str:
        """The base64 line: what goes into `trusted_keys`."""
        return base64.b64encode(_LEGACY + self.key_id + self.raw).decode()


@dataclass(frozen=True, slots=True)
class _Signature:
    algorithm: bytes
    key_id: bytes
    signature: bytes
    trusted_comment: bytes
    global_signature: bytes


def parse_public_key(text: str) -> PublicKey:
    """A public key from its base64 line, or from the text of a `.pub` file. SignatureError."""
    lines = [line for line in text.strip().splitlines() if not line.startswith(_UNTRUSTED)]
    raw = _decode(lines[0] if len(lines) == 1 else "", "public key")
    if len(raw) != 42 or raw[:2] != _LEGACY:
        raise SignatureError("The public key is not a minisign key; give the base64 line of its .pub file.")
    return PublicKey(raw[2:10], raw[10:])


def verify(data: bytes, signature_text: str, public_keys: Sequence[str]) -> str:
    """Check a detached signature of `data` against the trusted keys; the signer's key id.

    Raises UnknownKeyError if none of them made it, SignatureError if it is malformed or wrong.
    """
    signature = _parse_signature(signature_text)
    candidates = [key for key in map(parse_public_key, public_keys) if key.key_id == signature.key_id]
    signer = signature.key_id[::-1].hex().upper()
    if not candidates:
        raise UnknownKeyError(f"The signature is by the key {signer}, which is not among the trusted ones.")
    message = hashlib.blake2b(data).digest() if signature.algorithm == _PREHASHED else data
    for key in candidates:
        public = Ed25519PublicKey.from_public_bytes(key.raw)
        try:
            public.verify(signature.signature, message)
            public.verify(signature.global_signature, signature.signature + signature.trusted_comment)
        except InvalidSignature:
            continue
        return signer
    raise SignatureError(f"The signature by the trusted key {signer} is wrong: the file was changed.")


def sign(data: bytes, secret_key_text: str, password: str | None, trusted_comment: str | None = None) -> str:
    """The text of a `.minisig` file for `data`, prehashed. SignatureError: bad key, wrong password, bad comment.

    Args:
        data: what is signed.
        secret_key_text: a minisign secret key file.
        password: for an encrypted key.
        trusted_comment: one line, signed too; None writes a timestamp, as minisign does.
    """
    key_id, private = _open_secret_key(secret_key_text, password)
    comment = f"timestamp:{int(time.time())}\thashed" if trusted_comment is None else trusted_comment
    if "\n" in comment or "\r" in comment or len(comment.encode()) > 1024:
        raise SignatureError("A trusted comment is one line of at most 1024 bytes.")
    signature = private.sign(hashlib.blake2b(data).digest())
    global_signature = private.sign(signature + comment.encode())
    lines = (
        f"{_UNTRUSTED} signature from weightfs secret key",
        base64.b64encode(_PREHASHED + key_id + signature).decode(),
        _TRUSTED + comment,
        base64.b64encode(global_signature).decode(),
    )
    return "\n".join(lines) + "\n"


def public_key_of(secret_key_text: str, password: str | None) -> PublicKey:
    """The public half of a secret key file. SignatureError."""
    key_id, private = _open_secret_key(secret_key_text, password)
    return PublicKey(key_id, private.public_key().public_bytes_raw())


def _parse_signature(text: str) -> _Signature:
    lines = text.replace("\r\n", "\n").rstrip("\n").split("\n")
    if len(text) > MAX_SIGNATURE_BYTES or len(lines) != 4:
        raise SignatureError("The signature is not a minisign file of four lines.")
    if not lines[0].startswith(_UNTRUSTED) or not lines[2].startswith(_TRUSTED):
        raise SignatureError("The signature file lacks its comment lines.")
    first, last = _decode(lines[1], "signature"), _decode(lines[3], "global signature")
    if len(first) != 74 or first[:2] not in (_LEGACY, _PREHASHED) or len(last) != 64:
        raise SignatureError("The signature has the wrong length or an unknown algorithm.")
    comment = lines[2][len(_TRUSTED) :].encode()
    return _Signature(first[:2], first[2:10], first[10:], comment, last)


def _open_secret_key(text: str, password: str | None) -> tuple[bytes, Ed25519PrivateKey]:
    lines = [line for line in text.strip().splitlines() if not line.startswith(_UNTRUSTED)]
    raw = _decode(lines[0] if len(lines) == 1 else "", "secret key")
    if len(raw) != 158 or raw[:2] != _LEGACY or raw[4:6] != _BLAKE2B:
        raise SignatureError("The secret key is not a minisign key file.")
    kdf, salt, body = raw[2:4], raw[6:38], raw[54:]
    operations, memory = int.from_bytes(raw[38:46], "little"), int.from_bytes(raw[46:54], "little")
    if kdf == _SCRYPT:
        if password is None:
            raise SignatureError("The secret key is encrypted; give its password.")
        stream = _scrypt(password.encode(), salt, operations, memory, len(body))
        body = bytes(a ^ b for a, b in zip(body, stream, strict=True))
    elif kdf != _NO_KDF:
        raise SignatureError("The secret key is encrypted in an unknown way.")
    key_id, seed, public, checksum = body[:8], body[8:40], body[40:72], body[72:]
    expected = hashlib.blake2b(_LEGACY + body[:72], digest_size=32).digest()
    # `minisign -W` leaves the checksum of an unencrypted key zero; the halves are compared below in any case.
    unchecked = kdf == _NO_KDF and checksum == bytes(32)
    if not unchecked and not hmac.compare_digest(checksum, expected):
        raise SignatureError("The secret key does not open: the password is wrong, or the file is damaged.")
    private = Ed25519PrivateKey.from_private_bytes(seed)
    if private.public_key().public_bytes_raw() != public:
        raise SignatureError("The secret key file is damaged: its two halves do not belong together.")
    return key_id, private


def _scrypt(password: bytes, salt: bytes, operations: int, memory: int, length: int) -> bytes:
    """Scrypt with libsodium's limits (crypto_pwhash_scryptsalsa208sha256, `pickparams`)."""
    block = 8
    operations = max(operations, 32_768)
    if memory > _MAX_SCRYPT_BYTES:
        raise SignatureError(f"The secret key asks for {memory} bytes to be opened; that is refused.")
    most = operations // (block * 4) if operations < memory // 32 else memory // (block * 128)
    exponent = 1
    while exponent < 63 and 1 << exponent <= most // 2:
        exponent += 1
    parallel = 1
    if operations >= memory // 32:
        parallel = max(1, min(operations // 4 >> exponent, 0x3FFFFFFF) // block)
    cost = 1 << exponent
    return hashlib.scrypt(
        password,
        salt=salt,
        n=cost,
        r=block,
        p=parallel,
        maxmem=cost * block * 128 + parallel * block * 128 + (1 << 20),
        dklen=length,
    )


def _decode(text: str, what: str) -> bytes:
    try:
        return base64.b64decode(text.strip(), validate=True)
    except (ValueError, binascii.Error) as error:
        raise SignatureError(f"The {what} is not valid base64.") from error
