"""`weightfs reload` on a mount that is in use: what counts at once, what is only named, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from weightfs.testing.daemon import Daemon
from weightfs.testing.mounts import can_mount
from weightfs.testing.waiting import until

pytestmark = [
    pytest.mark.mount,
    pytest.mark.skipif(not can_mount(), reason="needs /dev/fuse and CAP_SYS_ADMIN"),
]

SIZE = 3_000_000
USES = "fd = cold(); print('open', flush=True); sys.stdin.readline(); print(len(os.read(fd, 9)))"
WRONG = {"retries = 3": "unknown key 'retries'", "retry =": "not valid TOML", 'retry = "x"': "retry"}
OPTIONS = ["--fill", "never", "--workers", "0", "--min-free", "0"]


@pytest.fixture
def refs(tmp_path: Path) -> list[str]:
    made = []
    for name in ("one", "two"):
        file = tmp_path / "origin" / f"{name}.bin"
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(name.encode() * (SIZE // 3))
        made.append(f"file://{file}")
    return made


def test_what_counts_at_once_and_what_at_the_next_start(tmp_path: Path, refs: list[str]) -> None:
    one, two = refs
    with Daemon(tmp_path / "daemon", one, options=OPTIONS) as daemon:
        daemon.start().complete(one)
        user = daemon.client(USES, one, talk=True)
        assert user.stdout is not None
        user.stdout.readline()
        daemon.config.write_text(
            f'max-size = "2GiB"\nrefs = ["{two}"]\nmax-jobs = 3\nallow-other = true\nmetrics-listen = "127.0.0.1:1"\n'
        )
        told = json.loads(daemon.cli("reload", "--json").stdout)
        assert told == {
            "at_next_start": ["max-jobs", "allow-other", "metrics-listen"],
            "added": [two],
        }
        until(lambda: two in [ref["ref"] for ref in daemon.status()["refs"]], "the new ref is there")
        assert daemon.status()["limit_bytes"] == 2 << 30
        assert daemon.run("print(len(open(path, 'rb').read()))", two) == str(SIZE)
        assert daemon.finish(user, say="\n") == "9"
        daemon.config.write_text("log-json = true\n")
        assert "counts from" not in daemon.cli("reload").stdout
        assert daemon.status()["limit_bytes"] is None
        assert '"message": "the configuration was read again"' in daemon.log
        assert daemon.stop() == 0


def test_a_configuration_that_is_wrong_is_refused_and_the_old_one_stays(
    tmp_path: Path, refs: list[str]
) -> None:
    with Daemon(tmp_path / "daemon", refs[0], options=[*OPTIONS, "--max-size", "1GiB"]) as daemon:
        daemon.start()
        for text, word in WRONG.items():
            daemon.config.write_text(f"{text}\n")
            done = daemon.cli("reload")
            assert (done.returncode, done.stdout) == (2, "")
            assert word in done.stderr
            assert done.stderr.count("\n") == 1
            # What the daemon would say to somebody whose own configuration is another one, as with SIGHUP.
            with pytest.raises(Exception, match=word):
                daemon.ask(lambda client: client.reload())
        assert daemon.status()["limit_bytes"] == 1 << 30
        daemon.config.write_text("")
        assert daemon.cli("reload").returncode == 0
        assert daemon.stop() == 0
        idle = daemon.cli("reload")
        assert idle.returncode == 7
        assert "nothing runs on the cache" in idle.stderr
