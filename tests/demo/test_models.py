from __future__ import annotations

import hashlib
from pathlib import Path

import gguf
import numpy as np
from safetensors import safe_open

from weightfs.testing.models import ModelShape, layer_names, make_gguf, make_safetensors, tensors_of

SHAPE = ModelShape(half=True)


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_both_files_hold_the_same_tensors(tmp_path: Path) -> None:
    make_gguf(tmp_path / "m.gguf", SHAPE)
    make_safetensors(tmp_path / "m.safetensors", SHAPE)
    stored = {tensor.name: tensor.data for tensor in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    with safe_open(tmp_path / "m.safetensors", framework="numpy") as model:
        assert sorted(model.keys()) == sorted(tensor.hf_name for tensor in tensors_of(SHAPE))
        for tensor in tensors_of(SHAPE):
            values = model.get_tensor(tensor.hf_name)
            assert values.dtype == np.float16
            assert np.array_equal(values, stored.pop(tensor.gguf_name))
    assert not stored


def test_a_seed_makes_the_same_bytes_and_another_seed_others(tmp_path: Path) -> None:
    for make in (make_gguf, make_safetensors):
        paths = [tmp_path / f"{make.__name__}{number}" for number in range(3)]
        for path, seed in zip(paths, (0, 0, 1), strict=True):
            make(path, ModelShape(seed=seed))
        first, again, other = map(digest, paths)
        assert first == again
        assert first != other


def test_the_tensors_of_a_layer_lie_together(tmp_path: Path) -> None:
    names = [tensor.hf_name for tensor in tensors_of(SHAPE)]
    for layer in range(SHAPE.layers):
        wanted = layer_names(SHAPE, layer)
        start = names.index(wanted[0])
        assert names[start : start + len(wanted)] == wanted
