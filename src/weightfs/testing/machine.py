"""A real systemd as process 1 of namespaces of its own, with this machine's programs and nothing else of it.

Rule: what happens inside stays inside. The root is a tmpfs; /usr, the interpreter and this package are bound into it
read-only, as is /proc/sys; no unit of this machine is started but the journal. The network is this machine's, so that
a test's own servers on loopback are reached. `close` kills process 1, and the kernel everything below it, mounts and
FUSE connections included; so nothing that hangs inside can hold the test.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Self

import weightfs
from weightfs.mount.mounttable import has_mount_privilege, parse_mountinfo
from weightfs.testing.waiting import until

SYSTEMD = Path("/lib/systemd/systemd")
COMMAND_SECONDS = 60.0
NOBODY = 65534
_RIDERS = "/srv/riders"  # inside: what they need, and how far they are

# $1: the new root; $2: a tree to be copied into it; $3: a file with the directories to be bound, one a line.
_BOOT = r"""
set -eu
umask 022
mount --make-rprivate /
mount -t tmpfs -o mode=755 tmpfs "$1"
cd "$1"
mkdir -p usr etc dev proc sys run tmp mnt opt root var/cache var/lib var/log var/tmp
ln -s ../run var/run
chmod 1777 tmp var/tmp
bind() { mount --bind "$1" "$2"; mount -o remount,bind,ro "$2"; }
bind /usr usr
mkdir sbin # of links, so that helpers of mount(8) can be put beside them
ln -s /usr/sbin/* sbin/
for name in bin lib lib32 lib64 libx32; do
  if [ -L "/$name" ]; then cp -a "/$name" .; elif [ -d "/$name" ]; then mkdir "$name"; bind "/$name" "$name"; fi
done
while read -r directory; do mkdir -p ".$directory"; bind "$directory" ".$directory"; done <"$3"
mkdir -p etc/systemd/system etc/systemd/journald.conf.d
cp -a /etc/alternatives /etc/ld.so.cache etc/
printf 'root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin\n' >etc/passwd
printf 'root:x:0:\nnogroup:x:65534:\n' >etc/group
ln -s /proc/self/mounts etc/mtab # fusermount3 reads it
printf 'passwd: files\ngroup: files\nhosts: files\n' >etc/nsswitch.conf
printf '127.0.0.1 localhost\n' >etc/hosts
printf '0123456789abcdef0123456789abcdef\n' >etc/machine-id
# Not Audit=no: that would switch the kernel's auditing off, which is not ours.
printf '[Journal]\nStorage=volatile\nAudit=\nReadKMsg=no\nRateLimitIntervalSec=0\n' \
  >etc/systemd/journald.conf.d/test.conf
for unit in usr/lib/systemd/system/*.wants/* usr/lib/systemd/system/systemd-remount-fs.service \
  usr/lib/systemd/system/systemd-journald-audit.socket; do
  case ${unit##*/} in
    systemd-journald.service | systemd-journald.socket | systemd-journald-dev-log.socket | *.target | *.slice) ;;
    *) ln -sf /dev/null "etc/systemd/system/${unit##*/}" ;;
  esac
done
cp -a "$2/." .
chmod 755 . # the tree may be a private directory
chown -R 0:0 etc
mount -t tmpfs -o mode=755 tmpfs dev
set -- null 1 3 zero 1 5 full 1 7 random 1 8 urandom 1 9 tty 5 0 fuse 10 229 autofs 10 235
while [ "$#" -gt 0 ]; do mknod -m 666 "dev/$1" c "$2" "$3"; shift 3; done
ln -s /proc/self/fd dev/fd
mkdir dev/shm dev/pts dev/mqueue dev/hugepages
mount -t devpts -o newinstance,ptmxmode=666 devpts dev/pts
ln -s pts/ptmx dev/ptmx
mount -t tmpfs -o mode=1777 tmpfs dev/shm
mount -t tmpfs -o mode=755 tmpfs run
mount -t proc proc proc
bind proc/sys proc/sys
mount -t sysfs sysfs sys
mount -t cgroup2 cgroup2 sys/fs/cgroup
! [ -d etc/sysusers.d ] || chroot . sh -c 'systemd-sysusers /etc/sysusers.d/*.conf'
mkdir old
pivot_root . old
cd /
umount -l /old
rmdir /old
mount --make-rshared / # among the services: as on every machine with systemd
exec env -i container=weightfs PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
  SYSTEMD_GENERATOR_PATH=/none /lib/systemd/systemd --system --unit=multi-user.target --show-status=no
