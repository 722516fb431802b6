"""Every defence of weightfs that is held against a known fault, and the test that fails when it is taken out.

Rule: one mutant is one line of the inventory in docs/reliability.md, and one text of src/ that is found exactly once.
`python tests/faults/mutants.py [WORD...]` first has all the named tests pass on an unchanged copy of src/; then it
takes out one defence at a time, in a fresh copy, and each of the mutant's tests has to fail, by what it asserts: a
mutant that cannot be imported, or that only the outer time limit ends, does not count. WORDs select by line or fault.
tests/faults/test_mutants.py keeps the table from rotting.
"""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 100  # per test: three times the bounds that the tests have themselves
_BROKEN = re.compile(r"ImportError|SyntaxError|IndentationError|NameError|AttributeError|Timeout[: (]")


@dataclass(frozen=True, slots=True)
class Mutant:
    """`line`: its place in the inventory; `file` below src/weightfs; `tests`: node ids below tests/."""

    line: str
    what: str
    file: str
    text: str
    replacement: str
    tests: tuple[str, ...]

    @property
    def node_ids(self) -> list[str]:
        """As pytest has them."""
        return [f"tests/{test}" for test in self.tests]


ORIGIN = "faults/test_origin.py::"
RANGED = "sources/test_ranged.py::"
RULES = "sources/_rules.py"
QUOTA = "faults/test_quota.py::test_what_a_quota_does_not_let_in"


def _all_ways(fault: str) -> tuple[str, ...]:
    """A wrong answer that must be refused, whoever asks and why."""
    ways = (
        "test_reads_with_one_honest_mirror",
        "test_fills_with_one_honest_mirror",
        "test_with_nobody_honest",
    )
    return tuple(f"{ORIGIN}{way}[{fault}]" for way in ways)


