"""The three layouts on a real mount: inline files, slices, and one inode for a blob wherever it appears."""

from __future__ import annotations

import json
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from weightfs.testing.mounts import FakeMount, can_mount
from weightfs.testing.waiting import until

pytestmark = pytest.mark.mount

COMMIT = "c0ffee" + "0" * 34
REPO = "huggingface/hub/models--org--name"


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What is served, as plain files; weights of 3 MB, and an archive."""
    directory = tmp_path_factory.mktemp("shelf")
    dice = random.Random(1)
    (directory / "weights").write_bytes(dice.randbytes(3_000_001))
    (directory / "archive").write_bytes(dice.randbytes(2_500_000))
    (directory / "config").write_text(json.dumps({"model_format": "gguf"}))
    return directory


@pytest.fixture(scope="module")
def mounted(shelf: Path) -> Iterator[FakeMount]:
    if not can_mount():
        pytest.skip("needs /dev/fuse and CAP_SYS_ADMIN")
    with (
        tempfile.TemporaryDirectory() as place,
        tempfile.TemporaryDirectory() as cache,
        FakeMount(Path(place).resolve(), {}, cache=Path(cache), every_layout=True) as server,
    ):
        server.ready()
        weights, config = str(shelf / "weights"), str(shelf / "config")
        files = {"model.gguf": weights, "config.json": config}
        server.call("put", ref="ollama://aya:8b", files=files)
        hub = {"sub/w.safetensors": weights, "config.json": config}
        server.call("put", ref="hf://org/name@main", commit=COMMIT, files=hub, git=["config.json"])
        slices = {
            "a": ["all", 1000, 1_200_001],
            "b": ["all", 1_200_001, 2_400_000],
            "none": ["all", 9, 9],
        }
        archive = {"all": str(shelf / "archive")}
        server.call("put", ref="oci://tar", files=archive, slices={**slices, "whole": ["all", 0, 2_500_000]})
        yield server


def told(mounted: FakeMount, code: str, *arguments: object) -> object:
    """Run a client; the JSON that it printed."""
    prelude = "def on(name): return os.path.join(root, name)\n"
    return json.loads(mounted.run(prelude + code, *arguments))


def test_an_inline_file_has_its_bytes_its_size_and_nothing_else(mounted: FakeMount) -> None:
    path = f"{REPO}/refs/main"
    seen = told(
        mounted,
        """
path, empty = map(on, sys.argv[2:4])
names = os.listdir(os.path.dirname(path))
info, none = os.stat(path), os.stat(empty)
fd = os.open(path, os.O_RDONLY)
view = mmap.mmap(fd, 0, prot=mmap.PROT_READ)
direct = os.open(path, os.O_RDONLY | os.O_DIRECT)
buffer = mmap.mmap(-1, 4096)
count = os.preadv(direct, [buffer], 0)
print(json.dumps([open(path).read(), view[:].decode(), buffer[:count].decode(), os.pread(fd, 3, 2).decode(),
    oct(info.st_mode), info.st_size, info.st_blocks, none.st_size, none.st_blocks, open(empty).read(),
    os.pread(fd, 9, 100).decode(), os.listxattr(path), names]))
""",
        path,
        f"{REPO}/.no_exist/{COMMIT}/tokenizer.json",
    )
    assert seen == [COMMIT] * 3 + [COMMIT[2:5], "0o100444", 40, 8, 0, 0, "", "", [], ["main"]]


def test_inline_files_are_read_only(mounted: FakeMount) -> None:
    assert told(
        mounted,
        """
try: os.open(on(sys.argv[2]), os.O_WRONLY)
except OSError as error: print(error.errno == errno.EROFS and 1)
""",
        f"{REPO}/refs/main",
    )


def test_one_blob_has_one_inode_in_all_layouts(mounted: FakeMount, shelf: Path) -> None:
    inodes = told(
        mounted,
        """
import glob
names = ['models/ollama/library/aya/8b/model.gguf', 'models/hf/org/name/main/sub/w.safetensors',
    sys.argv[2] + '/snapshots/' + sys.argv[3] + '/sub/w.safetensors']
paths = [on(name) for name in names]
paths += [path for path in glob.glob(on('ollama/blobs/*')) + glob.glob(on(sys.argv[2] + '/blobs/*'))
    if os.stat(path).st_size > 3_000_000]
