"""Naming a path is enough, on a real mount."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from weightfs.testing.mounts import FakeMount
from weightfs.testing.waiting import until

Start = Callable[..., FakeMount]

pytestmark = pytest.mark.mount

REF = "hf://org/name@main"
MAIN = "models/hf/org/name/main"
CODE = """
def on(name): return os.path.join(root, name)
def code(name):
    try: os.stat(on(name))
    except OSError as error: return error.errno
    return 0
"""


@pytest.fixture
def mounted(start: Start, tmp_path: Path) -> FakeMount:
    """A mount that may browse, and an origin that has one repository."""
    server = start({"plain": 100_000}, options={"browse": True, "browse_ttl": 600.0, "browse_timeout": 600.0})
    offer(server, tmp_path)
    return server


def offer(server: FakeMount, directory: Path) -> None:
    (directory / "config.json").write_text('{"model_type": "llama"}')
    (directory / "w").write_bytes(bytes(range(256)) * 4000)
    files = {"config.json": str(directory / "config.json"), "sub/w.safetensors": str(directory / "w")}
    server.call("offer", ref=REF, commit="a" * 40, files=files, git=["config.json"])


def told(mounted: FakeMount, code: str, *arguments: object) -> Any:
    return json.loads(mounted.run(CODE + code, *arguments))


def asked(mounted: FakeMount) -> list[str]:
    found: list[str] = mounted.call("stats")["asked"]
    return found


def test_ls_of_a_path_resolves_it_and_its_files_are_there(mounted: FakeMount) -> None:
    seen = told(
        mounted,
        """
before = os.listdir(on('models'))
names = sorted(os.listdir(on(sys.argv[2])))
sizes = [os.stat(on(sys.argv[2] + '/' + name)).st_size for name in ('config.json', 'sub/w.safetensors')]
text = open(on(sys.argv[2] + '/config.json')).read()
after = [sorted(os.listdir(on(path))) for path in ('models', 'models/hf', 'models/hf/org', 'models/hf/org/name')]
print(json.dumps([before, names, sizes, text, after]))
""",
        MAIN,
    )
    listed = [["hf", "https"], ["org"], ["name"], ["main"]]
    assert seen == [["https"], ["config.json", "sub"], [23, 1_024_000], '{"model_type": "llama"}', listed]
    assert asked(mounted) == [REF]


def test_directories_on_the_way_are_there_when_they_are_named_and_in_no_listing(mounted: FakeMount) -> None:
    assert told(
        mounted,
        """
import stat
names = ['hf', 'hf/org', 'hf/org/name', 'hf/datasets/org', 'ollama/library/aya', 'oci/docker.io/ai']
modes = {oct(os.stat(on('models/' + name)).st_mode) for name in names}
os.chdir(on('models/hf/org'))
listings = [os.listdir('.'), os.listdir('..'), os.listdir(on('models')), sorted(os.listdir(on('models/hf/org/name')))]
print(json.dumps([sorted(modes), listings, os.stat('name').st_ino == os.stat(on('models/hf/org/name')).st_ino]))
""",
    ) == [["0o40555"], [[], [], ["https"], []], True]
    assert asked(mounted) == []


def test_what_cannot_be_is_enoent_and_nobody_is_asked(mounted: FakeMount) -> None:
    names = [
        ".git",
        "hf/.git",
        "hf/org/name/.hidden",
        "hf/-x",
        "hf/models",
        "oci/nohost",
        "x",
        "https/other",
        "hf/org/a--b",
    ]
    names = [f"models/{name}" for name in names] + ["x", ".Trash", "hf/org/name/main"]
    codes = told(
        mounted, "print(json.dumps([code(name) for name in json.loads(sys.argv[2])]))", json.dumps(names)
    )
    assert codes == [errno.ENOENT] * len(names)
    assert asked(mounted) == []


def test_a_name_that_there_is_not_is_asked_for_once(mounted: FakeMount) -> None:
    name = "models/hf/org/absent/main"
    codes = told(mounted, "print(json.dumps([code(sys.argv[2]) for _ in range(50)]))", name)
    assert codes == [errno.ENOENT] * 50
    assert asked(mounted) == ["hf://org/absent@main"]


@pytest.mark.parametrize(
    ("kind", "code"), [("connect", errno.EIO), ("auth", errno.EACCES), ("timeout", errno.ETIMEDOUT)]
)
def test_what_went_wrong_is_never_enoent(mounted: FakeMount, kind: str, code: int) -> None:
    mounted.call("deny", ref="hf://org/sick@main", kind=kind)
    codes = told(
        mounted, "print(json.dumps([code(sys.argv[2]) for _ in range(50)]))", "models/hf/org/sick/main"
    )
    assert codes == [code] * 50
    assert len(asked(mounted)) == 1


def test_while_an_origin_is_slow_the_rest_goes_on(mounted: FakeMount) -> None:
    mounted.call("hold_browse")
    waiting = [mounted.start(CODE + "print(sorted(os.listdir(on(sys.argv[2]))))", MAIN) for _ in range(10)]
    until(lambda: asked(mounted) == [REF], "the origin is asked")
    assert told(
        mounted,
        """
assert open(at('plain'), 'rb').read() == pattern('plain', 0, 100_000)
for _ in range(20):
    assert os.listdir(on('models')) == ['https'] and os.listdir(on('models/hf')) == []
    assert code('models/hf/org/name') == 0
    assert code('models/hf/org/name/.git') == errno.ENOENT and os.statvfs(root)
print(json.dumps(all(os.stat(on('models/hf/org')).st_ino == os.stat(on('models/hf/org')).st_ino for _ in range(9))))
""",
    )
    assert all(client.poll() is None for client in waiting)
    mounted.call("let_browse_go")
    assert {mounted.finish(client) for client in waiting} == {"['config.json', 'sub']"}
    assert asked(mounted) == [REF]


def test_a_lookup_is_bounded(start: Start, tmp_path: Path) -> None:
    mounted = start({}, options={"browse": True, "browse_timeout": 0.2})
    offer(mounted, tmp_path)
    mounted.call("hold_browse")
    assert told(mounted, "print(json.dumps(code(sys.argv[2])))", MAIN) == errno.ETIMEDOUT
    mounted.call("let_browse_go")
    until(lambda: told(mounted, "print(json.dumps(code(sys.argv[2])))", MAIN) == 0, "it is asked for again")
    assert asked(mounted) == [REF] * 2


def test_the_mount_ends_while_somebody_waits_for_a_name(mounted: FakeMount) -> None:
    mounted.call("hold_browse")
    client = mounted.start(CODE + "print(code(sys.argv[2]))", MAIN)
    until(lambda: asked(mounted) == [REF], "the origin is asked")
    mounted.tell("stop")
    assert mounted.ended()["ended"]
    assert mounted.finish(client) == str(errno.EIO)


def test_with_browsing_off_nobody_is_ever_asked(start: Start, tmp_path: Path) -> None:
    mounted = start({})
    offer(mounted, tmp_path)
    names = ["models/hf", "models/hf/org", MAIN, "models/ollama/library/aya/8b"]
    codes = told(
        mounted, "print(json.dumps([code(name) for name in json.loads(sys.argv[2])]))", json.dumps(names)
    )
    assert codes == [errno.ENOENT] * len(names)
    assert asked(mounted) == []
