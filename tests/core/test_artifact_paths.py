"""Which file each layer becomes, by the conventions of those who publish models in registries."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weightfs.core.artifact import TITLE, Artifact, Descriptor
from weightfs.core.artifact_paths import Packing, Paths, oci_files, ollama_files, packing
from weightfs.core.manifest import check_path
from weightfs.errors import IntegrityError

OLLAMA = "application/vnd.ollama.image."
DOCKER = "application/vnd.docker.ai."
CNCF = "application/vnd.cncf.model."
TAR = "application/vnd.oci.image.layer.v1.tar"
FILEPATH = "org.cncf.model.filepath"
CONFIG = Descriptor("application/vnd.docker.container.image.v1+json", bytes(32), 2)


def layer(kind: str, path: str = "", *, key: str = FILEPATH, name: str = "", **more: str) -> Descriptor:
    annotations = {**({key: path} if path else {}), **more}
    return Descriptor(kind, bytes(32), 2, annotations, "", name)


def ollama(*layers: Descriptor) -> list[str | None]:
    return [file.path for file in ollama_files(Artifact("", CONFIG, layers), "M")]


def oci(*layers: Descriptor) -> list[str | None]:
    return [file.path for file in oci_files(Artifact("", CONFIG, layers), "M")]


def test_every_kind_of_ollama_has_its_name() -> None:
    kinds = [
        "model",
        "projector",
        "adapter",
        "template",
        "prompt",
        "system",
        "params",
        "messages",
        "license",
        "license",
    ]
    assert ollama(*(layer(OLLAMA + kind) for kind in kinds)) == [
        "model.gguf", "projector.gguf", "adapter.gguf", "template", "prompt", "system", "params.json", "messages.json",
        "license", "license-2", "config.json",
    ]  # fmt: skip


def test_further_ones_of_a_kind_are_numbered_before_the_ending() -> None:
    kinds = ["model", "model", "params", "params", "params"]
    assert ollama(*(layer(OLLAMA + kind) for kind in kinds)) == [
        "model.gguf", "model-2.gguf", "params.json", "params-2.json", "params-3.json", "config.json",
    ]  # fmt: skip


def test_named_layers_of_ollama_keep_their_names_and_the_config_gives_way() -> None:
    layers = [
        layer(OLLAMA + "template"),
        layer(OLLAMA + "tensor", name="model.embed_tokens.weight"),
        layer(OLLAMA + "json", name="config.json"),
        layer(OLLAMA + "json", name="vision/preprocessor.json"),
        layer(OLLAMA + "json", name="template"),
        layer(OLLAMA + "json"),
    ]
    assert ollama(*layers) == [
        "template-2", "model.embed_tokens.weight", "config.json", "vision/preprocessor.json", "template", "json",
        "config-2.json",
    ]  # fmt: skip


def test_unknown_kinds_of_ollama_have_a_safe_name() -> None:
    kinds = [OLLAMA + "embed", OLLAMA + "../..", "application/x-thing", OLLAMA + "...", OLLAMA + "x-2", OLLAMA + "x",
             OLLAMA + "x", OLLAMA + "k" * 300]  # fmt: skip
    assert ollama(*(layer(kind) for kind in kinds)) == [
        "embed", "layer", "application-x-thing", "layer-2", "x-2", "x", "x-3", "k" * 80, "config.json",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "name", ["../x", "/etc/passwd", "a//b", "a/./b", "a\x00b", "a\n", "x" * 256, "\ud800", "x/" * 600]
)
def test_paths_that_cannot_be_are_refused(name: str) -> None:
    with pytest.raises(IntegrityError, match="which is refused"):
        ollama(layer(OLLAMA + "tensor", name=name))
    with pytest.raises(IntegrityError, match="which is refused"):
        oci(layer("x/y", name))


@pytest.mark.parametrize("names", [["a", "a"], ["a", "a/b"], ["a/b", "a"], ["a/b/c", "a/b"]])
def test_paths_in_the_way_of_one_another_are_refused(names: list[str]) -> None:
    with pytest.raises(IntegrityError, match="twice, or as a file and a folder"):
        oci(*(layer("x/y", name) for name in names))
    with pytest.raises(IntegrityError, match="twice, or as a file and a folder"):
        ollama(*(layer(OLLAMA + "json", name=name) for name in names))


def test_annotations_name_the_files_of_oci() -> None:
    assert oci(
        layer(CNCF + "weight.v1.raw", "w/model.safetensors"),
        layer("application/vnd.cnai.model.doc.v1.raw", "README.md", key="org.cnai.model.filepath"),
        layer("text/plain", "notes.txt", key=TITLE),
        layer("application/vnd.oci.empty.v1+json"),
    ) == ["w/model.safetensors", "README.md", "notes.txt"]


def test_docker_model_runner() -> None:
    assert oci(
        layer(DOCKER + "gguf.v3"),
        layer(DOCKER + "mmproj"),
        layer(DOCKER + "license"),
        layer(DOCKER + "license"),
        layer(DOCKER + "chat.template.jinja"),
        layer(DOCKER + "model.file", "extra/tokenizer.json"),
    ) == ["model.gguf", "mmproj.gguf", "license", "license-2", "chat_template.jinja", "extra/tokenizer.json"]


def test_what_ollama_made_keeps_its_names_in_any_registry() -> None:
    layers = [layer(OLLAMA + "model"), layer(OLLAMA + "tensor", name="a/b")]
    assert oci(*layers) == ollama(*layers) == ["model.gguf", "a/b", "config.json"]


def test_shards_are_numbered_as_their_readers_expect() -> None:
    assert oci(layer(DOCKER + "safetensors")) == ["model.safetensors"]
    named = layer(DOCKER + "safetensors", "draft.safetensors")
    assert oci(layer(DOCKER + "safetensors"), named, layer(DOCKER + "safetensors")) == [
        "model-00001-of-00002.safetensors", "draft.safetensors", "model-00002-of-00002.safetensors",
    ]  # fmt: skip
    assert oci(*[layer(DOCKER + "gguf.v3")] * 2) == ["model-00001-of-00002.gguf", "model-00002-of-00002.gguf"]


def test_what_nobody_names_is_named_by_its_type() -> None:
    assert oci(layer(CNCF + "weight.config.v1.raw"), layer("application/vnd.cnai.model.doc.v1.raw"), layer("a/b")) == [
        "weight.config", "doc", "a-b",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "kind",
    [
        TAR + "+gzip", TAR + "+zstd", "application/vnd.docker.image.rootfs.diff.tar.gzip", CNCF + "weight.v1.tar+gzip",
        "application/x-tar.gz", "application/vnd.cncf.helm.chart.content.v1.tar+gzip", "application/x-tgz",
        "application/gzip", TAR.upper().lower() + "+GZIP",
    ],
)  # fmt: skip
def test_compressed_layers_are_refused_with_the_way_out(kind: str) -> None:
    with pytest.raises(IntegrityError, match=r"compressed layer sha256:0+ \(.*\.raw.*plain \.tar"):
        oci(layer(kind, "x"))


@pytest.mark.parametrize(
    ("one", "expected"),
    [
        (layer(TAR), Packing.TAR),
        (layer("application/vnd.docker.image.rootfs.diff.tar"), Packing.TAR),
        (layer("application/x-tar"), Packing.TAR),
        (layer(CNCF + "weight.v1.tar", "w"), Packing.TAR),
        (layer(DOCKER + "dir.tar"), Packing.TAR),
        (layer(TAR, "m.gguf", key=TITLE), Packing.RAW),  # oras pushes single files so
        (layer(TAR, "dir", key=TITLE, **{"io.deis.oras.content.unpack": "true"}), Packing.TAR),
        (layer("application/vnd.star"), Packing.RAW),
        (layer(DOCKER + "gguf.v3"), Packing.RAW),
    ],
)
def test_how_layers_hold_their_files(one: Descriptor, expected: Packing) -> None:
    assert packing(one) is expected
    assert (oci(one) == [None]) is (expected is Packing.TAR)


NAMES = st.text(max_size=12) | st.sampled_from(["a", "a/b", "a-2", "..", "config.json", "x" * 300])
LAYERS = st.builds(
    lambda kind, path, name: layer(kind, path, name=name),
    st.sampled_from(
        [
            OLLAMA + "tensor",
            OLLAMA + "model",
            OLLAMA + "a",
            OLLAMA + "a-2",
            DOCKER + "safetensors",
            "x/y",
            TAR,
        ]
    ),
    NAMES,
    NAMES,
)


@given(st.lists(LAYERS, max_size=6))
def test_paths_are_safe_and_apart_or_refused(layers: list[Descriptor]) -> None:
    for files in (ollama, oci):
        try:
            paths = [path for path in files(*layers) if path is not None]
        except IntegrityError:
            continue
        again = Paths("M")
        for path in paths:
            again.take(check_path(path))