assert all(open(path, 'rb').read() == open(sys.argv[4], 'rb').read() for path in paths)
print(json.dumps([len(paths), sorted({os.stat(path).st_ino for path in paths}), os.stat(paths[0]).st_nlink]))
""",
        REPO,
        COMMIT,
        shelf / "weights",
    )
    assert isinstance(inodes, list)
    count, numbers, links = inodes
    assert (count, len(numbers), links) == (5, 1, 4)  # the fifth leads through a symbolic link
    # One copy of its pages in the kernel: five readers of the whole, and each byte was asked for once.
    spans = mounted.call("stats")["spans"]["ollama/library/aya/8b/model.gguf"]
    assert sum(stop - start for start, stop in spans) == 3_000_001


def test_a_slice_is_a_file_of_its_own(mounted: FakeMount, shelf: Path) -> None:
    name = "oci/tar/all"
    seen = told(
        mounted,
        """
data = open(sys.argv[2], 'rb').read()
at = lambda name: on('models/oci/tar/' + name)
for name, start, stop in (('a', 1000, 1_200_001), ('b', 1_200_001, 2_400_000), ('none', 9, 9), ('all', 0, 2_500_000)):
    want = data[start:stop]
    assert open(at(name), 'rb').read() == want, name
    fd = os.open(at(name), os.O_RDONLY)
    assert os.stat(at(name)).st_size == len(want)
    assert os.pread(fd, 100, max(0, len(want) - 50)) == want[-50:]
    assert os.pread(fd, 100, len(want)) == b''
    if want:
        assert mmap.mmap(fd, 0, prot=mmap.PROT_READ)[:] == want
        assert os.stat(at(name)).st_blocks >= 8
inodes = [os.stat(at(name)).st_ino for name in ('a', 'b', 'all', 'whole')]
print(json.dumps([len(set(inodes)), inodes[2] == inodes[3], os.stat(at('all')).st_nlink]))
""",
        shelf / "archive",
    )
    assert seen == [3, True, 2]
    spans = mounted.call("stats")["spans"][name]
    assert all(0 <= start < stop <= 2_500_000 for start, stop in spans)
    until(lambda: mounted.call("stats")["handles"][name] == 0, "the handles are released")


def test_what_a_slice_says_of_itself_is_only_what_is_known(mounted: FakeMount) -> None:
    code = """
path = on('models/oci/tar/a')
print(json.dumps([{name: os.getxattr(path, name).decode() for name in os.listxattr(path)}, os.stat(path).st_blocks]))
"""
    cold = {"user.weightfs.state": "provisional"}
    assert told(mounted, code) == [{**cold, "user.weightfs.cached": "0"}, 8]
    mounted.call("set", name="oci/tar/all", present=1_000_000)
    assert told(mounted, code) == [cold, 8]
    mounted.call("complete", name="oci/tar/all")
    blocks = -(-1_199_001 // 4096) * 8
    warm = {"user.weightfs.state": "verified", "user.weightfs.cached": "1199001"}
    until(lambda: told(mounted, code) == [warm, blocks], "its attributes are asked for again")


def test_a_slice_of_a_complete_blob_is_never_passed_through(mounted: FakeMount, shelf: Path) -> None:
    """The kernel would read the blob from its start."""
    mounted.call("complete", name="oci/tar/all")
    before = mounted.call("stats")["passed_opens"]
    told(
        mounted,
        """
data = open(sys.argv[2], 'rb').read()
while os.stat(on('models/oci/tar/all')).st_ino % 2 == 0: pass
assert os.stat(on('models/oci/tar/b')).st_ino % 2 == 0
assert open(on('models/oci/tar/b'), 'rb').read() == data[1_200_001:2_400_000]
print(1)
""",
        shelf / "archive",
    )
    assert mounted.call("stats")["passed_opens"] == before


def test_the_digest_of_a_small_hub_file_is_gits(mounted: FakeMount, shelf: Path) -> None:
    digests = told(
        mounted,
        """
names = ['models/hf/org/name/main/config.json', 'models/ollama/library/aya/8b/config.json']
print(json.dumps([os.getxattr(on(name), 'user.weightfs.digest').decode() for name in names]))
""",
    )
    assert isinstance(digests, list)
    assert [digest.split(":")[0] for digest in digests] == ["git-sha1", "sha256"]


def test_zz_nothing_went_wrong_that_nobody_foresaw(mounted: FakeMount) -> None:
    assert mounted.call("stats")["internal_errors"] == 0
    assert "taken twice" not in mounted.log
