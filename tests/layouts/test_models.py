from __future__ import annotations

from weightfs.layouts.base import Dir, File, Layout
from weightfs.layouts.models import ModelsLayout
from weightfs.testing.layouts import LayoutTests, made_up_blob, made_up_manifest


class TestModelsLayout(LayoutTests):
    def layout(self) -> Layout:
        return ModelsLayout()


def test_the_golden_tree() -> None:
    manifests = (
        made_up_manifest("https/host:8000/dir", {"m.gguf": "m"}),
        made_up_manifest("hf/org/name/main", {"config.json": "c", "sub/model-00001.safetensors": "s"}),
    )
    assert dict(ModelsLayout().entries(manifests)) == {
        "models": Dir(),
        "models/https/host:8000/dir/m.gguf": File(made_up_blob("m")),
        "models/hf/org/name/main/config.json": File(made_up_blob("c")),
        "models/hf/org/name/main/sub/model-00001.safetensors": File(made_up_blob("s")),
    }


def test_without_manifests_there_is_the_directory_alone() -> None:
    assert list(ModelsLayout().entries(())) == [("models", Dir())]