MUTANTS: tuple[Mutant, ...] = (
    # ---- what breaks such mounts in real life
    Mutant(
        "1",
        "a read waits for ever",
        "engine/reader.py",
        "trio.move_on_after(limit):\n",
        "trio.move_on_after(1e9):\n",
        ("faults/test_machine.py::test_the_network_is_gone_for_longer_than_a_read_may_wait",),
    ),
    Mutant(
        "1",
        "a body may stall for ever",
        "sources/_ranged.py",
        "trio.fail_after(max(0.0, self._stall_timeout - self._waited))",
        "trio.fail_after(1e9)",
        (
            f"{RANGED}test_fault_is_refused_with_its_kind[STALL_BEFORE_BODY-]",
            f"{RANGED}test_fault_is_refused_with_its_kind[STALL_MID_BODY-]",
        ),
    ),
    Mutant(
        "2",
        "a lock of the file is held across a fetch",
        "engine/reader.py",
        "            await self._fetcher.wait_for(state, chunks)\n",
        "            async with state.preparing:\n                await self._fetcher.wait_for(state, chunks)\n",
        ("mount/test_semantics.py::test_s09_readers_do_not_wait_for_one_anothers_chunks",),
    ),
    Mutant(
        "3",
        "a reset is permanent",
        "core/retry.py",
        "FailureKind.RESET: _Rule(permanent=False, blames=True)",
        "FailureKind.RESET: _Rule(permanent=True, blames=True)",
        ("faults/test_servers.py::test_a_connection_that_is_reset_amid_the_body",),
    ),
    Mutant(
        "3",
        "an origin that does not answer means that there is no such file",
        "mount/errno.py",
        "    FailureKind.TIMEOUT: errno.ETIMEDOUT,\n    FailureKind.STALL",
        "    FailureKind.TIMEOUT: errno.ENOENT,\n    FailureKind.STALL",
        ("mount/test_browser.py::test_only_an_origins_own_word_is_enoent",),
    ),
    Mutant(
        "4",
        "a stale mount is left where it is",
        "mount/session.py",
        "    mounttable.detach_stale(path)\n",
        "",
        (
            "mount/test_life.py::test_after_a_kill_the_place_can_be_used_again_however_many_dead_mounts_are_there",
        ),
    ),
    Mutant(
        "5",
        "background has no budget",
        "core/planschedule.py",
        "alone or flying <= self._limits.budget_bytes",
        "alone or flying > 0",
        ("core/test_planner.py::test_the_budget_bounds_background_over_all_blobs_and_never_demand",),
    ),
    Mutant(
        "5",
        "demand is refused for the budget",
        "core/planschedule.py",
        "return priority is Priority.DEMAND or alone or flying",
        "return alone or flying",
        ("core/test_planner.py::test_the_budget_bounds_background_over_all_blobs_and_never_demand",),
    ),
    Mutant(
        "6",
        "every open throws away the pages of a file that others have open",
        "mount/ops.py",
        "        return FileInfo(fh=FileHandleT(inode), keep_cache=kept)\n",
        "        return FileInfo(fh=FileHandleT(inode), keep_cache=False)\n",
        ("mount/test_traps.py::test_a_second_open_finds_the_pages_of_the_first",),
    ),
    Mutant(
        "7",
        "a cache file that ends early reads as zeros",
        "store/sparse.py",
        "                if not part:\n                    raise self._fault(",
        "                if not part:\n                    return b''.join(parts) + bytes(span.stop - at)\n"
        "                    raise self._fault(",
        ("store/test_cache.py::test_a_short_file_is_a_fault_and_never_zeros",),
    ),
    Mutant(
        "7",
        "a file that was cut is written to, and grows again",
        "engine/worker.py",
        "    if os.fstat(fd).st_size < size:\n",
        "    if os.fstat(fd).st_size < 0:\n",
        ("engine/test_workers.py::test_a_file_that_was_cut_is_not_written_to",),
    ),
    Mutant(
        "8",
        "a full disk is told before anything is evicted",
        "engine/fetcher.py",
        "        if await self._relieve(running.state, job):\n",
        "        if False:\n",
        ("faults/test_disk.py::test_a_full_disk_has_the_least_recently_used_evicted_and_nobody_is_told",),
    ),
    Mutant(
        "9",
        "a known ref is asked for again at every start",
        "engine/pinning.py",
        "        if known is None or refresh:\n",
        "        if True:\n",
        ("faults/test_machine.py::test_a_start_without_network",),
    ),
    Mutant(
        "10",
        "a signed URL that ended is not resolved again",
        "sources/_ranged.py",
        "(route.redirected and answer.status in _rules.EXPIRED)",
        "False",
        (f"{RANGED}test_expired_signed_url_is_resolved_again_once_for_all[403]",),
    ),
    Mutant(
        "11",
        "another version is taken",
        RULES,
        "    if seen != validator:\n",
        "    if False:\n",
        (*_all_ways("other ETag")[2:], f"{ORIGIN}test_versions_are_never_mixed"),
    ),
    Mutant(
        "12",
        "one stream per file",
        "core/readahead.py",
        "del self._streams[: -self._limit]",
        "del self._streams[:-1]",
        ("core/test_readahead.py::test_eight_interleaved_streams_each_have_their_window",),
    ),
    Mutant(
        "12",
        "fill may take demand's slots",
        "core/planschedule.py",
        "        if sum(1 for job in jobs if job.issued is not Priority.DEMAND) >= limits.background_jobs:\n",
        "        if False:\n",
        ("core/test_planner.py::test_background_never_takes_demands_own_slots",),
    ),
    # ---- faults of an origin
    Mutant(
        "resets",
        "the end of a body is no error",
        "sources/_ranged.py",
        "        if not piece:\n            raise self._short()\n",
        "        if not piece:\n            return bytes(self._left)\n",
        (f"{ORIGIN}test_with_nobody_honest[chunked, short]",),
    ),
    Mutant(
        "slow drip",
        "any byte is progress",
        "sources/_ranged.py",
        "MIN_PROGRESS = 16 * 1024",
        "MIN_PROGRESS = 1",
        (f"{RANGED}test_fault_is_refused_with_its_kind[DRIP_BODY-]",),
    ),
    Mutant(
        "over-long body",
        "what comes after the end is not looked at",
        "sources/_ranged.py",
        "        if not self._left and await self._receive():\n",
        "        if False:\n",
        (f"{RANGED}test_excess_that_comes_as_a_chunk_of_its_own_is_refused",),
    ),
    Mutant(
        "200 instead of 206",
        "the page is taken for the file",
        RULES,
        "    if status == 200:\n        _refuse_whole(headers, size, validator, url)\n",
        "    if status == 200:\n        return\n",
        (f"{RANGED}test_fault_is_refused_with_its_kind[NO_RANGES-]",),
    ),
    Mutant(
        "Content-Range",
        "any start and end will do",
        RULES,
        "    if (start, last + 1) != (span.start, span.stop):\n",
        "    if False:\n",
        (*_all_ways("other start")[2:], *_all_ways("other end")[2:]),
    ),
    Mutant(
        "Content-Range",
        "any total will do",
        RULES,
        "    if total != size:\n",
        "    if False:\n",
        _all_ways("other total")[2:],
    ),
    Mutant(
        "Content-Range",
        "any syntax will do",
        RULES,
        r'_CONTENT_RANGE = re.compile(r"bytes (\d{1,18})-',
        r'_CONTENT_RANGE = re.compile(r"bytes.(\d{1,18})-',
        _all_ways("range syntax")[2:],
    ),
    Mutant(
        "Content-Length",
        "any length will do",
        RULES,
        "    if length is not None and length != len(span):\n",
        "    if False:\n",
        (f"{RANGED}test_fault_is_refused_with_its_kind[WRONG_LENGTH-]",),
    ),
    Mutant(
        "multipart/byteranges",
        "a multipart body is a body",
        RULES,
        '    if headers.get("content-type", "").strip().lower().startswith("multipart/"):\n',
        "    if False:\n",
        ("sources/test_rules.py::test_a_multipart_body_is_refused_though_its_head_is_right",),
    ),
    Mutant(
        "gzip",
        "an encoded body is a body",
        RULES,
        '    if any(coding not in ("", "identity") for coding in codings):\n',
        "    if False:\n",
        ("sources/test_rules.py::test_an_encoded_body_is_refused_though_its_head_is_right",),
    ),
    Mutant(
        "HTML page",
        "a log-in page means that the file has changed",
        RULES,
        "        if _is_page(headers):\n            raise failure(FailureKind.PROTOCOL",
        "        if False:\n            raise failure(FailureKind.PROTOCOL",
        (f"{RANGED}test_fault_is_refused_with_its_kind[HTML_200-]",),
    ),
    Mutant(
        "302 loop",
        "a loop is followed to its bound",
        "sources/_client.py",
        "            if str(hop.url) in seen:\n",
        "            if False:\n",
        (f"{RANGED}test_a_loop_is_not_followed",),
    ),
    Mutant(
        "redirect",
        "redirects have no bound",
        "sources/_client.py",
        "        for _ in range(MAX_REDIRECTS + 1):\n",
        "        for _ in range(10**6):\n",
        (f"{RANGED}test_long_chain_is_refused",),
    ),
    Mutant(
        "redirect",
        "to any scheme",
        RULES,
        '    if target.scheme not in ("http", "https"):\n',
        "    if False:\n",
        (f"{ORIGIN}test_with_nobody_honest[redirect to another scheme]",),
    ),
    Mutant(
        "redirect",
        "from https to http",
        RULES,
        '    if current.scheme == "https" and target.scheme == "http":\n',
        "    if False:\n",
        (f"{RANGED}test_https_never_leads_to_http_and_bad_certificates_are_refused",),
    ),
    Mutant(
        "redirect",
        "from a public host to a private address",
        "sources/_client.py",
        "        if await self._is_private(target) and not await self._is_private(start):\n",
        "        if False:\n",
        (f"{RANGED}test_public_host_may_not_lead_to_a_private_one",),
    ),
    Mutant(
        "bad certificate",
        "a refused certificate is a connection that failed",
        "sources/_stream.py",
        "                    raise TlsRefusedError(_reason(error)) from error\n",
        "                    raise httpcore.ConnectError(str(error)) from error\n",
        ("faults/test_servers.py::test_a_certificate_that_has_expired",),
    ),
    Mutant(
        "401, 403",
        "a refusal passes by itself",
        RULES,
        "    if status in (401, 403, 407):\n",
        "    if status in (407,):\n",
        (f"{ORIGIN}test_with_nobody_honest[401]", f"{ORIGIN}test_with_nobody_honest[403]"),
    ),
    Mutant(
        "404 after success",
        "an absent file is a broken protocol",
        RULES,
        "    elif status in (404, 410):\n",
        "    elif status in (999,):\n",
        (f"{ORIGIN}test_with_nobody_honest[404]", f"{ORIGIN}test_with_nobody_honest[410]"),
    ),
    Mutant(
        "408, 425, 429, 5xx",
        "busy is a broken protocol",
        RULES,
        "    elif status in _BUSY:\n",
        "    elif status in (503,):\n",
        tuple(f"{ORIGIN}test_with_nobody_honest[{status}]" for status in (408, 425, 429, 500, 502, 504)),
    ),
    Mutant(
        "Retry-After",
        "an absurd time is waited out",
        "core/retry.py",
        "min(max(retry_after, 0.0), RETRY_AFTER_CAP)",
        "max(retry_after, 0.0)",
        ("core/test_retry.py::test_retry_after_is_waited_out_and_bounded",),
    ),
    Mutant(
        "Retry-After",
        "it is not heard",
        "core/retry.py",
        "    if retry_after is None or math.isnan(retry_after):\n",
        "    if True:\n",
        (f"{ORIGIN}test_a_busy_origin_is_asked_again_when_it_said[100]",),
    ),
    Mutant(
        "416",
        "it is a fault like any other",
        RULES,
        "        changed = found is not None and int(found[1]) != size\n",
        "        changed = found is not None\n",
        (f"{ORIGIN}test_with_nobody_honest[416]",),
    ),
    Mutant(
        "wrong bytes",
        "no chunk is compared with its list",
        "engine/worker.py",
        "    if expected and digest != expected:\n",
        "    if False:\n",
        tuple(
            way for fault in ("one bit", "swapped", "other file", "zeros") for way in _all_ways(fault)[::2]
        ),
    ),
    Mutant(
        "ETag changed",
        "a weakened tag is another version",
        RULES,
        '    if validator.startswith(\'"\') and seen.startswith("W/"):\n',
        "    if False:\n",
        (f"{ORIGIN}test_with_nobody_honest[weak ETag]",),
    ),
    Mutant(
        "log",
        "the log does not name the fault",
        "engine/fetcher.py",
        '"fetch of %s: %s (%s)", state.ref, message.text, kind,',
        '"fetch of %s failed", state.ref,',
        (
            f"{ORIGIN}test_reads_with_one_honest_mirror[500]",
            f"{ORIGIN}test_pulls_with_one_honest_mirror[500]",
            f"{ORIGIN}test_fills_with_one_honest_mirror[500]",
        ),
    ),
    Mutant(
        "refused connection",
        "it is the file that is absent",
        "sources/_stream.py",
        "raise httpcore.ConnectError(str(error)) from error\n        return BulkStream(_Socket(sock))",
        "raise httpcore.RemoteProtocolError(str(error)) from error\n        return BulkStream(_Socket(sock))",
        (
            f"{RANGED}test_refused_connection",
            "faults/test_machine.py::test_the_network_is_gone_and_comes_back",
        ),
    ),
    Mutant(
        "slow drip",
        "a head that comes byte by byte has no bound",
        "sources/_client.py",
        "            with trio.fail_after(settings.connect_timeout + settings.timeout):\n",
        "            with trio.fail_after(1e9):\n",
        (f"{RANGED}test_a_slow_head_is_bounded_where_the_way_is_known_too",),
    ),
    Mutant(
        "bytes of the wrong mirror",
        "who gave them is asked again for ever",
        "core/planschedule.py",
        "        return chunk in blob.mismatches and mirror in self._faults.avoid(blob, chunk, now)\n",
        "        return False\n",
        ("core/test_planner_faults.py::test_a_request_ends_before_a_chunk_for_which_the_mirror_is_avoided",),
    ),
    # ---- manifests and chunk lists
    Mutant(
        "manifest",
        "sizes are not looked at",
        "core/artifact.py",
        "    if type(size) is not int or not 0 <= size <= MAX_BLOB_SIZE:\n",
        "    if False:\n",
        ("core/test_artifact.py::test_what_is_not_sound_is_refused_with_a_sentence",),
    ),
    Mutant(
        "manifest",
        "truncated JSON is another error than ours",
        "core/artifact.py",
        "    except ValueError as error:  # UnicodeDecodeError and JSONDecodeError are such\n",
        "    except UnicodeDecodeError as error:\n",
        ("core/test_artifact.py::test_bytes_that_are_no_json_are_refused",),
    ),
    Mutant(
        "manifest",
        "layers are whatever they are",
        "core/artifact.py",
        "    if not isinstance(items, list):\n",
        "    if False:\n",
        ("core/test_artifact.py::test_what_is_not_sound_is_refused_with_a_sentence",),
    ),
    Mutant(
        "manifest",
        "capitals in a digest",
        "core/artifact.py",
        're.compile(r"sha256:([0-9a-f]{64})")',
        're.compile(r"sha256:([0-9a-fA-F]{64})")',
        ("core/test_artifact.py::test_what_is_not_sound_is_refused_with_a_sentence",),
    ),
    Mutant(
        "manifest",
        "one path twice",
        "core/artifact_paths.py",
        "        if not self._free(path):\n            raise IntegrityError(",
        "        if False:\n            raise IntegrityError(",
        ("core/test_artifact_paths.py::test_paths_in_the_way_of_one_another_are_refused",),
    ),
    Mutant(
        "manifest",
        "a million layers are read",
        "core/artifact.py",
        '    if raw.count(b"{") + raw.count(b"[") > MAX_OBJECTS or raw.count(b",") > MAX_VALUES:\n',
        "    if False:\n",
        ("core/test_artifact.py::test_a_million_layers_are_refused_before_anything_is_made_of_them",),
    ),
    Mutant(
        "manifest",
        "another algorithm is not named",
        "core/artifact.py",
        '    if algorithm is not None and algorithm[1] != "sha256":\n',
        "    if False:\n",
        ("core/test_artifact.py::test_what_is_not_sound_is_refused_with_a_sentence",),
    ),
    Mutant(
        "manifest",
        "a path may climb",
        "core/manifest.py",
        '        if name in ("", ".", ".."):\n',
        '        if name in ("",):\n',
        ("core/test_manifest.py::test_unsafe_paths_are_refused_with_the_reason",),
    ),
    Mutant(
        "manifest",
        "a path may hold NUL",
        "core/manifest.py",
        "    if _CONTROL.search(path):\n",
        "    if False:\n",
        ("core/test_manifest.py::test_unsafe_paths_are_refused_with_the_reason",),
    ),
    Mutant(
        "manifest",
        "a name may be of any length",
        "core/manifest.py",
        "    if len(encoded) > MAX_PATH_BYTES:\n",
        "    if False:\n",
        ("core/test_manifest.py::test_unsafe_paths_are_refused_with_the_reason",),
    ),
    Mutant(
        ".meta4",
        "a DTD is read",
        "sources/_xml.py",
        "forbid_dtd=True, forbid_entities=True",
        "forbid_dtd=False, forbid_entities=False",
        (
            "sources/test_https.py::test_hostile_list_is_an_error[dtd]",
            "sources/test_https.py::test_hostile_list_is_an_error[bomb]",
        ),
    ),
    Mutant(
        ".meta4",
        "the first of two files is taken",
        "core/metalink.py",
        '    file = _one(root.findall(_tag("file")), "file")\n',
        '    file = root.findall(_tag("file"))[0]\n',
        ("sources/test_https.py::test_hostile_list_is_an_error[two files]",),
    ),
    Mutant(
        ".meta4",
        "any number of pieces will do",
        "core/metalink.py",
        "    if len(digests) != 32 * count:\n",
        "    if False:\n",
        ("sources/test_https.py::test_hostile_list_is_an_error[wrong count]",),
    ),
    Mutant(
        ".meta4",
        "a list of another size is taken",
        "sources/_published.py",
        "        if link.size != size:\n",
        "        if False:\n",
        ("sources/test_https.py::test_hostile_list_is_an_error[other size]",),
    ),
    Mutant(
        ".meta4",
        "one of any length is parsed",
        "sources/_xml.py",
        "    if len(data) > MAX_METALINK_BYTES:\n",
        "    if False:\n",
        ("sources/test_https.py::test_a_list_is_not_parsed_beyond_its_bound",),
    ),
    # ---- faults of the machine
    Mutant(
        "kill -9",
        "after an unclean stop nothing is suspect",
        "store/opening.py",
        "        bits.suspect = bits.present.copy()\n",
        "        pass\n",
        ("store/test_opening.py::test_an_unclean_stop_makes_everything_suspect_until_it_was_hashed",),
    ),
    Mutant(
        "power cut",
        "records are written before their data is on the disk",
        "store/sparse.py",
        "                os.fdatasync(descriptor)\n",
        "                pass\n",
        ("store/test_crash.py::test_records_never_say_more_than_the_disk",),
    ),
    Mutant(
        "cache file truncated or deleted",
        "what is recorded beyond its end stays recorded",
        "store/opening.py",
        "    lost = ledger.drop(txn, record, bits, list(_present_from(bits, whole)))\n",
        "    lost = ledger.drop(txn, record, bits, [])\n",
        ("store/test_opening.py::test_chunks_of_a_short_or_missing_file_are_absent",),
    ),
    Mutant(
        "cache file replaced",
        "another file counts as the one that was closed",
        "store/opening.py",
        "or _mark_of(found) != mark:\n",
        "or False:\n",
        (
            "store/test_opening.py::test_a_file_that_was_replaced_while_we_were_away_is_suspect",
            "store/test_opening.py::test_a_file_that_was_touched_while_we_were_away_is_suspect",
        ),
    ),
    Mutant(
        "cache file replaced",
        "a worker writes into whatever has that name",
        "engine/worker.py",
        "    if file and [found.st_dev, found.st_ino] != file:\n",
        "    if False:\n",
        ("engine/test_workers.py::test_a_file_that_was_replaced_is_not_written_to",),
    ),
    Mutant(
        "bits flipped",
        "what verify finds rotten is read on",
        "engine/upkeep.py",
        "                        await self._holdings.drop_bad(state, found)\n",
        "",
        ("mount/test_repair.py::test_what_verify_finds_rotten_is_not_read_any_more[False-False]",),
    ),
    Mutant(
        "bits flipped",
        "the kernel keeps what was read of it",
        "engine/upkeep.py",
        "                        state.refuted += 1",
        "                        state.refuted += 0",
        ("mount/test_repair.py::test_what_verify_finds_rotten_is_not_read_any_more[True-False]",),
    ),
    Mutant(
        "bits flipped",
        "nothing that is suspect is hashed before its first use",
        "engine/reader.py",
        "        if good:\n            self._holdings.cleared(state, [chunk])\n",
        "        if True:\n            self._holdings.cleared(state, [chunk])\n",
        (
            "engine/test_engine.py::test_a_chunk_that_the_disk_lost_is_fetched_again_at_first_touch_after_an_unclean_stop",
        ),
    ),
    Mutant(
        "LMDB file corrupted",
        "a record that cannot be is an error of ours",
        "store/lmdberrors.py",
        "        raise found_damaged(directory, str(error)) from error\n    except (\n",
        "        raise\n    except (\n",
        ("store/test_opening.py::test_damaged_meta",),
    ),
    Mutant(
        "newer format",
        "it is taken as if it were ours",
        "store/opening.py",
        "    if found > FORMAT:\n",
        "    if False:\n",
        ("store/test_opening.py::test_a_newer_format_is_refused_and_left_alone",),
    ),
    Mutant(
        "two daemons",
        "the lock is not asked",
        "store/lockfile.py",
        "            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)\n",
        "            pass\n",
        ("store/test_opening.py::test_the_second_process_is_told_who_has_it",),
    ),
    Mutant(
        "clock jumps",
        "of two uses the one in the future counts",
        "core/uses.py",
        "            if self.times[region] != second:\n",
        "            if self.times[region] < second:\n",
        ("faults/test_machine.py::test_the_clock_jumps",),
    ),
    Mutant(
        "out of descriptors",
        "a fetch that finds none left blames the disk",
        "engine/worker.py",
        "    if error.errno in _PASSING:\n",
        "    if False:\n",
        ("faults/test_machine.py::test_out_of_descriptors",),
    ),
    Mutant(
        "out of descriptors",
        "a reader that finds none left drops what is cached",
        "engine/reader.py",
        "                if isinstance(error, NoDescriptorsError):\n",
        "                if False:\n",
        ("faults/test_machine.py::test_out_of_descriptors_before_the_file_is_open",),
    ),
    Mutant(
        "out of descriptors",
        "a reader whose file cannot be made is told at once",
        "engine/reader.py",
        "                except NoDescriptorsError as error:\n",
        "                except ZeroDivisionError as error:\n",
        ("faults/test_machine.py::test_out_of_descriptors_before_the_file_is_open",),
    ),
    Mutant(
        "network gone",
        "a refused connection is permanent",
        "core/retry.py",
        "FailureKind.CONNECT: _Rule(permanent=False, blames=True)",
        "FailureKind.CONNECT: _Rule(permanent=True, blames=True)",
        ("faults/test_machine.py::test_the_network_is_gone_and_comes_back",),
    ),
    Mutant(
        "worker killed",
        "its jobs are forgotten with it",
        "engine/workers.py",
        '            self._handle(wire.JobFailed(job, FailureKind.WORKER, "the fetch worker ended"))\n',
        "            pass\n",
        (
            "engine/test_workers.py::test_a_killed_worker_is_replaced_and_its_jobs_are_answered_after_it_is_gone",
        ),
    ),
    Mutant(
        "worker stopped",
        "its silence has no bound",
        "engine/workers.py",
        "                    silence.deadline = trio.current_time() + bound\n",
        "                    silence.deadline = float('inf')\n",
        ("engine/test_workers.py::test_a_stopped_worker_is_replaced_after_its_silence_bound",),
    ),
    Mutant(
        "mount point busy at stop",
        "it is waited for, and then left",
        "mount/serve.py",
        "        mounttable.take_away(connection.path, lazy=lazy)\n",
        "        mounttable.take_away(connection.path, lazy=False)\n",
        ("mount/test_life.py::test_a_busy_mount_is_detached_at_the_end_and_its_users_get_errors",),
    ),
    Mutant(
        "hundreds of blocked readers",
        "as few requests at once as pyfuse3 has by itself",
        "mount/session.py",
        "    max_tasks: int = 2048",
        "    max_tasks: int = 99",
        ("mount/test_traps.py::test_hundreds_of_blocked_reads_stop_nobody_else",),
    ),
    Mutant(
        "ENOSPC",
        "LMDB's lock file is on the disk that is full",
        "store/index.py",
        "    with locks_in_memory(directory) as place:\n",
        "    for place in (directory,):\n",
        ("store/test_full.py::test_no_signal_ends_who_uses_an_index_on_a_full_disk[ext4-]",),
    ),
    Mutant(
        "ENOSPC",
        "at the end others are evicted for what nobody will fetch",
        "engine/room.py",
        "        if self._fetcher.closed:\n",
        "        if False:\n",
        ("engine/test_room.py::test_a_disk_that_is_full_at_the_end_has_nobody_evicted",),
    ),
    Mutant(
        "ENOSPC",
        "an index whose last page had no room counts as sick",
        "store/index.py",
        "                    if self._has_panicked():\n",
        "                    if False:\n",
        ("store/test_index.py::test_a_disk_that_is_full_at_the_last_page_of_a_commit_is_not_a_sick_one",),
    ),
    Mutant(
        "EDQUOT",
        "a worker takes a used-up quota for a sick disk",
        "engine/worker.py",
        "(errno.ENOSPC, errno.EDQUOT, errno.EFBIG)",
        "(errno.ENOSPC, errno.EFBIG)",
        (f"{QUOTA}_is_read_past_the_cache_and_the_disk_is_not_sick[1]",),
    ),
    Mutant(
        "EIO",
        "a write that fails is the worker's own fault",
        "engine/worker.py",
        'job, FailureKind.DISK, f"the cache cannot be written',
        'job, FailureKind.WORKER, f"the cache cannot be written',
        ("faults/test_sick_disk.py::test_whoever_cannot_write_blames_the_disk_and_no_mirror[chunk-5]",),
    ),
    Mutant(
        "EROFS",
        "a read-only filesystem is a matter of permissions",
        "store/disk.py",
        "DiskFault if error.errno == errno.EROFS else CacheError",
        "CacheError",
        ("faults/test_sick_disk.py::test_whoever_cannot_write_blames_the_disk_and_no_mirror[file-30]",),
    ),
    Mutant(
        "EIO",
        "background goes on while the disk is bypassed",
        "engine/health.py",
        "                self._fetcher.feed(plan.Background(on=False))\n",
        "                pass\n",
        ("faults/test_sick_disk.py::test_a_fill_that_is_under_way_stops_at_the_bypass",),
    ),
    Mutant(
        "EIO",
        "what is read past the cache has no bound",
        "engine/uncached.py",
        "plan.Capacity(self._limit, self._limit - self._limit // BACKGROUND_PART)",
        "plan.Capacity(None, None)",
        ("faults/test_sick_disk.py::test_memory_is_bounded_however_many_read",),
    ),
    Mutant(
        "wrong bytes",
        "a quarantined file is had from the same mirror again",
        "engine/repair.py",
        "        self._fetcher.feed(plan.Refuted(state.id, sources))\n",
        "",
        (
            "engine/test_repair.py::test_reads_past_the_cache_do_not_give_what_was_refuted[from another mirror]",
        ),
    ),
    Mutant(
        "wrong bytes",
        "what was refuted is given out past the cache",
        "engine/repair.py",
        "        self._uncached.refuted(state, sources)\n",
        "",
        (
            "engine/test_repair.py::test_reads_past_the_cache_do_not_give_what_was_refuted[from another mirror]",
        ),
    ),
    Mutant(
        "LMDB file missing",
        "whoever goes on from a copy punches holes",
        "store/opening.py",
        "                _whole_all(txn)\n",
        "                pass\n",
        ("store/test_opening.py::test_whoever_goes_on_from_a_copy_punches_no_hole_and_says_so_once",),
    ),
    Mutant(
        "LMDB file corrupted",
        "any copy is a good one",
        "store/backup.py",
        '        return hashlib.file_digest(file, "sha256").hexdigest() == copy.stem\n',
        "        return True\n",
        ("store/test_opening.py::test_without_a_good_copy_the_index_is_empty_and_no_data_file_is_deleted",),
    ),
    Mutant(
        "LMDB file missing",
        "a ref that is added is not in the copy",
        "store/backup.py",
        "        if time.monotonic() >= self._not_before:\n",
        "        if False:\n",
        ("store/test_opening.py::test_a_ref_that_was_added_is_copied_at_once_and_one_copy_is_kept",),
    ),
    # ---- secrets: docs/security.md
    Mutant(
        "secrets",
        "the log has what it is given",
        "logs.py",
        "        return one_line(redact(self._text(record)))\n",
        "        return one_line(self._text(record))\n",
        ("security/test_answers.py::test_the_bundle_the_logs_and_the_manager_are_told_no_secret",),
    ),
    Mutant(
        "secrets",
        "an error names a ref with its query",
        "control/documents.py",
        "    text = redact(str(error))\n",
        "    text = str(error)\n",
        ("security/test_answers.py::test_every_answer_names_refs_and_tells_no_secret",),
    ),
    Mutant(
        "secrets",
        "an origin's line that is no header is quoted",
        "sources/_connection.py",
        "    return _QUOTED.split(str(error), maxsplit=1)[0]\n",
        "    return str(error)\n",
        (
            "sources/test_https.py::test_an_origin_that_gives_our_headers_back_does_not_get_them_into_an_error",
        ),
    ),
    Mutant(
        "secrets",
        "a token goes to every host",
        "sources/_client.py",
        "not given and origin == _rules.origin_of(settings.hf_endpoint)",
        "not given",
        ("sources/test_hf.py::test_the_users_headers_are_for_an_endpoint_that_was_configured",),
    ),
)


