"""A private nginx on loopback: its own configuration, process and ports, gone when the context ends.

Plain and synchronous, so that scripts, fixtures and benchmarks can use it alike::

    with Nginx(directory_to_serve) as nginx:
        print(nginx.url("model.gguf"), nginx.https_url("model.gguf"), nginx.ca_file)
        print(nginx.bytes_sent("model.gguf"), nginx.ranges("model.gguf"))
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self
from urllib.parse import quote

from weightfs.testing.tls import TlsFiles, make_tls

START_ATTEMPTS = 5  # another process may take a port between our finding it and nginx binding it
START_SECONDS = 10.0
POLL_SECONDS = 0.01

_CONFIG = """\
daemon off;
{user}
worker_processes {workers};
pid {home}/nginx.pid;
error_log {home}/error.log warn;
events {{ worker_connections 1024; }}
http {{
  client_body_temp_path {home}/body;
  proxy_temp_path {home}/proxy;
  fastcgi_temp_path {home}/fastcgi;
  uwsgi_temp_path {home}/uwsgi;
  scgi_temp_path {home}/scgi;
  types {{ text/html html; application/metalink4+xml meta4; }}
  default_type application/octet-stream;
  log_format requests escape=json '{{"method":"$request_method","path":"$uri","status":$status,'
    '"sent":$body_bytes_sent,"range":"$http_range","scheme":"$scheme","user_agent":"$http_user_agent"}}';
  access_log {home}/access.log requests;
  sendfile on;
  tcp_nopush on;
  keepalive_requests 100000;
  server {{
    listen 127.0.0.1:{port};
    listen 127.0.0.1:{tls_port} ssl;
    ssl_certificate {certificate};
    ssl_certificate_key {key};
    ssl_session_cache shared:SSL:1m;
    root {root};
    {limit_rate}
    {server_config}
  }}
}}
"""


@dataclass(frozen=True, slots=True)
class LoggedRequest:
    """One line of the access log. `sent` counts body bytes; `range` is the request's Range header or ''."""

    method: str
    path: str
    status: int
    sent: int
    range: str
    scheme: str
    user_agent: str


