"""What strangers' bytes reach first: one function a parser, for Hypothesis (tests/fuzz) and for atheris (`make fuzz`).

Rule: a target takes any bytes and returns. What the parser promises to raise is caught here; whatever else comes out
is a bug, and so is an answer that breaks the parser's own promise.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote_from_bytes

import httpx
import trio
import trio.testing

from weightfs.control.documents import error_from_json
from weightfs.control.server import make_app
from weightfs.core.artifact import Artifact, parse_manifest
from weightfs.core.artifact_paths import oci_files, ollama_files
from weightfs.core.geometry import ByteSpan
from weightfs.core.gguf import read_gguf
from weightfs.core.hubtree import TreeReader, load_json, read_raw
from weightfs.core.manifest import check_path
from weightfs.core.metalink import read_metalink
from weightfs.core.ref import parse_ref, tree_of
from weightfs.core.safetensors import read_safetensors
from weightfs.core.tar import walk_tar
from weightfs.core.tensors import HeaderError, NeedMore
from weightfs.engine import wire
from weightfs.errors import ChunkListError, IntegrityError, RefError, SignatureError, SourceError
from weightfs.sources import _docker_config, _rules
from weightfs.sources._challenges import parse_challenges
from weightfs.sources._xml import parse_xml
from weightfs.sources.minisign import parse_public_key, verify
from weightfs.testing.fake_control import fake_operations

# The untrusted signature of minisign's manual has the form that the targets are told about; the key is nobody's.
_KEY = "RWQf6LRCGA9i53mlYecO4IzT51TGPpvWucNSCh1CBM0QTaLn73Y7GFO3"
_SIZE = 1 << 30
_REQUESTS = (
    ("POST", "/v1/refs"),
    ("DELETE", "/v1/refs"),
    ("POST", "/v1/update"),
    ("POST", "/v1/pin"),
    ("POST", "/v1/gc"),
    ("POST", "/v1/fill"),
    ("POST", "/v1/verify"),
)
_QUERIES = ("/v1/headers", "/v1/details", "/v1/map", "/v1/jobs/x")


def ref(data: bytes) -> None:
    """A ref as it was typed, and where it appears: never outside its tree."""
    with suppress(RefError):
        tree, name = tree_of(parse_ref(data.decode("utf-8", "surrogateescape")))
        parts = f"{tree}/{name}".removesuffix("/").split("/")
        assert not {"", ".", ".."} & set(parts), parts


def artifact(data: bytes) -> None:
    """A manifest of Ollama's or an OCI registry, and the names of its files."""
    with suppress(IntegrityError):
        found = parse_manifest(data, "M")
        if isinstance(found, Artifact):
            for files in (ollama_files, oci_files):
                with suppress(IntegrityError):
                    for file in files(found, "M"):
                        if file.path is not None:
                            check_path(file.path)


def hub_tree(data: bytes) -> None:
    """A page of the Hub's list of files, and what the cache keeps of all."""
    with suppress(ValueError):
        reader = TreeReader("ab" * 20)
        reader.add(data)
        tree = reader.tree()
        assert read_raw(tree.raw) == tree
    with suppress(ValueError):
        read_raw(data)


def metalink(data: bytes) -> None:
    """A chunk list."""
    with suppress(ChunkListError):
        read_metalink(parse_xml(data))


def content_range(data: bytes) -> None:
    """The head of an answer to a range request: status by the first byte, then header lines."""
    status = (200, 206, 206, 206, 416)[data[0] % 5] if data else 206
    pairs = [line.partition(b":")[::2] for line in data[1:].split(b"\n")]
    headers = httpx.Headers([(b"Content-Range", pairs[0][0]), *pairs[1:]])
    with suppress(SourceError):
        _rules.check_partial(status, headers, ByteSpan(5, 9), 100, '"v"', "http://h/m")
        assert status == 206
        for value in headers.get_list("content-range"):
            assert [int(number) for number in re.findall(r"\d+", value)] == [5, 8, 100]  # 0100 is 100, too


def safetensors(data: bytes) -> None:
    """The header of a safetensors file."""
    _tensors(read_safetensors, data)


def gguf(data: bytes) -> None:
    """The header of a GGUF file."""
    _tensors(read_gguf, data)


def _tensors(read: Callable[[bytes, int], Any], data: bytes) -> None:
    for size in {len(data), _SIZE}:
        with suppress(HeaderError):
            answer = read(data, size)
            if isinstance(answer, NeedMore):
                assert len(data) < answer.nbytes <= size
            else:
                assert all(tensor.span.stop <= size for tensor in answer.tensors)


def tar(data: bytes) -> None:
    """The headers of a plain tar; also with right check sums, which chance would not find."""
    mended = b"".join(_with_check_sum(data[at : at + 512]) for at in range(0, len(data), 512))
    for raw in (data, mended):
        with suppress(IntegrityError):
            _walk(raw)


def _walk(raw: bytes) -> None:
    walk = walk_tar(len(raw), "M")
    piece = None
    while True:
        try:
            span = next(walk) if piece is None else walk.send(piece)
        except StopIteration as end:
            for member in end.value.members:
                check_path(member.path)
                assert member.span.stop <= len(raw)
            return
        piece = raw[span.start : span.stop]


