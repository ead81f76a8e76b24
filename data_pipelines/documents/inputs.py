"""The identity of a corpus: which files it had when it was read, their sizes, and samples of their bytes.

It is stored beside an artefact (inputs.json), not in its manifest, so that equal documents of
other files are the same artefact. No time is part of it: a copied corpus is the same corpus.
"""

import hashlib
import heapq
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

from data_pipelines.corpora import CorpusConfig, SourceFile, files_of
from retro_jax.errors import UserError
from retro_jax.storage import files
from retro_jax.storage.urls import is_url

INPUTS_FILE = "inputs.json"
_SAMPLED_FILES = 1000  # whose bytes are looked at: the first by a hash of their names
_BLOCKS, _BLOCK_BYTES = 64, 1 << 14  # of a larger file; a smaller one is read whole

Identity = dict[str, Any]


def identity_of(corpus: CorpusConfig) -> Identity:
    """The identity of a corpus now, in memory that does not grow with its files.

    Of up to 1,000 files the bytes count, of larger ones 64 blocks of 16 kB; of all others names and
    sizes. Of files at URLs the hashes count that their store states, and are not read.

    Raises:
      UserError: the corpus is missing, or cannot be listed.
    """
    count = size = names = 0
    sampled: list[tuple[int, str, SourceFile]] = []  # a heap, the last by hash first
    for file in files_of(corpus):
        # One file is the same under another name.
        name = "" if file.path == corpus.path else file.name
        names += _number(f"{name}\0{file.size}")  # a sum, as the order of a folder is anybody's
        count, size = count + 1, size + file.size
        entry = (-_number(name), name, file)
        if len(sampled) < _SAMPLED_FILES:
            heapq.heappush(sampled, entry)
        else:
            heapq.heappushpop(sampled, entry)
    contents = {name: _sample(file) for _, name, file in sampled}
    return {
        "files": count,
        "bytes": size,
        "names": f"{names % 2**128:032x}",
        "contents": dict(sorted(contents.items())),
    }


def identities_of(corpora: Iterable[CorpusConfig]) -> dict[str, Identity]:
    """The identity of each corpus by its name."""
    return {corpus.name: identity_of(corpus) for corpus in corpora}


def record(folder: pathlib.Path, identities: Mapping[str, Identity]) -> None:
    """Writes FOLDER/inputs.json."""
    files.write_atomically(folder / INPUTS_FILE, files.to_json({"corpora": dict(identities)}))


def recorded(folder: pathlib.Path) -> dict[str, Identity]:
    """The recorded identities; none in a folder that a version before this record made."""
    path = folder / INPUTS_FILE
    return files.read_json(path)["corpora"] if path.is_file() else {}


def refuse_changes(
    place: pathlib.Path, before: Mapping[str, Identity], now: Mapping[str, Identity], expected: str
) -> None:
    """Raises at the first corpus that has changed, and says how.

    Args:
      place: what was made of the corpora.
      before, now: identities by corpus; a corpus without a record is taken as it is.
      expected: the end of the message.
    """
    for name in sorted(set(before) & set(now)):
        change = _change(before[name], now[name])
        if change:
            raise UserError(
                f"{place} was made of other files: corpus {name!r} {change}; expected {expected}"
            )


def _change(before: Identity, now: Identity) -> str:
    """How two identities differ, in a few words; empty if they do not."""
    if before == now:
        return ""
    old, new = before["contents"], now["contents"]
    pairs = {name: _comparable(old[name], new[name]) for name in set(old) & set(new)}
    old = old | {name: pair[0] for name, pair in pairs.items()}
    new = new | {name: pair[1] for name, pair in pairs.items()}
    if before | {"contents": old} == now | {"contents": new}:
        return ""
    parts = []
    if max(before["files"], now["files"]) <= _SAMPLED_FILES:  # else files push others out
        parts += [f"lacks {name!r}" for name in sorted(set(old) - set(new))[:1]]
        parts += [f"also has {name!r}" for name in sorted(set(new) - set(old))[:1]]
    other = sorted(name for name in set(old) & set(new) if old[name] != new[name])
    parts += ["has other bytes" + (f" in {name!r}" if name else "") for name in other[:1]]
    sums = [f"{i['files']:,} files of {i['bytes']:,} bytes" for i in (before, now)]
    if sums[0] != sums[1]:
        parts.append(f"had {sums[0]}, has {sums[1]} now")
    return " and ".join(parts) or "has files of other names or sizes"


def _comparable(old: str, new: str) -> tuple[str, str]:
    """Contents of a file before and now; their sizes alone where stores state hashes of two kinds, or none.

    SIZE:HASH is of a file of this machine, SIZE:KIND:HASH and SIZE of one at a URL.
    """
    parts = [old.split(":"), new.split(":")]
    here = any(len(part) == 2 for part in parts)
    return (old, new) if here or parts[0][1:-1] == parts[1][1:-1] else (parts[0][0], parts[1][0])


def _number(text: str) -> int:
    """128 bits of a hash."""
    data = hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=16).digest()
    return int.from_bytes(data, "big")


def _sample(file: SourceFile) -> str:
    """The size of a file and a hash of its bytes or of blocks of them; at a URL, what is stated there."""
    if is_url(file.path):
        return f"{file.size}:{file.content}" if file.content else f"{file.size}"
    digest = hashlib.sha256()
    with open(file.path, "rb") as opened:
        if file.size <= _BLOCKS * _BLOCK_BYTES:
            digest.update(opened.read())
        else:
            for block in range(_BLOCKS):
                opened.seek((file.size - _BLOCK_BYTES) * block // (_BLOCKS - 1))
                digest.update(opened.read(_BLOCK_BYTES))
    return f"{file.size}:{digest.hexdigest()[:32]}"