def faults_of_table(mutants: tuple[Mutant, ...] = MUTANTS) -> list[str]:
    """What is wrong with the table itself: texts not found exactly once, tests that do not exist."""
    wrong = []
    for mutant in mutants:
        count = (ROOT / "src/weightfs" / mutant.file).read_text().count(mutant.text)
        if count != 1:
            wrong.append(f"{mutant.line}, {mutant.what}: {mutant.text!r} is {count} times in {mutant.file}")
        if mutant.text == mutant.replacement or not mutant.tests:
            wrong.append(f"{mutant.line}, {mutant.what}: nothing is taken out, or nobody would notice")
        wrong += [f"{mutant.line}, {mutant.what}: no {node}" for node in mutant.node_ids if not _exists(node)]
    return wrong


def _exists(node: str) -> bool:
    """Whether the file has that function (the parameter in brackets is pytest's to know)."""
    path, _, name = node.partition("::")
    if not (ROOT / path).is_file():
        return False
    tree = ast.parse((ROOT / path).read_text())
    return any(
        isinstance(found, ast.FunctionDef | ast.AsyncFunctionDef) and found.name == name.partition("[")[0]
        for found in ast.walk(tree)
    )


def _failed(source: Path, nodes: list[str]) -> tuple[int, list[str]]:
    """The exit code of pytest with that src/, and its lines about failures."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-rfE", "--tb=no", "-p", "no:cacheprovider", *nodes],
        cwd=ROOT,
        env={
            **os.environ,
            "PYTHONPATH": str(source),
            "COLUMNS": "400",
            "PYTEST_ADDOPTS": f"--timeout={SECONDS}",
        },
        capture_output=True,
        text=True,
        check=False,
        timeout=SECONDS * (len(nodes) + 1),
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith(("FAILED ", "ERROR "))]
    return done.returncode, lines or done.stdout.splitlines()[-3:]


def verdict(mutant: Mutant, code: int, lines: list[str]) -> str:
    """`killed`, `survived`, or what else came of it."""
    if code == 0:
        return "survived"
    if code != 1:
        return f"pytest ended with {code}: {lines}"
    for node in mutant.node_ids:
        mine = [line for line in lines if line.removeprefix("FAILED ").startswith(node)]
        if not mine:
            return f"survived {node}"
        if all(_BROKEN.search(line.partition(" - ")[2]) for line in mine):
            return f"broken: {mine[0]}"
    return "killed"


def main(words: list[str]) -> int:
    """Run all (or those whose line or fault has a word), and print what came of each."""
    chosen = [m for m in MUTANTS if not words or any(word in f"{m.line}: {m.what}" for word in words)]
    if wrong := faults_of_table():
        print(*wrong, sep="\n")
        return 2
    with tempfile.TemporaryDirectory(prefix="weightfs-mutants-") as place:
        source = Path(place) / "src"

        def renew() -> None:
            shutil.rmtree(source, ignore_errors=True)
            shutil.copytree(ROOT / "src", source, ignore=shutil.ignore_patterns("__pycache__"))

        renew()
        code, lines = _failed(source, sorted({node for mutant in chosen for node in mutant.node_ids}))
        if code != 0:
            print("with nothing taken out:", *lines, sep="\n")
            return 2
        killed = 0
        for mutant in chosen:
            renew()
            path = source / "weightfs" / mutant.file
            path.write_text(path.read_text().replace(mutant.text, mutant.replacement))
            began = time.monotonic()
            came = verdict(mutant, *_failed(source, mutant.node_ids))
            killed += came == "killed"
            print(f"{mutant.line:28} {mutant.what:64} {time.monotonic() - began:5.1f} s  {came}", flush=True)
    print(f"{killed} of {len(chosen)} mutants were killed")
    return 0 if killed == len(chosen) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
