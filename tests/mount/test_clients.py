"""The real clients of a HF_HUB_CACHE on a real mount: huggingface_hub, transformers, safetensors, and llama.cpp's way.

Each runs in its own process with `HF_HUB_CACHE` in the mount, `HF_HUB_OFFLINE=1`, and a writable `HF_HOME` elsewhere.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from weightfs.testing.models import ModelShape, make_gguf, make_safetensors
from weightfs.testing.mounts import FakeMount, can_mount
from weightfs.testing.waiting import until

pytestmark = [
    pytest.mark.mount,
    pytest.mark.skipif(not can_mount(), reason="needs /dev/fuse and CAP_SYS_ADMIN"),
]

SECONDS = 90.0  # transformers alone takes several to be imported
ONE, TWO = "1" * 40, "2" * 40
SHAPE = ModelShape(dim=64, layers=2)
CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": SHAPE.dim,
    "intermediate_size": SHAPE.ff,
    "num_attention_heads": SHAPE.heads,
    "num_hidden_layers": SHAPE.layers,
    "vocab_size": 5,
}
TOKENIZER: dict[str, Any] = {
    "version": "1.0",
    "truncation": None,
    "padding": None,
    "added_tokens": [],
    "normalizer": None,
    "pre_tokenizer": {"type": "Whitespace"},
    "post_processor": None,
    "decoder": None,
    "model": {
        "type": "WordLevel",
        "vocab": {"<unk>": 0, "model": 1, "weights": 2, "without": 3, "wait": 4},
        "unk_token": "<unk>",
    },
}
GIT = [".gitattributes", "config.json", "docs/deep/note.md", "tokenizer.json", "tokenizer_config.json"]


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("shelf")
    texts = {
        ".gitattributes": "*.safetensors filter=lfs\n",
        "config.json": json.dumps(CONFIG),
        "docs/deep/note.md": "a note",
        "tokenizer.json": json.dumps(TOKENIZER),
        "tokenizer_config.json": json.dumps(
            {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>"}
        ),
    }
    for name, text in texts.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(text)
    make_safetensors(directory / "model.safetensors", SHAPE)
    make_gguf(directory / "tiny-Q4_K_M.gguf", SHAPE)
    (directory / "mmproj-tiny-F16.gguf").write_bytes(b"GGUF, but not really")
    return directory


@pytest.fixture(scope="module")
def mounted(shelf: Path) -> Iterator[FakeMount]:
    names = [*GIT, "model.safetensors"]
    whole = {name: str(shelf / name) for name in names}
    gguf = {name: str(shelf / name) for name in ("tiny-Q4_K_M.gguf", "mmproj-tiny-F16.gguf")}
    with (
        tempfile.TemporaryDirectory() as place,
        FakeMount(Path(place).resolve(), {}, every_layout=True) as server,
    ):
        server.ready()
        for ref in (
            "hf://org/tiny",
            "hf://org/tiny@v1.0",
            "hf://org/part/*.safetensors",
            "hf://datasets/org/data",
        ):
            server.call("put", ref=ref, commit=ONE, files=whole, git=GIT)
        server.call("put", ref="hf://org/tiny@refs%2Fpr%2F1/config.json", commit=TWO, files=whole, git=GIT)
        server.call("put", ref="hf://org/tiny-GGUF", commit=ONE, files=gguf, git=[])
        yield server


class Hub:
    """Runs Python in another process, as a user of the mounted cache."""

    def __init__(self, mounted: FakeMount, home: Path) -> None:
        self.mounted = mounted
        self.cache = mounted.mountpoint / "huggingface/hub"
        self._home = home

    def run(self, code: str, *arguments: object) -> Any:
        """The JSON that it printed last."""
        env = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))},
            "HF_HUB_CACHE": str(self.cache),
            "HF_HUB_OFFLINE": "1",
            "HF_HOME": str(self._home),
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }
        argv = [sys.executable, "-c", f"import json, os, sys\n{code}", *map(str, arguments)]
        said = self.mounted.finish(self.mounted.command(argv, env=env), deadline=SECONDS)
        return json.loads(said.splitlines()[-1])


@pytest.fixture
def hub(mounted: FakeMount, tmp_path: Path) -> Hub:
    return Hub(mounted, tmp_path)


def test_hf_hub_download_of_every_revision_and_kind(hub: Hub, shelf: Path) -> None:
    seen = hub.run(
        """