def free_port() -> int:
    """A loopback TCP port that was free a moment ago."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    assert isinstance(port, int)
    return port


class Nginx:
    """Serves the files below `root` over http and https, with ranges, strong ETags and Last-Modified.

    Args:
        root: the directory to serve.
        limit_rate: bytes per second and connection, e.g. `"4m"`; None is unlimited.
        workers: nginx worker processes.
        server_config: extra directives for the server block, e.g. `"max_ranges 0;"` (no ranges at all)
            or `"location /old/ { return 302 /new/; }"`.
        tls: certificate files; by default a private CA is made for localhost and 127.0.0.1.
    """

    def __init__(
        self,
        root: Path,
        *,
        limit_rate: str | None = None,
        workers: int = 1,
        server_config: str = "",
        tls: TlsFiles | None = None,
    ) -> None:
        self.root = root.resolve()
        self._limit_rate = f"limit_rate {limit_rate};" if limit_rate else ""
        self._workers = workers
        self._server_config = server_config
        self._tls = tls
        self._home: Path | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self.port = 0
        self.tls_port = 0

    def __enter__(self) -> Self:
        executable = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin:/sbin:/usr/local/sbin")
        if executable is None:
            raise FileNotFoundError("nginx is not installed; on Debian: apt-get install nginx-light")
        self._home = Path(tempfile.mkdtemp(prefix="weightfs-nginx-"))
        self._home.chmod(0o755)
        try:
            if self._tls is None:
                self._tls = make_tls(self._home / "tls")
            for _ in range(START_ATTEMPTS):
                if self._start(executable):
                    return self
            raise RuntimeError(f"nginx did not start: {self._error_log()}")
        except BaseException:
            self.stop()
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """End nginx and remove its files. Doing it twice does nothing."""
        self._kill()
        if self._home is not None:
            shutil.rmtree(self._home, ignore_errors=True)
            self._home = None

    def pause(self) -> None:
        """Stop serving at once, as a machine that goes away; connections are refused until `resume`."""
        self._kill()

    def resume(self) -> None:
        """Serve again, on the same ports."""
        executable = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin:/sbin:/usr/local/sbin")
        assert executable is not None
        if not self._launch(executable):
            raise RuntimeError(f"nginx did not start again: {self._error_log()}")

    @property
    def worker_pids(self) -> tuple[int, ...]:
        """Process ids of its own workers: who kills one kills no other nginx's. The master starts another."""
        assert self._process is not None
        master = self._process.pid
        return tuple(map(int, Path(f"/proc/{master}/task/{master}/children").read_text().split()))

    @property
    def ca_file(self) -> Path:
        """The CA that signed the https certificate (PEM)."""
        assert self._tls is not None
        return self._tls.ca

    def url(self, path: str) -> str:
        """The http URL of a file below the root."""
        return f"http://127.0.0.1:{self.port}/{quote(path.lstrip('/'))}"

    def https_url(self, path: str) -> str:
        """The https URL of a file below the root."""
        return f"https://127.0.0.1:{self.tls_port}/{quote(path.lstrip('/'))}"

    def requests(self) -> list[LoggedRequest]:
        """Everything served so far. nginx logs just after the last byte: see `wait_for_requests`."""
        log = self._path("access.log")
        if not log.exists():
            return []
        lines = log.read_text().splitlines()
        return [LoggedRequest(**json.loads(line)) for line in lines if line.endswith("}")]

    def wait_for_requests(self, count: int, seconds: float = 5.0) -> list[LoggedRequest]:
        """The requests, once there are at least `count`. TimeoutError after `seconds`."""
        deadline = time.monotonic() + seconds
        while len(seen := self.requests()) < count:
            if time.monotonic() > deadline:
                raise TimeoutError(f"nginx logged {len(seen)} requests, not {count}")
            time.sleep(POLL_SECONDS)
        return seen

    def bytes_sent(self, path: str | None = None) -> int:
        """Body bytes sent of one file, or of all."""
        return sum(request.sent for request in self.requests() if path is None or _same(request.path, path))

    def ranges(self, path: str) -> list[str]:
        """The Range headers of the GETs of a file, in order of their completion; '' where there was none."""
        return [r.range for r in self.requests() if r.method == "GET" and _same(r.path, path)]

    def forget_requests(self) -> None:
        """Empty the access log (nginx appends, so it goes on at the start)."""
        os.truncate(self._path("access.log"), 0)

    def _start(self, executable: str) -> bool:
        self.port, self.tls_port = free_port(), free_port()
        return self._launch(executable)

    def _launch(self, executable: str) -> bool:
        assert self._tls is not None
        home = self._path("")
        config = _CONFIG.format(
            user="user root;" if os.geteuid() == 0 else "",
            workers=self._workers,
            home=home,
            port=self.port,
            tls_port=self.tls_port,
            certificate=self._tls.certificate,
            key=self._tls.key,
            root=self.root,
            limit_rate=self._limit_rate,
            server_config=self._server_config,
        )
        (home / "nginx.conf").write_text(config)
        command = [executable, "-p", str(home), "-e", str(home / "error.log"), "-c", str(home / "nginx.conf")]
        self._process = subprocess.Popen(  # noqa: S603  fixed arguments, no shell
            command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline and self._process.poll() is None:
            # Another process may have taken one port: ours must be listening on both, and alive after that.
            if _listens(self.port) and _listens(self.tls_port) and (home / "nginx.pid").exists():
                return self._process.poll() is None
            time.sleep(POLL_SECONDS)
        self._kill()
        return False

    def _kill(self) -> None:
        if self._process is None:
            return
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None

    def _path(self, name: str) -> Path:
        assert self._home is not None, "nginx runs only inside its context"
        return self._home / name

    def _error_log(self) -> str:
        log = self._path("error.log")
        return log.read_text()[-2000:] if log.exists() else "no error log"


def _listens(port: int) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=1):
            return True
    except OSError:
        return False


def _same(logged: str, path: str) -> bool:
    return logged.lstrip("/") == path.lstrip("/")
