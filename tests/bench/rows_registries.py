"""Rows about models by name, beside the clients that people use for them: `skopeo copy` and `hf download`.

Both sides ask the same servers and end durable. The clients check the digest of the whole; so does weightfs, and it
records one for every chunk.
"""

from __future__ import annotations

import sys
from pathlib import Path

from contenders import WEIGHTFS, empty, timed
from ground import NAME, Bench
from report import OURS, Aim, Measure

from weightfs.testing.hub import Hub
from weightfs.testing.registry import DockerRegistry, Layer, push_oci

REPOSITORY = "bench/model"


def pull_oci(bench: Bench) -> Measure:
    """An artifact of a docker-registry, whole."""
    measure = Measure(
        "pull-oci",
        "pull of an artifact from docker-registry",
        "MB/s",
        higher=True,
        aims=(Aim(">= 1.0 x skopeo", 1.0, peers=("skopeo copy",)),),
        note="whole commands; skopeo with a sync of its directory.",
    )
    with DockerRegistry() as registry:
        name = f"{registry.host}/{REPOSITORY}:latest"
        model = (bench.origin.root / NAME).read_bytes()
        push_oci(registry, f"{REPOSITORY}:latest", [Layer.titled(NAME, model)])
        del model

        def ours() -> float:
            return bench.speed(pull(f"oci://{name}", empty(bench.work / "fetched")))

        def skopeo() -> float:
            target = empty(bench.work / "fetched")
            script = 'skopeo copy -q --insecure-policy --src-tls-verify=false "docker://$0" "dir:$1" && sync "$1"/*'
            return bench.speed(timed("sh", "-c", script, name, target))

        bench.turns(measure, {OURS: ours, "skopeo copy": skopeo})
    empty(bench.work / "fetched")
    return measure


class _NginxHub(Hub):
    """A Hub whose CDN is the bench's nginx: a server in Python would be what is measured."""

    link = ""

    def link_to(self, _: object) -> str:
        return self.link


def pull_hub(bench: Bench) -> Measure:
    """A repository of a Hub, whole."""
    measure = Measure(
        "pull-hf",
        "pull of a repository from a Hub",
        "MB/s",
        higher=True,
        aims=(Aim(">= 1.0 x hf download", 1.0, peers=("hf download",)),),
        note="whole commands, from a local Hub whose CDN is nginx, without Xet; hf with a sync of its cache.",
    )
    with _NginxHub() as hub:
        hub.link = bench.origin.url(NAME)
        files = {NAME: (bench.origin.root / NAME).read_bytes(), "config.json": b'{"model_type": "llama"}'}
        hub.repo(REPOSITORY).commit(files)
        endpoint = f"HF_ENDPOINT={hub.endpoint}"

        def ours() -> float:
            return bench.speed(pull(f"hf://{REPOSITORY}", empty(bench.work / "fetched"), endpoint))

        def theirs() -> float:
            home = empty(bench.work / "fetched")
            script = '"$0" download -q "$1" >/dev/null && sync "$2"/hub/*/blobs/*'
            command: list[str | Path] = [
                "sh",
                "-c",
                script,
                Path(sys.executable).with_name("hf"),
                REPOSITORY,
                home,
            ]
            options = [endpoint, f"HF_HOME={home}", "HF_HUB_DISABLE_XET=1", "HF_HUB_DISABLE_TELEMETRY=1"]
            return bench.speed(timed("env", *options, *command))

        bench.turns(measure, {OURS: ours, "hf download": theirs})
    empty(bench.work / "fetched")
    return measure


def pull(ref: str, cache: Path, *variables: str) -> float:
    """Download, verify and make durable; seconds."""
    return timed("env", *variables, WEIGHTFS, "pull", ref, "--cache", cache)
