from __future__ import annotations

from weightfs.core.manifest import Manifest
from weightfs.layouts.base import Dir, File, Inline, Layout
from weightfs.layouts.ollama import OllamaLayout
from weightfs.testing.layouts import (
    LayoutTests,
    git_blob,
    hub_manifest,
    made_up_blob,
    made_up_manifest,
    ollama_manifest,
    tree_of,
)

MODEL, CONFIG, TEMPLATE = made_up_blob("m"), made_up_blob("c", 480), made_up_blob("t", 90)
FILES = {"config.json": CONFIG, "model.gguf": MODEL, "template": TEMPLATE}


class TestOllamaLayout(LayoutTests):
    scheme = "ollama"

    def layout(self) -> Layout:
        return OllamaLayout()


def blob(name: str) -> str:
    digest = made_up_blob(name).sha256
    assert digest is not None
    return f"ollama/blobs/sha256-{digest.hex()}"


def test_the_golden_tree() -> None:
    aya = ollama_manifest("aya:8b", FILES)
    other = ollama_manifest("hf.co/Org/Name-GGUF:Q4_K_M", {"config.json": CONFIG, "model.gguf": MODEL})
    plain = made_up_manifest("https/host", {"m.gguf": "x"})
    hub = hub_manifest("org/name", "a" * 40, {"config.json": git_blob("c")})
    assert tree_of(OllamaLayout(), plain, aya, other, hub) == {
        "ollama/manifests": Dir(),
        "ollama/manifests-v2": Dir(),
        "ollama/blobs": Dir(),
        "ollama/manifests/registry.ollama.ai/library/aya/8b": Inline(aya.raw),
        "ollama/manifests/hf.co/Org/Name-GGUF/Q4_K_M": Inline(other.raw),
        blob("c"): File(CONFIG),
        blob("m"): File(MODEL),
        blob("t"): File(TEMPLATE),
    }


def test_without_models_the_directories_are_there() -> None:
    names = [path for path, item in OllamaLayout().entries(()) if item == Dir()]
    assert names == ["ollama/manifests", "ollama/manifests-v2", "ollama/blobs"]


def test_what_is_no_manifest_of_a_registry_is_not_shown() -> None:
    """A ref whose origin said nothing that could be said again would be a broken model to Ollama."""
    bare = Manifest("ollama://aya:8b", "1", "ollama/library/aya/8b", ())
    assert tree_of(OllamaLayout(), bare) == tree_of(OllamaLayout())
