"""`make fuzz`: the targets of weightfs.testing.fuzz_targets under atheris, guided by coverage, one process each.

    fuzz.py --seconds 60 [TARGET]...

An input that takes over ten seconds or a process over 1 GiB is a finding, as is any exception. Findings are left in
build/fuzz/TARGET/; each becomes a test of its parser before it is mended.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from pathlib import Path

BUILD = Path(__file__).resolve().parents[2] / "build" / "fuzz"
INPUT_SECONDS = 10
MEMORY_MIB = 1024
INPUT_BYTES = 4096


def run(name: str, seconds: int) -> bool:
    """Fuzz one target in a process of its own, and print its line; whether nothing was found."""
    from weightfs.testing.fuzz_targets import SEEDS

    place = BUILD / name
    corpus = place / "corpus"
    corpus.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(SEEDS[name]):
        (corpus / f"seed-{number}").write_bytes(seed)
    options = [
        f"-max_total_time={seconds}",
        f"-timeout={INPUT_SECONDS}",
        f"-rss_limit_mb={MEMORY_MIB}",
        f"-max_len={INPUT_BYTES}",
        f"-artifact_prefix={place}/",
        "-print_final_stats=1",
    ]
    command = [sys.executable, __file__, "--child", name, *options, str(corpus)]
    log = place / "log"
    with log.open("wb") as output:
        code = subprocess.run(
            command, stdout=output, stderr=output, timeout=seconds + 300, check=False
        ).returncode
    text = log.read_text(errors="replace")
    counted = re.search(r"number_of_executed_units: *(\d+)", text)
    verdict = "nothing found" if code == 0 else f"FOUND, see {log}"
    print(f"{name:<16} {int(counted[1]) if counted else 0:>12,} executions  {verdict}", flush=True)
    return code == 0


def child(name: str, options: list[str]) -> None:
    """Become the fuzzer of one target."""
    import atheris

    with atheris.instrument_imports(include=["weightfs"]):
        from weightfs.testing.fuzz_targets import TARGETS

    import logging

    logging.disable()  # what is refused is logged; it is not the subject
    target = TARGETS[name]
    atheris.Setup([sys.argv[0], *options], lambda data: target(bytes(data)))
    atheris.Fuzz()


def main() -> int:
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2], sys.argv[3:])
        return 0
    from weightfs.testing.fuzz_targets import TARGETS

    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else "")
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("targets", nargs="*", metavar="TARGET")
    given = parser.parse_args()
    os.nice(10)
    sound = [run(name, given.seconds) for name in given.targets or TARGETS]
    return 0 if all(sound) else 1


if __name__ == "__main__":
    sys.exit(main())
