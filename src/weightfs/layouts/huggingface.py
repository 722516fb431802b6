"""A HF_HUB_CACHE directory, as `huggingface_hub` 2 leaves it after a download and reads it offline.

Rules: nothing is claimed that is not there. A snapshot has the files that refs select, no others. `trees/<sha>.json`
lists all files of the revision, as the client itself writes it even for a download by patterns: from that list
`snapshot_download` tells a partial snapshot from a whole one, and refuses to take the first for the second
(IncompleteSnapshotError); with `allow_patterns` that the refs cover it returns it. `.no_exist` names only what that
list shows absent. All refs of one repository make one tree.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Final

from weightfs.core.hub import SCHEME, HubName, parse_hub
from weightfs.core.hubtree import is_commit, read_raw
from weightfs.core.manifest import Blob, Manifest
from weightfs.layouts.base import Dir, File, Inline, Item, Link

TREE_FORMAT: Final = 1  # `format_version` of huggingface_hub's tree cache
# The signature that makes backup tools skip the directory (bford.info/cachedir), as `huggingface_hub` writes it.
CACHEDIR_TAG: Final = b"Signature: 8a477f597d28d172789f06886806bc55\n"

# What clients ask for without knowing whether it is there. Offline, a name in `.no_exist` is a sure no; one that is in
# neither place is an error for some of them. Read from transformers 5 (`utils/__init__.py`, tokenizers, processors,
# `generation`, `modeling_utils`, PEFT), sentence-transformers, and vLLM (`transformers_utils/config.py`).
OPTIONAL_FILES: Final = (
    "1_Pooling/config.json",
    "adapter_config.json",
    "adapter_model.bin",
    "adapter_model.safetensors",
    "added_tokens.json",
    "audio_tokenizer_config.json",
    "chat_template.jinja",
    "chat_template.json",
    "config.json",
    "config_sentence_transformers.json",
    "custom_generate/generate.py",
    "generation_config.json",
    "hf_quant_config.json",
    "merges.txt",
    "model.safetensors",
    "model.safetensors.index.json",
    "modules.json",
    "params.json",
    "preprocessor_config.json",
    "processor_config.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "quantize_config.json",
    "sentence_bert_config.json",
    "sentencepiece.bpe.model",
    "special_tokens_map.json",
    "spiece.model",
    "tekken.json",
    "tiktoken.model",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "video_preprocessor_config.json",
    "vocab.json",
    "vocab.txt",
)

_PREFIX: Final = f"{SCHEME}://"
_LISTINGS: Final = 64  # lists of revisions whose outcome is remembered; one of 10,000 files takes a few MB


@dataclass(frozen=True, slots=True)
class _Listing:
    """What follows from a revision's full list of files: the tree file, and the optional files that are absent."""

    commit: str
    tree: bytes = field(repr=False)
    absent: tuple[str, ...]


@dataclass(slots=True)
class _Repository:
    """What the refs of one repository say together."""

    refs: dict[str, str] = field(default_factory=dict)  # revision → commit
    blobs: dict[str, Blob] = field(default_factory=dict)  # etag → blob
    files: dict[tuple[str, str], str] = field(default_factory=dict)  # (commit, path) → etag
    listings: dict[str, _Listing] = field(default_factory=dict)  # by commit

    def add(self, name: HubName, manifest: Manifest) -> None:
        listing = _listing(manifest.raw)
        commit = manifest.revision if listing is None else listing.commit
        if not is_commit(commit):
            return
        if listing is not None:
            self.listings.setdefault(commit, listing)
        if name.revision != commit:
            self.refs.setdefault(name.revision, commit)
        for entry in manifest.entries:
            etag = _etag(entry.blob)
            if etag and entry.span is None:
                self.blobs.setdefault(etag, entry.blob)
                self.files.setdefault((commit, entry.path), etag)

    def entries(self, place: str) -> Iterator[tuple[str, Item]]:
        for revision, commit in sorted(self.refs.items()):
            yield f"{place}/refs/{revision}", Inline(commit.encode())
        for etag, blob in sorted(self.blobs.items()):
            yield f"{place}/blobs/{etag}", File(blob)
        for (commit, path), etag in sorted(self.files.items()):
            up = "../" * (path.count("/") + 2)
            yield f"{place}/snapshots/{commit}/{path}", Link(f"{up}blobs/{etag}")
        for commit, listing in sorted(self.listings.items()):
            yield f"{place}/trees/{commit}.json", Inline(listing.tree)
            for path in listing.absent:
                yield f"{place}/.no_exist/{commit}/{path}", Inline(b"")


class HuggingFaceLayout:
    """`HF_HUB_CACHE=<mount>/huggingface/hub HF_HUB_OFFLINE=1`, with `HF_HOME` somewhere writable."""

    name = "huggingface"

    def entries(self, manifests: Sequence[Manifest]) -> Iterator[tuple[str, Item]]:
        """Yield `hub`, its CACHEDIR.TAG, then the repositories in the order of their names."""
        hub = f"{self.name}/hub"
        yield hub, Dir()
        yield f"{hub}/CACHEDIR.TAG", Inline(CACHEDIR_TAG)
        repositories: dict[str, _Repository] = {}
        for name, manifest in _named(manifests):
            place = f"{name.kind}--{name.repo.replace('/', '--')}"
            repositories.setdefault(place, _Repository()).add(name, manifest)
        for place, repository in sorted(repositories.items()):
            yield from repository.entries(f"{hub}/{place}")


def _named(manifests: Sequence[Manifest]) -> list[tuple[HubName, Manifest]]:
    """Those of the Hub. Refs to whole revisions first: where two refs saw one branch at two commits, they decide."""
    named = [
        (parse_hub(manifest.ref.removeprefix(_PREFIX)), manifest)
        for manifest in manifests
        if manifest.ref.startswith(_PREFIX)
    ]
    return sorted(named, key=lambda pair: bool(pair[0].path))


def _etag(blob: Blob) -> str:
    """The name of a blob's file: SHA-256 of what is in LFS or Xet, git's SHA-1 of the rest; empty if none is known."""
    return blob.digest.partition(":")[2]


@lru_cache(maxsize=_LISTINGS)
def _listing(raw: bytes) -> _Listing | None:
    """What follows from `Manifest.raw` of a revision; None if there is none that could be read."""
    try:
        tree = read_raw(raw)
    except ValueError:
        return None
    paths = {file.path for file in tree.files}
    absent = tuple(path for path in OPTIONAL_FILES if path not in paths)
    # Both documents have the same files, in the same words; ours begins with the commit instead of the version.
    return _Listing(tree.sha, b'{"format_version":%d,%s' % (TREE_FORMAT, tree.raw.partition(b",")[2]), absent)
