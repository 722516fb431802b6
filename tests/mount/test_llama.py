"""llama.cpp on the cold mount: in each of its ways to read, the tokens of the local file."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from weightfs.testing.daemon import Daemon
from weightfs.testing.models import ModelShape, make_gguf
from weightfs.testing.mounts import can_mount
from weightfs.testing.nginx import Nginx

pytest.importorskip("xllamacpp", reason="llama.cpp comes with the development environment")

pytestmark = [
    pytest.mark.mount,
    pytest.mark.nginx,
    pytest.mark.llama,
    pytest.mark.skipif(not can_mount(), reason="needs /dev/fuse and CAP_SYS_ADMIN"),
]

MODES = ("MMAP", "NONE", "DIRECT_IO")
SEEDS = (0, 3, 2)  # with 1 the model's first token ends its text
SHAPES = {
    mode: ModelShape(dim=256, layers=2, ff=512, seed=seed) for seed, mode in zip(SEEDS, MODES, strict=True)
}  # 6 MB
SECONDS = 90.0  # a hang becomes a failure

# llama.cpp writes to descriptor 1 as well: the answer goes to a copy of it.
GENERATE = """
import json, os, sys
import xllamacpp
answer = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
path, mode = sys.argv[1:]
params = xllamacpp.CommonParams()
params.model.path = path
params.n_predict, params.n_ctx, params.n_parallel = 16, 128, 1
params.warmup, params.fit_params, params.port = False, False, 0
params.cpuparams.n_threads = 1
params.load_mode = getattr(xllamacpp.llama_load_mode, "LLAMA_LOAD_MODE_" + mode)
pieces = []
def on_piece(piece):
    pieces.append(piece["choices"][0]["text"])
    return False
question = {"prompt": "hello", "max_tokens": 16, "temperature": 0, "seed": 1, "stream": True}
xllamacpp.Server(params).handle_completions(question, on_piece)
print(json.dumps(pieces), file=answer, flush=True)
os._exit(0)
"""


@dataclass(frozen=True)
class Stage:
    """A model for each mode: every one is cold."""

    directory: Path
    nginx: Nginx
    daemon: Daemon

    def url(self, mode: str) -> str:
        return self.nginx.url(f"{mode}.gguf")


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    directory = tmp_path_factory.mktemp("origin")
    for mode, shape in SHAPES.items():
        make_gguf(directory / f"{mode}.gguf", shape)
    with Nginx(directory) as nginx:
        refs = [nginx.url(f"{mode}.gguf") for mode in MODES]
        options = ["--fill", "never", "--workers", "1"]
        with Daemon(tmp_path_factory.mktemp("daemon"), *refs, options=options) as daemon:
            yield Stage(directory, nginx, daemon.start())


def generate(daemon: Daemon, path: Path, mode: str) -> subprocess.Popen[str]:
    return daemon.command([sys.executable, "-c", GENERATE, str(path), mode])


@pytest.mark.timeout(2 * SECONDS)
@pytest.mark.parametrize("mode", MODES)
def test_the_cold_mount_gives_the_tokens_of_the_local_file(stage: Stage, mode: str) -> None:
    cold, local = stage.daemon.path(stage.url(mode)), stage.directory / f"{mode}.gguf"
    size = local.stat().st_size
    assert size > 4 << 20, "several chunks"
    stage.nginx.forget_requests()
    told = [json.loads(stage.daemon.finish(generate(stage.daemon, path, mode))) for path in (cold, local)]
    assert told[0] == told[1]
    assert len(told[0]) >= 8
    stage.daemon.quiet(stage.url(mode))
    assert stage.nginx.bytes_sent(f"{mode}.gguf") <= size
    assert stage.nginx.bytes_sent(f"{mode}.gguf") > size // 2