def _with_check_sum(block: bytes) -> bytes:
    total = sum(block) - sum(block[148:156]) + 8 * 32
    return block[:148] + b"%06o\0 " % total + block[156:]


def challenge(data: bytes) -> None:
    """A WWW-Authenticate header."""
    parse_challenges(data.decode("latin-1"))


def signature(data: bytes) -> None:
    """A minisign signature, and a key."""
    text = data.decode("utf-8", "replace")
    with suppress(SignatureError):
        verify(b"data", text, [_KEY])
        raise AssertionError("a forged signature")
    with suppress(SignatureError):
        parse_public_key(text)


def docker_config(data: bytes) -> None:
    """An entry of docker's config.json, and the answer of a helper."""
    with suppress(ValueError):
        for found in (
            _docker_config._from_auth(load_json(data)),
            _docker_config._from_helper(data, "helper"),
        ):
            if found is not None:
                found.basic.encode("ascii")


def worker_message(data: bytes) -> None:
    """A line of a fetch worker."""
    with suppress(wire.BadMessageError):
        wire.decode(data)


def control_answer(data: bytes) -> None:
    """What a daemon says to a command."""
    with suppress(ValueError):
        str(error_from_json(load_json(data)))


def control_request(data: bytes) -> None:
    """What a command says to a daemon: any body to any route, any query."""
    trio.run(_ask, data, clock=trio.testing.MockClock(autojump_threshold=0))


async def _ask(data: bytes) -> None:
    start, rest = (data[0] if data else 0), data[1:]
    async with fake_operations(Path("/nowhere")) as (_, operations):
        transport = httpx.ASGITransport(make_app(operations))
        async with httpx.AsyncClient(transport=transport, base_url="http://weightfs") as client:
            if start % 2:
                url = httpx.URL(
                    "http://weightfs" + _QUERIES[start // 2 % len(_QUERIES)],
                    query=quote_from_bytes(rest[:500], "=&%+").encode(),
                )
                request = client.build_request("GET", url)
            else:
                method, path = _REQUESTS[start // 2 % len(_REQUESTS)]
                request = client.build_request(method, path, content=rest)
            answer = await client.send(request)
    # 5xx that are said on purpose have a kind of ours; a fault of ours is a DaemonError with 500.
    assert answer.status_code != 500, answer.text
    assert isinstance(json.loads(answer.content), dict)


TARGETS: Mapping[str, Callable[[bytes], None]] = {
    one.__name__: one
    for one in (
        *(ref, artifact, hub_tree, metalink, content_range, safetensors, gguf, tar),
        *(challenge, signature, docker_config, worker_message, control_answer, control_request),
    )
}

_DIGEST = "sha256:" + "ab" * 32
_LAYER = {"mediaType": "application/vnd.ollama.image.model", "digest": _DIGEST, "size": 9}

# One good input each, to begin from.
SEEDS: Mapping[str, tuple[bytes, ...]] = {
    "ref": (
        b"https://h.example/d/m.gguf#sha256=" + b"ab" * 32,
        b"ollama://aya:8b",
        b"hf://o/n@main/*.gguf",
        b"oci://h/n@x",
    ),
    "artifact": (
        json.dumps({"schemaVersion": 2, "mediaType": "", "config": _LAYER, "layers": [_LAYER]}).encode(),
    ),
    "hub_tree": (json.dumps([{"type": "file", "path": "a/b", "size": 2, "oid": "ab" * 20}]).encode(),),
    "metalink": (
        b'<metalink xmlns="urn:ietf:params:xml:ns:metalink"><file name="m"><size>1</size>'
        b'<hash type="sha-256">' + b"ab" * 32 + b"</hash><url>http://h/m</url></file></metalink>",
    ),
    "content_range": (b'\x01bytes 5-8/100\nContent-Length:4\nETag:"v"', b"\x04bytes */100"),
    "safetensors": (
        b'\x40\0\0\0\0\0\0\0{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}' + b" " * 11 + b"1234",
    ),
    "gguf": (b"GGUF\3\0\0\0" + b"\0" * 8 + b"\1" + b"\0" * 7 + b"\1" + b"\0" * 7 + b"k\4\0\0\0\1\0\0\0",),
    "tar": (b"m" + b"\0" * 99 + b"0000644\0" * 3 + b"00000000004\0" * 2 + b" " * 8 + b"0" + b"\0" * 355,),
    "challenge": (b'Bearer realm="http://h/t",service="s", Basic realm=x',),
    "signature": (b"untrusted comment: x\n" + _KEY.encode() + b"\ntrusted comment: y\nAAAA",),
    "docker_config": (b'{"auth":"YTpi","identitytoken":"x"}', b'{"Username":"a","Secret":"b"}'),
    "worker_message": (wire.encode(wire.Alive()).rstrip(), wire.encode(wire.StopJob(1)).rstrip()),
    "control_answer": (b'{"error":"e","kind":"ReadError","failure":"disk"}',),
    "control_request": (
        b'\0{"ref":"https://h/m"}',
        b"\1ref=https://h/m&wait=1",
        b'\x0c{"refs":["x"],"repair":true}',
    ),
}
