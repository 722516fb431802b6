"""A real container registry on loopback: Debian's `docker-registry`, with what stands around one in life.

    with DockerRegistry() as registry:                                  # anonymous
        digest = push_ollama(registry, "library/tiny:latest", {"model": gguf, "template": b"{{ .Prompt }}"})
        parse_ref(f"ollama://{registry.host}/library/tiny:latest")

    with DockerRegistry(auth=Auth.TOKEN, accounts={"ann": "secret"}) as registry:   # a token server, too
    with DockerRegistry(tls=True) as registry:                                      # registry.ca_file
    with DockerRegistry() as registry, BlobFront(registry) as front:  # weightfs.testing.blob_front

Everything is plain and synchronous, as in `weightfs.testing.nginx`, and gone when the context ends.
"""

from __future__ import annotations

import base64
import contextlib
import enum
import hashlib
import http.client
import json
import shutil
import ssl
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit

from weightfs.core.artifact import DOCKER_MANIFEST, OCI_INDEX, OCI_MANIFEST, TITLE
from weightfs.testing.nginx import POLL_SECONDS, START_ATTEMPTS, START_SECONDS, free_port
from weightfs.testing.tls import TlsFiles, make_tls
from weightfs.testing.token_server import ISSUER, SERVICE, TokenServer

BASIC_USER, BASIC_PASSWORD = "ann", "correct horse"
# bcrypt, which Python's library cannot make any more.
_BASIC_HASH = "$2b$05$sIRQqa/A8GcevonKl.vYxOiF3G9t1kzdFzBD3sdCl8DQoUyQ4Ph2S"

OLLAMA = "application/vnd.ollama.image."
DOCKER_CONFIG = "application/vnd.docker.container.image.v1+json"


class Auth(enum.Enum):
    """How a registry knows its users."""

    NONE = enum.auto()
    TOKEN = enum.auto()
    BASIC = enum.auto()  # BASIC_USER with BASIC_PASSWORD


