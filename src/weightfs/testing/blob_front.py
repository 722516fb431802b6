"""nginx before a registry, with blobs at signed URLs of another origin that end: what big registries do."""

from __future__ import annotations

import hashlib
import http.server
import secrets
import time
from types import TracebackType
from typing import Self

from weightfs.testing.nginx import Nginx
from weightfs.testing.registry import DockerRegistry
from weightfs.testing.token_server import Request, b64url, reply, serve, stop_server


class BlobFront:
    """A registry whose blobs are answered with a redirect to signed URLs.

    The signed place answers 400 to a request with credentials, as S3 does, 403 to a wrong signature and 410 after the
    end (`secure_link`). `signed` counts the redirects; `lifetime` is in seconds. The URLs do not tell their end in a
    way that clients know.
    """

    def __init__(self, registry: DockerRegistry) -> None:
        self._registry = registry
        self._secret = secrets.token_hex(16)
        self.lifetime = 3600
        self.signed = 0
        self._signer: http.server.ThreadingHTTPServer | None = None
        self._nginx: Nginx | None = None

    def __enter__(self) -> Self:
        assert not self._registry.base.startswith("https"), "the front speaks plain http to the registry"
        self._signer = serve(self._sign)
        blobs = self._registry.blob_path("00").parents[2]
        blobs.mkdir(parents=True, exist_ok=True)
        config = f"""
        absolute_redirect off;
        proxy_http_version 1.1;
        client_max_body_size 0;
        location ~ ^/v2/.+/blobs/sha256:[0-9a-f]+$ {{
            auth_request /may;
            proxy_pass http://127.0.0.1:{self._signer.server_port};
        }}
        location = /may {{
            internal;
            proxy_method HEAD;
            proxy_pass_request_body off;
            proxy_set_header Content-Length "";
            proxy_set_header Range "";
            proxy_pass {self._registry.base}$request_uri;
        }}
        location /v2/ {{ proxy_pass {self._registry.base}; }}
        location ~ ^/signed/([0-9a-f][0-9a-f])([0-9a-f]+)$ {{
            if ($http_authorization) {{ return 400; }}
            secure_link $arg_md5,$arg_until;
            secure_link_md5 "$secure_link_expires$uri {self._secret}";
            if ($secure_link = "") {{ return 403; }}
            if ($secure_link = "0") {{ return 410; }}
            alias {blobs}/$1/$1$2/data;
        }}
        """
        try:
            self._nginx = Nginx(blobs, server_config=config).__enter__()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """End both servers."""
        if self._nginx is not None:
            self._nginx.stop()
        if self._signer is not None:
            stop_server(self._signer)
        self._nginx = self._signer = None

    @property
    def nginx(self) -> Nginx:
        """Its log has every request."""
        assert self._nginx is not None
        return self._nginx

    @property
    def host(self) -> str:
        """As refs name it."""
        return f"127.0.0.1:{self.nginx.port}"

    def signed_url(self, digest: str) -> str:
        """A URL that ends `lifetime` seconds from now."""
        path = f"/signed/{digest.removeprefix('sha256:')}"
        until = int(time.time()) + self.lifetime
        proof = hashlib.md5(f"{until}{path} {self._secret}".encode(), usedforsecurity=False).digest()
        return f"http://localhost:{self.nginx.port}{path}?md5={b64url(proof)}&until={until}"

    def _sign(self, request: Request) -> None:
        self.signed += 1
        location = self.signed_url(request.path.rpartition("/blobs/")[2])
        reply(request, 307, b"", {"Location": location})