"""


def why_not() -> str:
    """Why no machine can be booted here; empty if one can."""
    if not SYSTEMD.exists():
        return "systemd is not installed (Debian: apt-get install systemd)"
    if not has_mount_privilege() or not Path("/dev/fuse").exists():
        return "namespaces and mounts need root with CAP_SYS_ADMIN, and /dev/fuse"
    root = _cgroup2()
    if root is None or not os.access(root, os.W_OK):
        return "there is no writable cgroup2 hierarchy"
    return ""


def _cgroup2() -> Path | None:
    mounts = parse_mountinfo(Path("/proc/self/mountinfo").read_text(errors="surrogateescape"))
    return next((Path(mount.path) for mount in mounts if mount.fstype == "cgroup2"), None)


class Machine:
    """Boots when its context is entered, until nothing is left to be started.

    Args:
        tree: Copied over the root before systemd starts: units, configuration. Its etc/sysusers.d makes users.
    """

    def __init__(self, tree: Path) -> None:
        self._tree = tree
        self._process: subprocess.Popen[bytes] | None = None
        self._home = Path(tempfile.mkdtemp(prefix="weightfs-machine-"))
        self._cgroup: Path | None = None
        self.pid = 0

    def __enter__(self) -> Self:
        try:
            self._boot()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    def _boot(self) -> None:
        base = _cgroup2()
        assert base is not None, why_not()
        self._cgroup = base / self._home.name
        self._cgroup.mkdir()
        root, binds, log = self._home / "root", self._home / "binds", self._home / "log"
        root.mkdir()
        binds.write_text("".join(f"{path}\n" for path in _needed()))
        # The cgroup namespace begins where its first process is when it is made.
        enter = (
            f"echo $$ >{self._cgroup}/cgroup.procs; "
            # And whoever kills the tests kills the machine.
            "exec setpriv --pdeathsig KILL unshare --mount --pid --cgroup --uts --ipc --fork --kill-child "
            'sh -c "$0" sh "$@"'
        )
        with log.open("wb") as output:
            self._process = subprocess.Popen(  # noqa: S603 - our own script
                ["/bin/sh", "-c", enter, _BOOT, str(root), str(self._tree), str(binds)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )
        until(self._is_up, f"systemd is up\n{log.read_text()}")

    def _is_up(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, f"the boot failed:\n{(self._home / 'log').read_text()}"
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children")
        try:
            self.pid = int(children.read_text().split()[0])
            if Path(f"/proc/{self.pid}/comm").read_text() != "systemd\n":
                return False
        except (OSError, IndexError):
            return False
        return self.run("systemctl", "is-system-running", check=False).strip() in ("running", "degraded")

    def close(self) -> None:
        """Kill everything inside, and remove what was made for it. Safe at any time, and more than once."""
        if self._process is not None:
            if self.pid:
                subprocess.run(["kill", "-KILL", str(self.pid)], check=False)  # noqa: S603, S607
            self._process.kill()
            self._process.wait(COMMAND_SECONDS)
            self._process = None
        if self._cgroup is not None and self._cgroup.exists():
            until(self._cgroup_is_gone, "the machine's control groups are empty")
        shutil.rmtree(self._home, ignore_errors=True)

    def _cgroup_is_gone(self) -> bool:
        assert self._cgroup is not None
        for directory, _, _ in os.walk(self._cgroup, topdown=False):
            try:
                Path(directory).rmdir()
            except OSError:
                return False  # the last processes are dying
        return True

    # --- inside

    def path(self, inside: str) -> Path:
        """A path inside as this process can open it. Not for the FUSE mount: that one may hang."""
        return Path(f"/proc/{self.pid}/root{inside}")

    def write(self, inside: str, text: str) -> None:
        """Write a file, for everybody to read; its directory is made."""
        path = self.path(inside)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o644)

    def run(self, *argv: str, user: int | None = None, check: bool = True) -> str:
        """Run a program inside, as root or another user; its standard output.

        AssertionError if it fails (with `check`) or does not end.
        """
        identity = () if user is None else ("setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups")
        path = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
        command = [
            "nsenter",
            "-t",
            str(self.pid),
            "-a",
            "env",
            "-i",
            f"PATH={path}",
            "SYSTEMD_PAGER=",
            *identity,
            *argv,
        ]
        try:
            done = subprocess.run(  # noqa: S603 - the test's own
                command, capture_output=True, text=True, timeout=COMMAND_SECONDS, check=False
            )
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{argv} hangs\n{self._journal_if_any(argv)}") from None
        assert not check or done.returncode == 0, (
            f"{argv} ended with {done.returncode}: {done.stderr}\n{self._journal_if_any(argv)}"
        )
        return done.stdout

    def _journal_if_any(self, argv: tuple[str, ...]) -> str:
        return "" if argv[0] == "journalctl" else self.journal()

    def journal(self, *arguments: str) -> str:
        """What the journal has, of one unit with `-u`."""
        return self.run("journalctl", "--no-pager", "--output=short-monotonic", *arguments, check=False)

    def show(self, unit: str, key: str) -> str:
        """One property of a unit, as `systemctl show` prints it."""
        return self.run("systemctl", "show", f"--property={key}", "--value", unit).rstrip("\n")

    def has_ended(self, unit: str) -> bool:
        """Whether nothing of the unit runs any more, however it came to that."""
        return self.show(unit, "ActiveState") in ("inactive", "failed")

    def until_active(self, unit: str, *, after: str = "0") -> None:
        """Wait until the unit has been restarted more often than `after` times, and is active."""
        deadline = time.monotonic() + COMMAND_SECONDS
        while not (
            int(self.show(unit, "NRestarts")) > int(after) and self.show(unit, "ActiveState") == "active"
        ):
            assert time.monotonic() < deadline, f"{unit} does not come back\n{self.journal()}"
            time.sleep(0.05)


def _needed() -> list[Path]:
    """What a Python with this package needs beside /usr: no directory twice, none inside another."""
    wanted = {Path(sys.prefix), Path(sys.base_prefix), Path(weightfs.__file__).resolve().parents[1]}
    found: list[Path] = []
    for path in sorted(path.resolve() for path in wanted):
        if not any(path.is_relative_to(outer) for outer in (*found, Path("/usr"))):
            found.append(path)
    return found


class Riders:
    """Clients of another user that read a file in every way, each as a unit, until `end`; `data` is its truth.

    `script` is the program: MODE FILE TRUTH PROGRESS. It counts in PROGRESS, and ends when that is gone.
    """

    MODES = ("stream", "map", "open")

    def __init__(self, machine: Machine, script: Path, path: str, data: bytes) -> None:
        self._machine = machine
        machine.write(f"{_RIDERS}/rider.py", script.read_text())
        machine.path(f"{_RIDERS}/truth").write_bytes(data)
        self._progress = {mode: machine.path(f"{_RIDERS}/{mode}") for mode in self.MODES}
        for mode, file in self._progress.items():
            file.write_text("0")
            file.chmod(0o666)
            program = f"{sys.executable} -I -S {_RIDERS}/rider.py"
            command = f"{program} {mode} {path} {_RIDERS}/truth {_RIDERS}/{mode}"
            machine.write(
                f"/run/systemd/system/{mode}.service", f"[Service]\nUser=nobody\nExecStart={command}\n"
            )
        machine.run("systemctl", "daemon-reload")
        machine.run("systemctl", "start", *(f"{mode}.service" for mode in self.MODES))
        self.go_on()

    def go_on(self) -> None:
        """Wait until every one of them has read more than by now."""
        before = self._counts()
        until(
            lambda: all(count > before[mode] for mode, count in self._counts().items()),
            f"every client goes on\n{before}",
        )

    def _counts(self) -> dict[str, int]:
        return {mode: int(file.read_text()) for mode, file in self._progress.items()}

    def end(self) -> None:
        """Have them end, each of which has to be content with what it read."""
        for file in self._progress.values():
            file.unlink()
        for mode in self.MODES:
            until(partial(self._machine.has_ended, f"{mode}.service"), mode)
            assert self._machine.show(f"{mode}.service", "Result") == "success", self._machine.journal()