class DockerRegistry:
    """A docker-registry with its files in a temporary directory.

    Args:
        auth: none, tokens of a `TokenServer`, or Basic.
        accounts: user → password of the token server.
        tls: https with a certificate of a private CA.
    """

    def __init__(
        self, *, auth: Auth = Auth.NONE, accounts: Mapping[str, str] | None = None, tls: bool = False
    ) -> None:
        self.auth = auth
        self._accounts = accounts or {}
        self._with_tls = tls
        self._home: Path | None = None
        self._tls: TlsFiles | None = None
        self._tokens: TokenServer | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self.port = 0

    def __enter__(self) -> Self:
        executable = shutil.which("docker-registry")
        if executable is None:
            raise FileNotFoundError(
                "docker-registry is not installed; on Debian: apt-get install docker-registry"
            )
        self._home = Path(tempfile.mkdtemp(prefix="weightfs-registry-"))
        self._home.chmod(0o755)  # nginx may serve the blobs as another user
        try:
            self._tls = make_tls(self._home / "tls")
            if self.auth is Auth.TOKEN:
                self._tokens = TokenServer(self._tls, self._accounts)
            for _ in range(START_ATTEMPTS):
                if self._start(executable):
                    return self
            raise RuntimeError(f"docker-registry did not start: {self._log()}")
        except BaseException:
            self.stop()
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """End it and remove its files. Doing it twice does nothing."""
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(10)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process = None
        if self._tokens is not None:
            self._tokens.stop()
            self._tokens = None
        if self._home is not None:
            shutil.rmtree(self._home, ignore_errors=True)
            self._home = None

    @property
    def host(self) -> str:
        """As refs name it. A registry with TLS also has to be in `FetchSettings.endpoints`: see `endpoints`."""
        return f"127.0.0.1:{self.port}"

    @property
    def base(self) -> str:
        """The URL of its API."""
        return f"{'https' if self._with_tls else 'http'}://{self.host}"

    @property
    def endpoints(self) -> tuple[tuple[str, str], ...]:
        """For `FetchSettings.endpoints`."""
        return ((self.host, self.base),)

    @property
    def ca_file(self) -> Path:
        """The CA of its certificate (PEM)."""
        assert self._tls is not None
        return self._tls.ca

    @property
    def tokens(self) -> TokenServer:
        """The token server."""
        assert self._tokens is not None
        return self._tokens

    def blob_path(self, digest: str) -> Path:
        """Where the registry keeps a blob: the file can be damaged there."""
        hexes = digest.removeprefix("sha256:")
        return self._path("data") / "docker/registry/v2/blobs/sha256" / hexes[:2] / hexes / "data"

    def requests(self) -> list[str]:
        """`METHOD target STATUS` of what it answered so far."""
        lines = self._log().splitlines()
        heads = (line.split('"') for line in lines if " HTTP/1.1" in line and line.count('"') >= 4)
        return [f"{parts[1].removesuffix(' HTTP/1.1')} {parts[2].split()[0]}" for parts in heads]

    def ask(
        self, method: str, target: str, body: bytes = b"", headers: Mapping[str, str] | None = None
    ) -> http.client.HTTPResponse:
        """One request by somebody who may do everything; the response has been read. RuntimeError above 399."""
        connection: http.client.HTTPConnection
        if self._with_tls:
            context = ssl.create_default_context(cafile=str(self.ca_file))
            connection = http.client.HTTPSConnection("127.0.0.1", self.port, timeout=30, context=context)
        else:
            connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        with contextlib.closing(connection):
            connection.request(method, target, body, {**self._authorization(target), **(headers or {})})
            response = connection.getresponse()
            answer = response.read()
        if response.status >= 400:
            raise RuntimeError(f"{method} {target}: {response.status} {answer[:500]!r}")
        return response

    def _authorization(self, target: str) -> dict[str, str]:
        match self.auth:
            case Auth.NONE:
                return {}
            case Auth.BASIC:
                text = base64.b64encode(f"{BASIC_USER}:{BASIC_PASSWORD}".encode()).decode()
                return {"Authorization": f"Basic {text}"}
            case Auth.TOKEN:
                name = target.removeprefix("/v2/").split("/blobs/")[0].split("/manifests/")[0]
                return {"Authorization": f"Bearer {self.tokens.issue([f'repository:{name}:pull,push'])}"}

    def _start(self, executable: str) -> bool:
        self.port = free_port()
        config = self._path("config.yml")
        config.write_text(json.dumps(self._config()))  # YAML has JSON in it
        with self._path("log").open("wb") as log:
            self._process = subprocess.Popen(  # noqa: S603  fixed arguments, no shell
                [executable, "serve", str(config)], stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline and self._process.poll() is None:
            if self._answers():
                return self._process.poll() is None
            time.sleep(POLL_SECONDS)
        self._process.kill()
        self._process.wait()
        self._process = None
        return False

    def _answers(self) -> bool:
        try:
            self.ask("GET", "/v2/")
        except OSError:
            return False
        except RuntimeError:
            pass  # it answers, if only that it wants another token
        return True

    def _config(self) -> dict[str, Any]:
        assert self._tls is not None
        config: dict[str, Any] = {
            "version": 0.1,
            "log": {"level": "error"},
            "storage": {"filesystem": {"rootdirectory": str(self._path("data"))}},
            "http": {"addr": self.host, "secret": "not secret"},
        }
        if self._with_tls:
            config["http"]["tls"] = {"certificate": str(self._tls.certificate), "key": str(self._tls.key)}
        if self.auth is Auth.BASIC:
            self._path("users").write_text(f"{BASIC_USER}:{_BASIC_HASH}\n")
            config["auth"] = {"htpasswd": {"realm": SERVICE, "path": str(self._path("users"))}}
        if self.auth is Auth.TOKEN:
            config["auth"] = {
                "token": {
                    "realm": self.tokens.realm,
                    "service": SERVICE,
                    "issuer": ISSUER,
                    "rootcertbundle": str(self._tls.ca),
                }
            }
        return config

    def _path(self, name: str) -> Path:
        assert self._home is not None, "docker-registry runs only inside its context"
        return self._home / name

    def _log(self) -> str:
        log = self._path("log")
        return log.read_text(errors="replace") if log.exists() else ""


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer to push: its bytes, media type, annotations, and other fields of its descriptor."""

    data: bytes
    media_type: str
    annotations: Mapping[str, str] = field(default_factory=dict)
    more: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def titled(cls, path: str, data: bytes, media_type: str = "application/octet-stream") -> Layer:
        """A file, as `oras push` makes of it."""
        return cls(data, media_type, {TITLE: path})


def push_blob(registry: DockerRegistry, repository: str, data: bytes) -> str:
    """Upload a blob in the two steps of the distribution specification; its digest, `sha256:<hex>`."""
    digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
    started = registry.ask("POST", f"/v2/{repository}/blobs/uploads/")
    parts = urlsplit(started.getheader("Location") or "")
    target = f"{parts.path}?{parts.query}&digest={digest}"
    registry.ask("PUT", target, data, {"Content-Type": "application/octet-stream"})
    return digest


def push_manifest(registry: DockerRegistry, name: str, document: Mapping[str, Any]) -> str:
    """Upload a manifest or index under `repository:tag` (or `repository`, by its digest only); its digest."""
    repository, _, tag = name.partition(":")
    raw = json.dumps(document, separators=(",", ":")).encode()
    digest = f"sha256:{hashlib.sha256(raw).hexdigest()}"
    target = f"/v2/{repository}/manifests/{tag or digest}"
    registry.ask("PUT", target, raw, {"Content-Type": str(document["mediaType"])})
    return digest


def push_ollama(registry: DockerRegistry, name: str, parts: Mapping[str, bytes] | Sequence[Layer]) -> str:
    """Upload a model as Ollama does, under `namespace/model:tag`; the digest of its manifest.

    `parts` is a mapping from the kind of a layer (`model`, `template`, …) to its bytes, or layers where that cannot
    say it.
    """
    layers = parts
    if isinstance(layers, Mapping):
        layers = [Layer(data, OLLAMA + kind) for kind, data in layers.items()]
    config = Layer(b'{"model_format":"gguf","model_family":"llama"}', DOCKER_CONFIG)
    return push_manifest(registry, name, _manifest(registry, name, DOCKER_MANIFEST, config, layers))


def push_oci(
    registry: DockerRegistry,
    name: str,
    layers: Sequence[Layer],
    *,
    artifact_type: str = "application/vnd.cncf.model.manifest.v1+json",
    config_type: str = "application/vnd.oci.empty.v1+json",
) -> str:
    """Upload an OCI artifact under `repository:tag`; the digest of its manifest."""
    manifest = _manifest(registry, name, OCI_MANIFEST, Layer(b"{}", config_type), layers)
    if artifact_type:
        manifest["artifactType"] = artifact_type
    return push_manifest(registry, name, manifest)


def push_index(registry: DockerRegistry, name: str, manifests: Sequence[Mapping[str, Any]]) -> str:
    """Upload an index of manifests that are there, each given as its descriptor (`mediaType` may be left out)."""
    listed = [{"mediaType": OCI_MANIFEST, "size": 1, **item} for item in manifests]
    return push_manifest(registry, name, {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": listed})


def write_docker_config(path: Path, host: str, user: str, password: str) -> Path:
    """A config.json as `docker login` writes it without a helper."""
    auth = base64.b64encode(f"{user}:{password}".encode()).decode()
    path.touch(mode=0o600)
    path.write_text(json.dumps({"auths": {host: {"auth": auth}}}))
    return path


def _manifest(
    registry: DockerRegistry, name: str, kind: str, config: Layer, layers: Sequence[Layer]
) -> dict[str, Any]:
    repository = name.partition(":")[0]

    def descriptor(layer: Layer) -> dict[str, Any]:
        digest = push_blob(registry, repository, layer.data)
        fields: dict[str, Any] = {"mediaType": layer.media_type, "digest": digest, "size": len(layer.data)}
        if layer.annotations:
            fields["annotations"] = dict(layer.annotations)
        return {**fields, **layer.more}

    return {
        "schemaVersion": 2,
        "mediaType": kind,
        "config": descriptor(config),
        "layers": [descriptor(layer) for layer in layers],
    }