from huggingface_hub import hf_hub_download
wanted = [(None, None), ('v1.0', None), (sys.argv[1], None), ('refs/pr/1', None), ('main', 'dataset')]
paths = [hf_hub_download('org/data' if kind else 'org/tiny', 'config.json', revision=revision, repo_type=kind)
    for revision, kind in wanted]
deep = hf_hub_download('org/tiny', 'docs/deep/note.md')
contents = [open(path).read() for path in paths]
print(json.dumps([contents, [path.split('/hub/')[1] for path in paths], open(deep).read()]))
""",
        ONE,
    )
    contents, paths, deep = seen
    assert contents == [(shelf / "config.json").read_text()] * 5
    tiny = "models--org--tiny/snapshots"
    assert paths == [
        *[f"{tiny}/{ONE}/config.json"] * 3,
        f"{tiny}/{TWO}/config.json",
        f"datasets--org--data/snapshots/{ONE}/config.json",
    ]
    assert deep == "a note"


def test_what_is_absent_is_known_to_be_absent_and_nothing_else_is(hub: Hub) -> None:
    """`vocab.json` is in no file of the revision; `config.json` of the partial one only was not selected."""
    assert (
        hub.run(
            """
from huggingface_hub import hf_hub_download, try_to_load_from_cache, _CACHED_NO_EXIST
from huggingface_hub.errors import LocalEntryNotFoundError
def refused(repo, name):
    try: hf_hub_download(repo, name)
    except LocalEntryNotFoundError: return True
print(json.dumps([try_to_load_from_cache('org/tiny', 'vocab.json') is _CACHED_NO_EXIST,
    try_to_load_from_cache('org/part', 'vocab.json') is _CACHED_NO_EXIST,
    try_to_load_from_cache('org/part', 'config.json') is None,
    try_to_load_from_cache('org/tiny', 'unheard-of.bin') is None,
    refused('org/tiny', 'unheard-of.bin'), refused('org/part', 'config.json'), refused('org/none', 'config.json')]))
"""
        )
        == [True] * 7
    )


def test_snapshot_download_of_a_whole_revision_is_every_file_of_it(hub: Hub, shelf: Path) -> None:
    place, files, listed = hub.run(
        """
import hashlib
from huggingface_hub import get_cached_repo_tree, snapshot_download
place = snapshot_download('org/tiny')
names = [os.path.relpath(os.path.join(base, name), place) for base, _, names in os.walk(place) for name in names]
files = {name: hashlib.sha256(open(os.path.join(place, name), 'rb').read()).hexdigest() for name in names}
listed = {file.path: [file.size, file.blob_id] for file in get_cached_repo_tree('org/tiny')}
print(json.dumps([place, files, listed]))
"""
    )
    assert place == str(hub.cache / f"models--org--tiny/snapshots/{ONE}")
    names = [*GIT, "model.safetensors"]
    assert files == {name: hashlib.sha256((shelf / name).read_bytes()).hexdigest() for name in names}
    assert {name: size for name, (size, _) in listed.items()} == {
        name: (shelf / name).stat().st_size for name in names
    }
    for name in GIT:
        data = (shelf / name).read_bytes()
        assert listed[name][1] == hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def test_a_partial_snapshot_is_never_taken_for_a_whole_one(hub: Hub) -> None:
    """The client itself refuses it, by the list of the revision; by patterns that are covered it is served."""
    missing, selected = hub.run(
        """
from huggingface_hub import snapshot_download
from huggingface_hub.errors import IncompleteSnapshotError
try: missing = snapshot_download('org/part')
except IncompleteSnapshotError as error: missing = str(error)
place = snapshot_download('org/part', allow_patterns='*.safetensors')
print(json.dumps([missing, os.listdir(place)]))
"""
    )
    assert "5 file(s) are missing" in missing
    assert selected == ["model.safetensors"]


def test_scan_cache_dir_finds_everything_in_order(hub: Hub, shelf: Path) -> None:
    warnings, repos = hub.run(
        """
from huggingface_hub import scan_cache_dir
info = scan_cache_dir()
repos = {repo.repo_type + ' ' + repo.repo_id: [repo.size_on_disk, repo.nb_files, sorted(repo.refs),
    sorted(revision.commit_hash for revision in repo.revisions)] for repo in info.repos}
