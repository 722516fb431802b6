"""The service under a real systemd: booted once, in namespaces of its own; see `weightfs.testing.machine`.

Each test finds the service running, and says so if it does not.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from weightfs.testing.machine import NOBODY, Machine, Riders, why_not
from weightfs.testing.nginx import Nginx
from weightfs.testing.waiting import until

pytestmark = [
    pytest.mark.systemd,
    pytest.mark.mount,
    pytest.mark.nginx,
    pytest.mark.skipif(bool(why_not()), reason=why_not() or "it can be booted"),
]

SERVICE = "weightfs.service"
CACHE = "/var/cache/weightfs"
WEIGHTFS = "/opt/weightfs/bin/weightfs"
RIDER = Path(__file__).parents[1] / "faults" / "rider.py"
MODEL = os.urandom(3 << 20) + b"the end"
SECRET = "hf_not_for_the_journal"

# Quick enough for a test; half of it is still far more than an answer takes on a busy machine.
TEST_DROP_IN = """
[Service]
WatchdogSec=8s
LoadCredential=hf-token:/etc/weightfs/hf-token
"""
# The interpreter of the tests may be at home or in a temporary directory; an installed one is not.
VERIFY_DROP_IN = """
[Service]
ProtectHome=no
PrivateTmp=no
"""
# Ollama's own unit, in what matters; and shut in, as an operator may have it. It records what it finds when it starts.
FAKE_OLLAMA = """
[Service]
User=nobody
PrivateTmp=yes
ProtectSystem=strict
RuntimeDirectory=ollama
ExecStart=/bin/sh -c 'mountpoint /mnt/models >/run/ollama/found && ls "$OLLAMA_MODELS" >>/run/ollama/found; \
  env >/run/ollama/env; exec sleep infinity'
