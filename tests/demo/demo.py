"""Load models while they download: the whole of weightfs in about two minutes, live, on this machine.

Makes a GGUF and a safetensors file of 270 MB each, publishes both on two mirrors behind one link of limited
rate, and does with them what people do; weightfs is driven through its command line only. Every claim is
checked, against the origins' access logs where it is about bytes; one that fails ends the demo with exit 1.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from rich.table import Table
from screen import MB, ClaimFailed, Screen, Watched
from stage import GGUF, SAFETENSORS, DemoError, Stage

from weightfs.testing.models import DEMO_SHAPE, make_gguf, make_safetensors

MIB = 1024 * 1024
LAYER = 4  # in the middle
ROOM = 2_500 * MB  # both files on two mirrors, one downloaded by curl at a time, both cached
REFETCH_LIMIT = 64 * MIB  # what a kill -9 may cost, per blob
METADATA_PART = 1 / 10  # of a file that may be fetched for its metadata
# Beside a layer: head and tail of the file, and what is asked for around it. The kernel asks for windows of 4 MiB,
# the one around a jump and two ahead of a run; here that is the header and the layer, and weightfs adds its own.
AROUND_LAYER = 24 * MIB
FLIPPED_AT = 0.8  # of the file: fetched after the restart
KILL_AT = 0.5
MISMATCH = re.compile(r"chunk (\d+) of \S+ from mirror \S+ has SHA-256 [0-9a-f]{64} where")


@dataclass(slots=True)
class Row:
    """One line of the table: seconds and bytes, with weightfs and with curl-then-load."""

    title: str
    seconds: float = 0.0
    fetched: int = 0
    curl_seconds: float = 0.0
    curl_fetched: int = 0


@dataclass(slots=True)
class Story:
    """The steps, in order; each adds to what the next ones may rely on."""

    stage: Stage
    screen: Screen
    rows: dict[str, Row] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    digests: dict[str, str] = field(default_factory=dict)
    expected: dict[str, Any] = field(default_factory=dict)  # what the runtimes found in the local files

    def tell(self) -> None:
        """All of it."""
        self.prepare()
        self.curl_then_load()
        self.names_and_metadata()
        self.one_layer()
        self.tokens_while_downloading()
        self.killed()
        self.flipped_byte()
        self.origin_off()
        self.summary()

    def prepare(self) -> None:
        """Make both files, publish them."""
        stage, screen = self.stage, self.screen
        rate = f"{stage.rate / MB:.0f} MB/s"
        screen.step("", f"Two models, two mirrors, one link of {rate} for all connections together")
        make_gguf(stage.files / GGUF, DEMO_SHAPE)
        make_safetensors(stage.files / SAFETENSORS, DEMO_SHAPE)
        for name in (GGUF, SAFETENSORS):
            path = stage.files / name
            self.sizes[name] = path.stat().st_size
            self.digests[name] = sha256_of(path)
            flip = int(self.sizes[name] * FLIPPED_AT) if name == SAFETENSORS else None
            screen.show(f"weightfs publish {name} --url {stage.url(0, name)} --url {stage.url(1, name)}")
            screen.quote(stage.publish(name, flip))
        screen.say(f"One bit of {SAFETENSORS} is flipped on the first mirror; its .meta4 is honest.")

    def curl_then_load(self) -> None:
        """The way it is done today, over the same link: the other half of the table."""
        stage, screen = self.stage, self.screen
        screen.step("", "The way it is done today: curl, then load")
        rows = {
            "byte": Row("first byte"),
            "metadata": Row("GGUF metadata"),
            "layer": Row("one layer (safetensors)"),
            "token": Row("first token (llama.cpp)"),
        }
        self.rows = rows
        programs = {
            "byte": stage.program("first-byte"),
            "metadata": stage.program("metadata"),
            "token": stage.program("tokens"),
            "layer": stage.program("layer", f"model.layers.{LAYER}."),
        }
        for name, keys in ((GGUF, ("byte", "metadata", "token")), (SAFETENSORS, ("layer",))):
            target = stage.home / f"curl-{name}"
            screen.show(f"curl -O {stage.url(1, name)}")
            started = time.monotonic()
            command = ["curl", "-sS", "--fail", "-o", str(target), stage.url(1, name)]
            subprocess.run(command, check=True, timeout=600)
            downloaded = time.monotonic() - started
            screen.quote(f"{self.sizes[name] / MB:.0f} MB in {downloaded:.1f} s")
            for key in keys:
                found = programs[key].run(target)
                self.expected[key] = found
                rows[key].curl_seconds = downloaded + found.get("first", found["seconds"])
                rows[key].curl_fetched = self.sizes[name]
            target.unlink()
        screen.say(f"llama.cpp said {self.expected['token']['text']!r}")
        for mirror in (stage.mirror_a, stage.mirror_b):
            mirror.forget_requests()

    def names_and_metadata(self) -> None:
        """a. `ls -l` and the GGUF's metadata at once."""
        stage, screen = self.stage, self.screen
        screen.step("a", "Names, sizes and metadata at once")
        programs = [stage.program("first-byte"), stage.program("metadata")]
        screen.show("weightfs mount " + " ".join(stage.mount_arguments("never")))
        mounted = stage.mount("never")
        files = [stage.path(name) for name in (GGUF, SAFETENSORS)]
        started = time.monotonic()
        listing = subprocess.run(
            ["ls", "-l", *map(str, files)], capture_output=True, text=True, check=True, timeout=30
        )
        listed = time.monotonic() - started
        screen.show(f"ls -l {files[0].parent}")
        screen.quote(listing.stdout.replace(f"{files[0].parent}/", ""))
        self.rows = {"mount": Row("mount, and ls -l", mounted + listed), **self.rows}
        screen.watch({name: Watched(stage.path(name), self.sizes[name]) for name in (GGUF, SAFETENSORS)})
        for name in (GGUF, SAFETENSORS):
            stat = stage.path(name).stat()
            screen.claim(
                stat.st_size == self.sizes[name], f"{name} has its full size, {stat.st_size:,} bytes"
            )
            small = 0 < stat.st_blocks * 512 < self.sizes[name] // 10
            screen.claim(small, f"{stat.st_blocks * 512 // 1024} KiB of it on disk (st_blocks)")
        for key, program in zip(("byte", "metadata"), programs, strict=True):
            before = sum(stage.sent(GGUF))
            found = program.run(stage.path(GGUF))
            stage.quiet()
            self.rows[key].seconds = found["seconds"]
            self.rows[key].fetched = sum(stage.sent(GGUF)) - before
            same = without_times(found) == without_times(self.expected[key])
            screen.claim(
                same, f"{self.rows[key].title} in {found['seconds'] * 1000:.0f} ms, as in the local file"
            )
        fetched = sum(stage.sent(GGUF))
        text = f"{fetched / MB:.1f} MB fetched so far: its head, its tail, and some read ahead"
        screen.claim(fetched <= METADATA_PART * self.sizes[GGUF], text)

    def one_layer(self) -> None:
        """b. One layer's tensors of the safetensors file, and only their share of it."""
        stage, screen = self.stage, self.screen
        screen.step("b", f"Layer {LAYER} of {DEMO_SHAPE.layers} through safe_open")
        found = stage.program("layer", f"model.layers.{LAYER}.").run(stage.path(SAFETENSORS))
        stage.quiet()
        row = self.rows["layer"]
        row.seconds, row.fetched = found["seconds"], sum(stage.sent(SAFETENSORS))
        same = without_times(found) == without_times(self.expected["layer"])
        screen.claim(same, f"{found['tensors']} tensors, {found['bytes'] / MB:.1f} MB, with the right bytes")
        size = self.sizes[SAFETENSORS] / MB
        text = f"{row.fetched / MB:.1f} MB of {size:.0f} MB fetched, in {row.seconds:.1f} s"
        screen.claim(row.fetched <= found["bytes"] + AROUND_LAYER, text)

    def tokens_while_downloading(self) -> None:
        """c. llama.cpp loads from the mount while it downloads, and generates."""
        stage, screen = self.stage, self.screen
        screen.step("c", "llama.cpp, mmap on, loads while it downloads")
        program = stage.program("tokens")
        before = sum(stage.sent(GGUF))
        cached = stage.file_status(GGUF)["present_bytes"]
        screen.claim(cached < self.sizes[GGUF] // 10, f"only {cached / MB:.1f} MB are cached when it starts")
        found = program.run(stage.path(GGUF))
        stage.quiet()
        row = self.rows["token"]
        row.seconds, row.fetched = found["first"], sum(stage.sent(GGUF)) - before
        screen.claim(
            found["text"] == self.expected["token"]["text"], f"it says {found['text']!r}, as from disk"
        )
        screen.say(f"Loaded in {found['loaded']:.1f} s, first token after {found['first']:.1f} s.")
        total = sum(stage.sent(GGUF))
        screen.claim(total <= self.sizes[GGUF] + MIB, f"{total:,} bytes came over the link: each once")

    def killed(self) -> None:
        """d. kill -9 in mid-download, start again, and only what was missing is fetched."""
        stage, screen = self.stage, self.screen
        screen.step("d", "kill -9 in mid-download")
        screen.look_away()
        stage.umount()
        screen.show("weightfs mount … --fill all")
        stage.mount("all")
        screen.watch({})
        path = Watched(stage.path(SAFETENSORS), self.sizes[SAFETENSORS])
        stage.wait("half of the file", lambda: path.look()[0] >= KILL_AT * path.size)
        workers = stage.status()["worker_pids"]
        cached = path.look()[0]
        pid = stage.kill_daemon()
        screen.show(f"kill -9 {pid}")
        stage.wait("the workers to end", lambda: not any(is_weightfs(worker) for worker in workers), 10)
        screen.claim(cached < path.size, f"killed with {cached / MB:.0f} of {path.size / MB:.0f} MB cached")
        time.sleep(0.5)  # for the access logs, and for the eye
        sent = sum(stage.sent(SAFETENSORS))
        screen.show("weightfs mount …")
        seconds = stage.mount("all")
        kept = path.look()[0]
        lost = max(0, cached - kept)
        screen.claim(lost <= REFETCH_LIMIT, f"back after {seconds:.1f} s, {kept / MB:.0f} MB still there")
        stage.wait("the fill to end", lambda: path.look() == (path.size, "verified"))
        stage.quiet()
        after = sum(stage.sent(SAFETENSORS)) - sent
        missing = path.size - cached
        screen.say(f"{missing / MB:.1f} MB were missing, {after / MB:.1f} MB were fetched after the restart.")
        total = sum(stage.sent(SAFETENSORS))
        again = total - path.size
        text = (
            f"fetched again because of the kill, and of the flipped bit: {again / MIB:.1f} MiB (limit 64 MiB)"
        )
        screen.claim(0 <= again <= REFETCH_LIMIT, text)

    def flipped_byte(self) -> None:
        """e. The flipped byte: one chunk came again from the second mirror."""
        stage, screen = self.stage, self.screen
        screen.step("e", "One flipped bit at the first mirror")
        status = stage.file_status(SAFETENSORS)
        chunk = int(self.sizes[SAFETENSORS] * FLIPPED_AT) // status["chunk_length"]
        # From the log, which both lives of the daemon wrote: on a busy machine it may come before the kill.
        lines = [line for line in stage.log.read_text(errors="replace").splitlines() if MISMATCH.search(line)]
        found = {int(match[1]) for line in lines if (match := MISMATCH.search(line))}
        screen.claim(
            found == {chunk},
            f"one chunk of {status['chunk_count']}, number {chunk}, did not match its digest",
        )
        for line in lines:
            screen.quote(line)
        first = chunk * status["chunk_length"]
        for mirror, who in ((stage.mirror_a, "first"), (stage.mirror_b, "second")):
            spans = (span_of(text) for text in mirror.ranges(SAFETENSORS))
            asked = any(start <= first < stop for start, stop in spans)
            screen.claim(asked, f"the {who} mirror was asked for chunk {chunk}")
        a, b = stage.sent(SAFETENSORS)
        screen.say(f"The first mirror gave {a / MB:.1f} MB, the second {b / MB:.1f} MB.")
        screen.claim(
            status["trust"] == "verified", "the whole file is verified: its SHA-256 is the published one"
        )

    def origin_off(self) -> None:
        """f. The fill has finished: unmount, switch the origins off, mount, and everything is served."""
        stage, screen = self.stage, self.screen
        screen.step("f", "The origins switched off")
        watched = Watched(stage.path(GGUF), self.sizes[GGUF])
        stage.wait("the other file", lambda: watched.look() == (watched.size, "verified"))
        screen.claim(True, "both files are complete and verified")
        screen.look_away()
        screen.show(f"weightfs umount {stage.mountpoint}")
        stage.umount()
        stage.mirror_a.pause()
        stage.mirror_b.pause()
        screen.show("weightfs mount …")
        seconds = stage.mount("all")
        screen.watch({})
        screen.claim(stage.path(GGUF).is_file(), f"mounted again in {seconds:.1f} s, without the network")
        for name in (GGUF, SAFETENSORS):
            same = sha256_of(stage.path(name)) == self.digests[name]
            screen.claim(same, f"{name} reads whole, with the digest of the original")
        found = stage.program("tokens").run(stage.path(GGUF))
        same = found["text"] == self.expected["token"]["text"]
        screen.claim(same, f"llama.cpp says the same again, its first token after {found['first']:.2f} s")
        screen.look_away()
        stage.umount()
        screen.claim(not os.listdir(stage.mountpoint), "unmounted, nothing left behind")

    def summary(self) -> None:
        """The table."""
        table = Table(
            title=f"Over one link of {self.stage.rate / MB:.0f} MB/s; seconds from the moment of asking"
        )
        table.add_column("until")
        for heading in ("weightfs", "fetched", "curl, then load", "fetched", "times sooner"):
            table.add_column(heading, justify="right")
        for row in self.rows.values():
            fetched = f"{row.fetched / MB:.1f} MB" if row.fetched else "—"
            if not row.curl_seconds:
                table.add_row(row.title, f"{row.seconds:.2f} s", fetched, "", "", "")
                continue
            curl = (f"{row.curl_seconds:.2f} s", f"{row.curl_fetched / MB:.1f} MB")
            ratio = f"{row.curl_seconds / row.seconds:.1f} x"
            table.add_row(row.title, f"{row.seconds:.3f} s", fetched, *curl, ratio)
        self.screen.table(table)
        self.screen.say(
            "A dense model needs all of its weights for its first token: there, what is saved is the"
        )
        self.screen.say("load after the download. Where less is read, less is fetched.")


def sha256_of(path: Path) -> str:
    """Of the whole file, hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def without_times(found: dict[str, Any]) -> dict[str, Any]:
    """What a program found, without how long it took."""
    return {key: value for key, value in found.items() if key not in ("seconds", "loaded", "first")}


def is_weightfs(pid: int) -> bool:
    """Whether the process lives, and is one of ours."""
    try:
        return b"weightfs" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def span_of(header: str) -> tuple[int, int]:
    """The half-open span of a Range header; everything where there is none."""
    if not header.startswith("bytes="):
        return 0, sys.maxsize
    first, _, last = header.removeprefix("bytes=").partition("-")
    return int(first or 0), int(last or sys.maxsize - 1) + 1


def on_signal(number: int, _frame: object) -> NoReturn:
    """End as on Ctrl-C, so that everything is cleaned up."""
    raise SystemExit(128 + number)


def main() -> int:
    """Run it; 0 if every claim held."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rate", type=float, default=24.0, help="of the link, in MB/s (default 24)")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, on_signal)
    signal.signal(signal.SIGHUP, on_signal)
    if shutil.disk_usage(tempfile.gettempdir()).free < ROOM:
        print(
            f"demo: it needs {ROOM // MB} MB free in the temporary directory; set TMPDIR to a bigger one",
            file=sys.stderr,
        )
        return 1
    try:
        with Stage(arguments.rate * MB) as stage, Screen() as screen:
            Story(stage, screen).tell()
    except ClaimFailed as error:
        print(f"demo: this does not hold: {error}", file=sys.stderr)
        return 1
    except (DemoError, OSError, subprocess.SubprocessError) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("demo: stopped", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