print(json.dumps([[str(one) for one in info.warnings], repos]))
"""
    )
    assert warnings == []
    whole = sum((shelf / name).stat().st_size for name in [*GIT, "model.safetensors"])
    weights = (shelf / "model.safetensors").stat().st_size
    gguf = sum((shelf / name).stat().st_size for name in ("tiny-Q4_K_M.gguf", "mmproj-tiny-F16.gguf"))
    assert repos == {
        "model org/tiny": [whole, 6, ["main", "refs/pr/1", "v1.0"], [ONE, TWO]],
        "model org/part": [weights, 1, ["main"], [ONE]],
        "model org/tiny-GGUF": [gguf, 2, ["main"], [ONE]],
        "dataset org/data": [whole, 6, ["main"], [ONE]],
    }


@pytest.mark.slow
def test_transformers_loads_config_and_tokenizer_by_the_models_name(hub: Hub) -> None:
    pytest.importorskip("transformers")
    assert hub.run(
        """
import warnings
warnings.simplefilter('ignore')
from transformers import AutoConfig, AutoTokenizer
config = AutoConfig.from_pretrained('org/tiny')
tokenizer = AutoTokenizer.from_pretrained('org/tiny', revision='v1.0')
print(json.dumps([config.hidden_size, config.model_type, tokenizer('model weights without wait')['input_ids']]))
"""
    ) == [SHAPE.dim, "llama", [1, 2, 3, 4]]


def test_safe_open_through_the_snapshot(hub: Hub, shelf: Path) -> None:
    assert hub.run(
        """
import numpy
from huggingface_hub import hf_hub_download
from safetensors import safe_open
path = hf_hub_download('org/part', 'model.safetensors')
with safe_open(path, framework='numpy') as ours, safe_open(sys.argv[1], framework='numpy') as plain:
    names = sorted(plain.keys())
    assert sorted(ours.keys()) == names
    same = [bool(numpy.array_equal(ours.get_tensor(name), plain.get_tensor(name))) for name in names]
print(json.dumps([len(same), all(same)]))
""",
        shelf / "model.safetensors",
    ) == [9 * SHAPE.layers + 3, True]


# What `llama-server -hf org/name[:quant] --offline` looks up (common/hf-cache.cpp, common/download.cpp): repositories
# with a `snapshots` directory, the first sound ref or `main`, then every file or link below that commit's snapshot.
LLAMA_LOOKS_UP = r"""
import re
from pathlib import Path
root, (repo, tag) = Path(os.environ['HF_HUB_CACHE']), sys.argv[1].split(':')
files = []
for folder in root.iterdir():
    if not folder.is_dir() or not (folder / 'snapshots').exists() or not folder.name.startswith('models--'):
        continue
    if folder.name.removeprefix('models--').replace('--', '/') != repo:
        continue
    refs = {ref.name: ref.read_text() for ref in (folder / 'refs').iterdir() if ref.is_file()}
    sound = {name: commit for name, commit in refs.items() if re.fullmatch('[0-9a-fA-F]{40}', commit)}
    snapshot = folder / 'snapshots' / (sound.get('main') or next(iter(sound.values())))
    assert snapshot.is_dir()
    files += [path for path in snapshot.rglob('*') if path.is_file() or path.is_symlink()]
models = [path for path in files if path.suffix == '.gguf' and 'mmproj' not in path.name]
chosen = [path for path in models if re.search(tag + '[.-]', path.name, re.IGNORECASE)]
beside = [path for path in files if 'mmproj' in path.name]
assert chosen and chosen[0].exists()
print(json.dumps([chosen[0].name, chosen[0].open('rb').read(4).decode(), [path.name for path in beside]]))
"""


def test_llama_cpp_finds_the_model_and_its_projector(hub: Hub) -> None:
    assert hub.run(LLAMA_LOOKS_UP, "org/tiny-GGUF:q4_k_m") == [
        "tiny-Q4_K_M.gguf",
        "GGUF",
        ["mmproj-tiny-F16.gguf"],
    ]


def test_zz_nothing_failed_on_the_way(mounted: FakeMount) -> None:
    stats = mounted.call("stats")
    assert (stats["internal_errors"], stats["failed_reads"]) == (0, 0)
    until(lambda: not any(mounted.call("stats")["handles"].values()), "the handles are released")