[Install]
WantedBy=multi-user.target
"""


# What logind and user@.service do for somebody who logs in, without PAM.
ALICE = 1234
ALICE_RUNTIME = f"/run/user/{ALICE}"
ALICES_MANAGER = f"""
[Service]
Type=notify
User=alice
RuntimeDirectory=user/{ALICE}
Environment=XDG_RUNTIME_DIR={ALICE_RUNTIME}
ExecStartPre=+/usr/bin/install -d -o alice -g alice /home/alice
ExecStart=/lib/systemd/systemd --user
Delegate=yes
KillMode=mixed
"""


@pytest.fixture(scope="module")
def origin(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nginx]:
    root = tmp_path_factory.mktemp("origin")
    (root / "m.gguf").write_bytes(MODEL)
    with Nginx(root) as nginx:
        yield nginx


@pytest.fixture(scope="module")
def machine(installed: Path, origin: Nginx, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    """With weightfs and Ollama enabled, as an operator does it."""
    tree = tmp_path_factory.mktemp("tree")
    subprocess.run(["cp", "-a", f"{installed}/.", tree], check=True)
    units = tree / "etc/systemd/system"

    def write(path: Path, text: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    write(units / "weightfs.service.d/test.conf", TEST_DROP_IN)
    write(units / "weightfs-verify.service.d/test.conf", VERIFY_DROP_IN)
    write(units / "ollama.service", FAKE_OLLAMA)
    drop_in = tree / "opt/weightfs/share/doc/weightfs/ollama.service.d/weightfs.conf"
    write(units / "ollama.service.d/weightfs.conf", drop_in.read_text())
    write(tree / "etc/sysusers.d/alice.conf", f"u alice {ALICE} - /home/alice /bin/sh\n")
    write(units / "alice.service", ALICES_MANAGER)
    write(tree / "etc/weightfs/config.toml", f'refs = ["{origin.url("m.gguf")}"]\n')
    write(tree / "etc/weightfs/hf-token", f"{SECRET}\n")
    (tree / "etc/weightfs/hf-token").chmod(0o600)
    subprocess.run(
        ["systemctl", f"--root={tree}", "--quiet", "enable", SERVICE, "ollama.service"],
        check=True,
        stderr=subprocess.DEVNULL,
    )
    with Machine(tree) as booted:
        yield booted


@pytest.fixture
def model(origin: Nginx) -> str:
    """Where the model appears."""
    return f"/mnt/models/models/http/127.0.0.1:{origin.port}/m.gguf"


@pytest.fixture
def read(machine: Machine, model: str) -> Callable[[], None]:
    """Nobody, a process of another user, reads the whole model."""
    assert machine.show(SERVICE, "ActiveState") == "active", machine.journal()

    def whole() -> None:
        until(
            lambda: model in machine.run("find", "/mnt/models", user=NOBODY, check=False), "the model appears"
        )
        digest = machine.run("sha256sum", model, user=NOBODY).split()[0]
        assert digest == hashlib.sha256(MODEL).hexdigest()

    return whole


def mounted(machine: Machine) -> list[str]:
    """The mount points of weightfs."""
    return machine.run("findmnt", "-rno", "TARGET", "-t", "fuse.weightfs", check=False).split()


def capabilities(machine: Machine, pid: str) -> int:
    lines = machine.path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("CapEff")).split()[1], 16)


def test_everything_has_booted(machine: Machine) -> None:
    assert machine.run("systemctl", "is-system-running").strip() == "running"
    assert machine.run("stat", "-c", "%U %a", CACHE).strip() == "weightfs 700"
    device = machine.run("findmnt", "-no", "MAJ:MIN", "/mnt/models").strip()
    assert machine.run("cat", f"/sys/class/bdi/{device}/read_ahead_kb").strip() == "4096"


def test_who_talks_to_the_network_has_no_capabilities(machine: Machine) -> None:
    assert capabilities(machine, machine.show(SERVICE, "MainPID")) == 1 << 21, "CAP_SYS_ADMIN"
    workers = machine.run("pgrep", "-u", "weightfs", "-f", "weightfs.engine.worker").split()
    assert workers
    until(
        lambda: {capabilities(machine, worker) for worker in workers} == {0},
        "every worker that has started has given them up",
    )


def test_ollama_finds_the_mount_when_it_starts(machine: Machine) -> None:
    assert machine.show("ollama.service", "ActiveState") == "active"
    started = int(machine.show("ollama.service", "ExecMainStartTimestampMonotonic"))
    assert started >= int(machine.show(SERVICE, "ActiveEnterTimestampMonotonic")) > 0
    found = until(lambda: machine.path("/run/ollama/found").read_text(), "ollama has looked").splitlines()
    assert found[0] == "/mnt/models is a mountpoint"
    assert {"blobs", "manifests"} <= set(found[1:]), "the ollama layout, empty as it is"
    environment = machine.path("/run/ollama/env").read_text().splitlines()
    assert {"OLLAMA_MODELS=/mnt/models/ollama", "OLLAMA_NOPRUNE=1", "OLLAMA_LOAD_TIMEOUT=0"} <= set(
        environment
    )


def test_another_user_reads_and_the_status_tells(machine: Machine, read: Callable[[], None]) -> None:
    read()
    until(
        lambda: machine.show(SERVICE, "StatusText").startswith("1 model, 100% of 3.0 MiB here"),
        "the status says that it is complete",
    )
    status = machine.run(WEIGHTFS, "status", "--cache", CACHE)
    assert status.startswith("serving /mnt/models "), "root asks the service"


def test_the_credential_is_for_the_service_alone(machine: Machine, read: Callable[[], None]) -> None:
    read()
    place = f"/run/credentials/{SERVICE}/hf-token"
    pid = machine.show(SERVICE, "MainPID")
    environment = machine.path(f"/proc/{pid}/environ").read_text().split("\0")
    assert f"CREDENTIALS_DIRECTORY=/run/credentials/{SERVICE}" in environment
    assert SECRET in machine.run("cat", place, user=int(machine.run("id", "-u", "weightfs")))
    assert SECRET not in machine.run("cat", place, user=NOBODY, check=False)
    assert SECRET not in machine.journal()
    assert SECRET not in machine.run("systemctl", "show", SERVICE)


def test_the_scrub_asks_the_running_service(machine: Machine, read: Callable[[], None]) -> None:
    read()
    machine.run("systemctl", "start", "weightfs-verify.service")
    assert "ok, 4 chunks (3.0 MiB) checked" in machine.journal("-u", "weightfs-verify.service")
    machine.run("systemctl", "start", "weightfs-verify.timer")
    assert machine.show("weightfs-verify.timer", "ActiveState") == "active"


def test_a_reload_takes_over_what_may_change_and_refuses_what_is_wrong(
    machine: Machine, read: Callable[[], None]
) -> None:
    settings = "/etc/weightfs/config.toml"
    before, pid = machine.path(settings).read_text(), machine.show(SERVICE, "MainPID")
    machine.write(settings, f'{before}max-size = "1GiB"\n')
    machine.run("systemctl", "reload", SERVICE)
    status = json.loads(machine.run(WEIGHTFS, "status", "--json", "--cache", CACHE))
    assert status["limit_bytes"] == 1 << 30
    machine.write(settings, f"{before}max-sise = 1\n")
    machine.run("systemctl", "reload", SERVICE, check=False)
    machine.run("systemctl", "kill", "--kill-who=main", "--signal=HUP", SERVICE)
    wrong = "unknown key 'max-sise'; the nearest known one is 'max-size'"
    until(lambda: machine.journal().count(wrong) == 2, "both ways say it in the journal")
    assert "the old one stays" in machine.journal()
    machine.write(settings, before)
    status = json.loads(machine.run(WEIGHTFS, "status", "--json", "--cache", CACHE))
    assert (status["limit_bytes"], str(status["pid"])) == (1 << 30, pid)
    read()
    machine.run("systemctl", "reload", SERVICE)


def test_a_killed_daemon_comes_back(machine: Machine, read: Callable[[], None], model: str) -> None:
    restarts = machine.show(SERVICE, "NRestarts")
    machine.run("kill", "-KILL", machine.show(SERVICE, "MainPID"))
    machine.until_active(SERVICE, after=restarts)
    assert mounted(machine) == ["/mnt/models"], "the dead mount is gone"
    read()
    told = machine.journal("-u", SERVICE, "-p", "info", "_PID=" + machine.show(SERVICE, "MainPID"))
    assert "weightfs[" in told
    assert ": /mnt/models serves the cache" in told
    assert "serves the cache" not in machine.journal("-u", SERVICE, "-p", "warning")
    ollama = machine.show("ollama.service", "MainPID")
    assert machine.run("nsenter", "-t", ollama, "-m", "sha256sum", model).startswith(
        hashlib.sha256(MODEL).hexdigest()
    ), "a service that is shut in has the new mount too"


def test_the_journal_has_fields(machine: Machine, origin: Nginx) -> None:
    """Of a model that its origin loses before it is read, and of what has no subject."""
    place = origin.root / "lost.gguf"
    place.write_bytes(MODEL)
    ref = origin.url("lost.gguf")
    machine.run(WEIGHTFS, "add", "--cache", CACHE, ref, user=int(machine.run("id", "-u", "weightfs")))
    place.unlink()
    inside = f"/mnt/models/models/http/127.0.0.1:{origin.port}/lost.gguf"
    assert "Input/output error" in machine.run(
        "sh", "-c", f"dd if={inside} of=/dev/null bs=1 count=1 skip=1500000 2>&1 || true"
    )
    entries = [
        json.loads(line)
        for line in machine.run(
            "journalctl", "-u", SERVICE, "-o", "json", "SYSLOG_IDENTIFIER=weightfs"
        ).splitlines()
    ]
    given_up = [entry for entry in entries if "cannot be fetched for now" in entry["MESSAGE"]][-1]
    assert given_up["WEIGHTFS_REF"] == ref
    assert given_up["WEIGHTFS_MIRROR"] == ref
    assert given_up["WEIGHTFS_FAILURE"] == "not_found"
    assert len(given_up["WEIGHTFS_BLOB"]) == 32
    assert given_up["PRIORITY"] == "3"
    assert given_up["LOGGER"] == "weightfs.engine.fetcher"
    assert given_up["CODE_FILE"].endswith("/weightfs/engine/fetcher.py")
    assert given_up["_TRANSPORT"] == "journal"
    failed = [entry for entry in entries if entry["MESSAGE"].startswith("A read of bytes")][-1]
    assert failed["ERRNO"] == "5"
    assert failed["WEIGHTFS_CHUNK"] == "1"
    assert failed["WEIGHTFS_FAILURE"] == "not_found"
    assert failed["WEIGHTFS_BLOB"] == given_up["WEIGHTFS_BLOB"]
    assert "WEIGHTFS_REF" not in next(entry for entry in entries if "serves the cache" in entry["MESSAGE"])
    assert ref in machine.journal("-u", SERVICE, f"WEIGHTFS_REF={ref}", "-p", "err")
    machine.run(WEIGHTFS, "rm", "--cache", CACHE, ref, user=int(machine.run("id", "-u", "weightfs")))


def is_another(machine: Machine, pid: str) -> bool:
    return (
        machine.show(SERVICE, "MainPID") not in (pid, "0")
        and machine.show(SERVICE, "ActiveState") == "active"
    )


def test_what_is_open_goes_on_through_kills_and_restarts(
    machine: Machine, read: Callable[[], None], model: str
) -> None:
    read()
    riders = Riders(machine, RIDER, model, MODEL)
    device = machine.run("findmnt", "-no", "MAJ:MIN", "/mnt/models")
    ollama = machine.show("ollama.service", "MainPID")
    for how in (("kill", "-s", "KILL", SERVICE), ("kill", "-s", "USR1", SERVICE), ("restart", SERVICE)):
        pid = machine.show(SERVICE, "MainPID")
        machine.run("systemctl", *how)
        until(partial(is_another, machine, pid), "it has been started again")
        assert machine.run("findmnt", "-no", "MAJ:MIN", "/mnt/models") == device, "it is the same mount"
        assert machine.show(SERVICE, "NFileDescriptorStore") == "2"
        assert machine.show("ollama.service", "MainPID") == ollama, "nor is Ollama restarted"
        riders.go_on()
    riders.end()
    assert machine.journal("-u", SERVICE).count("The mount at /mnt/models goes on") >= 3
    read()


def test_a_stopped_daemon_is_noticed_and_comes_back(machine: Machine, read: Callable[[], None]) -> None:
    restarts = machine.show(SERVICE, "NRestarts")
    machine.run("kill", "-STOP", machine.show(SERVICE, "MainPID"))
    machine.until_active(SERVICE, after=restarts)
    journal = machine.journal("-u", SERVICE)
    assert "Watchdog timeout" in journal
    assert "Fatal Python error: Aborted" in journal, "and says what it was doing"
    assert mounted(machine) == ["/mnt/models"]
    read()


def test_a_stop_leaves_nothing(machine: Machine, read: Callable[[], None]) -> None:
    read()
    try:
        machine.run("systemctl", "stop", "ollama.service", SERVICE)
        assert machine.show(SERVICE, "Result") == "success"
        assert machine.show(SERVICE, "StatusText") == "unmounted; what has landed is kept"
        stopped = [
            int(machine.show(unit, "InactiveEnterTimestampMonotonic")) for unit in ("ollama.service", SERVICE)
        ]
        assert 0 < stopped[0] < stopped[1], "Ollama was stopped first"
        assert mounted(machine) == []
        assert machine.show(SERVICE, "NFileDescriptorStore") == "0"
        assert not machine.path("/run/weightfs/weightfs").exists()
        look = (
            "import sys, time; from pathlib import Path; from weightfs.store.cache import Cache\n"
            "cache = Cache.open(Path(sys.argv[1]), create=False, now=int(time.time()))\n"
            "print(cache.was_clean, cache.check(deep=True)); cache.close()"
        )
        python = machine.path("/opt/weightfs/bin/python")
        launcher = machine.path(WEIGHTFS).read_text()
        python.write_text(launcher.replace(" -m weightfs ", " "))
        python.chmod(0o755)
        owner = int(machine.run("id", "-u", "weightfs"))
        assert machine.run("/opt/weightfs/bin/python", "-c", look, CACHE, user=owner) == "True []\n"
        # Nobody scrubs a cache that nobody serves: the lock would keep the service from starting.
        machine.run("systemctl", "start", "weightfs-verify.service", check=False)
        last = machine.journal("-u", "weightfs-verify.service").splitlines()[-1]
        assert "failed with result 'dependency'" in last
    finally:
        machine.run("systemctl", "start", SERVICE, "ollama.service")
    read()


def test_a_wrong_setting_is_said_once(machine: Machine, origin: Nginx) -> None:
    machine.write("/etc/weightfs/lab.toml", "fil = 'all'\n")
    machine.run("systemctl", "start", "weightfs@lab.service", check=False)
    assert machine.show("weightfs@lab.service", "ActiveState") == "failed"
    assert machine.show("weightfs@lab.service", "NRestarts") == "0"
    assert machine.show("weightfs@lab.service", "ExecMainStatus") == "2"
    machine.run("systemctl", "reset-failed", "weightfs@lab.service")
    assert "unknown key 'fil'; the nearest known one is 'fill'" in machine.journal(
        "-u", "weightfs@lab.service", "-p", "err"
    )


def test_a_second_mount_beside_the_first(machine: Machine, origin: Nginx) -> None:
    machine.write("/etc/weightfs/lab.toml", f'refs = ["{origin.url("m.gguf")}"]\n')
    machine.run("systemctl", "start", "weightfs@lab.service")
    assert sorted(mounted(machine)) == ["/mnt/lab", "/mnt/models"]
    assert machine.run("stat", "-c", "%U %a", f"{CACHE}-lab").strip() == "weightfs 700"
    # Not at a place where another one lives: its mount stays.
    machine.write(
        "/etc/systemd/system/weightfs@other.service.d/m.conf",
        "[Service]\nEnvironment=MOUNTPOINT=/mnt/models\n",
    )
    machine.write("/etc/weightfs/other.toml", "")
    machine.run("systemctl", "daemon-reload")
    machine.run("systemctl", "start", "weightfs@other.service", check=False)
    machine.run("systemctl", "stop", "weightfs@other.service")
    assert "already a live weightfs mount" in machine.journal("-u", "weightfs@other.service")
    assert sorted(mounted(machine)) == ["/mnt/lab", "/mnt/models"]
    machine.run("systemctl", "stop", "weightfs@lab.service")
    assert mounted(machine) == ["/mnt/models"]


def test_a_dead_mount_does_not_wait_for_the_next_start(machine: Machine) -> None:
    machine.write("/etc/weightfs/lab.toml", "")
    machine.write("/etc/systemd/system/weightfs@lab.service.d/once.conf", "[Service]\nRestart=no\n")
    machine.run("systemctl", "daemon-reload")
    machine.run("systemctl", "start", "weightfs@lab.service")
    assert "/mnt/lab" in mounted(machine)
    machine.run("kill", "-KILL", machine.show("weightfs@lab.service", "MainPID"))
    until(lambda: machine.show("weightfs@lab.service", "ActiveState") == "failed", "the service has failed")
    until(
        lambda: mounted(machine) == ["/mnt/models"], "weightfs-clean-up.service has taken the dead one away"
    )
    assert machine.run("ls", "/mnt/lab", user=NOBODY) == ""


def test_a_user_has_a_mount_of_his_own(machine: Machine, model: str) -> None:
    home = ("env", f"XDG_RUNTIME_DIR={ALICE_RUNTIME}", "HOME=/home/alice")

    def alice(*argv: str, check: bool = True) -> str:
        return machine.run(*home, *argv, user=ALICE, check=check)

    def serves() -> bool:
        return alice("systemctl", "--user", "is-active", "weightfs", check=False).strip() == "active"

    def reads() -> None:
        mine = model.replace("/mnt/models/", "/home/alice/models/", 1)
        until(lambda: mine in alice("find", "/home/alice/models", check=False), "the model appears")
        assert alice("sha256sum", mine).split()[0] == hashlib.sha256(MODEL).hexdigest()

    machine.run("systemctl", "start", "alice.service")
    alice("systemctl", "--user", "--quiet", "enable", "--now", "weightfs.service")
    assert serves()
    reads()
    assert machine.run("ls", "/home/alice/models", user=NOBODY, check=False) == "", "nobody else sees it"
    pid = alice("systemctl", "--user", "show", "--property=MainPID", "--value", "weightfs").strip()
    alice("kill", "-KILL", pid)
    until(
        lambda: (
            serves() and alice("systemctl", "--user", "show", "-P", "NRestarts", "weightfs").strip() == "1"
        ),
        "it has been started again",
    )
    reads()
    assert "The mount at /home/alice/models goes on" in machine.journal(), (
        "without root it is taken over, too"
    )
    alice("systemctl", "--user", "stop", "weightfs")
    assert "/home/alice/models" not in mounted(machine)
    machine.run("systemctl", "stop", "alice.service")


def daemon_at(machine: Machine, place: str) -> list[str]:
    return machine.run("pgrep", "-u", "weightfs", "-f", f"weightfs mount .*{place}", check=False).split()


def test_mount_by_hand(machine: Machine, origin: Nginx) -> None:
    machine.run("mkdir", "/mnt/hand")
    url = origin.url("m.gguf")
    options = "cache=/var/cache/hand,config=/dev/null,read-timeout=1m,nopassthrough,_netdev"
    machine.run("mount", "-t", "weightfs", url, "/mnt/hand", "-o", options)
    model = f"/mnt/hand/models/http/127.0.0.1:{origin.port}/m.gguf"
    assert machine.run("sha256sum", model, user=NOBODY).startswith(hashlib.sha256(MODEL).hexdigest())
    device = machine.run("findmnt", "-no", "MAJ:MIN", "/mnt/hand").strip()
    assert machine.run("cat", f"/sys/class/bdi/{device}/read_ahead_kb").strip() == "4096"
    (pid,) = daemon_at(machine, "/mnt/hand")
    assert capabilities(machine, pid) == 1 << 21, "CAP_SYS_ADMIN alone"
    machine.run("umount", "/mnt/hand")
    until(lambda: not daemon_at(machine, "/mnt/hand"), "the daemon has ended")
    assert mounted(machine) == ["/mnt/models"]
    said = machine.run(
        "sh", "-c", f"mount -t weightfs {url} /mnt/hand -o fil=all,cache=/var/cache/hand 2>&1; echo $?"
    ).splitlines()
    assert "No such option '--fil'" in said[0]
    assert said[-1] == "32", "as mount(8) says"


def test_fstab_with_automount(machine: Machine, origin: Nginx) -> None:
    machine.run("mkdir", "/mnt/auto")
    options = "noauto,_netdev,x-systemd.automount,supervise,cache=/var/cache/auto,config=/dev/null"
    machine.write("/etc/fstab", f"{origin.url('m.gguf')} /mnt/auto weightfs {options} 0 0\n")
    place = "/run/systemd/system"
    machine.run("mkdir", "-p", place)
    machine.run("/usr/lib/systemd/system-generators/systemd-fstab-generator", place, place, place)
    machine.run("systemctl", "daemon-reload")
    machine.run("systemctl", "start", "mnt-auto.automount")
    assert machine.show("mnt-auto.mount", "ActiveState") == "inactive"
    model = f"/mnt/auto/models/http/127.0.0.1:{origin.port}/m.gguf"
    assert machine.run("sha256sum", model, user=NOBODY).startswith(hashlib.sha256(MODEL).hexdigest())
    assert machine.show("mnt-auto.mount", "ActiveState") == "active"
    _, daemon = sorted(daemon_at(machine, "/mnt/auto"), key=int)
    machine.run("kill", "-KILL", daemon)
    assert machine.run("sha256sum", model, user=NOBODY).startswith(hashlib.sha256(MODEL).hexdigest())
    log = machine.path("/var/cache/auto/weightfs.log")
    until(
        lambda: log.read_text().count("Complete files are") == 2,
        "its self-test is done, and has closed its file",
    )
    machine.run("systemctl", "stop", "mnt-auto.automount", "mnt-auto.mount")
    assert mounted(machine) == ["/mnt/models"]
    until(lambda: not daemon_at(machine, "/mnt/auto"), "the daemon has ended")


def test_the_watchdog_leaves_a_sound_service_alone(machine: Machine) -> None:
    """Last: by now the service has run for much longer than it may be silent, under the load of all of the above."""
    deliberate = 1  # of test_a_stopped_daemon_is_noticed_and_comes_back
    until(
        lambda: (
            float(machine.run("sh", "-c", "cut -d' ' -f1 /proc/uptime"))
            > int(machine.show(SERVICE, "ActiveEnterTimestampMonotonic")) / 1e6 + 8
        ),
        "the service has run for longer than the watchdog's eight seconds",
    )
    assert machine.journal("-u", SERVICE).count("Watchdog timeout") <= deliberate
