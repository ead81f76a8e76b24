"""Lays out two versions of a documentation for experiments/living_docs.gin.

    apt-get download linux-doc-6.1 linux-doc-6.12
    dpkg-deb -x linux-doc-6.1_*.deb old && dpkg-deb -x linux-doc-6.12_*.deb new
    python -m benchmarks.living_docs --old_docs=old --new_docs=new --docs_folder=living_docs

Writes, of the .rst files (also .rst.gz) in both folders:

    base/      files of the new version, without those that were chosen as changed
    changed/   --changed_files files whose text differs between the versions, in the new version
    before/    the same files in the old version
    before.txt their names, as launch.prepare --remove=@before.txt takes them
    earlier/   the other files whose text differs, in the old version: for training with near-copies

Files are chosen by a hash of their names, among those of 4 to 40 kB. Translations are left out.
"""

import gzip
import hashlib
import pathlib
from collections.abc import Collection

from absl import app, flags

from retro_jax.errors import UserError
from retro_jax.storage import files

_OLD = flags.DEFINE_string("old_docs", None, "Folder with the old version.")
_NEW = flags.DEFINE_string("new_docs", None, "Folder with the new version.")
_FOLDER = flags.DEFINE_string("docs_folder", "living_docs", "Where the three folders go.")
_CHANGED = flags.DEFINE_integer("changed_files", 60, "Files that are held out.")
_SIZES = range(4_000, 40_000)  # bytes of a changed file
_ROOT = "Documentation"


def read_docs(folder: pathlib.Path) -> dict[str, str]:
    """The text of each .rst file below a folder by its name within Documentation/."""
    found = {}
    for path in sorted(folder.rglob("*.rst*")):
        name = path.as_posix().rpartition(f"/{_ROOT}/")[2].removesuffix(".gz")
        if path.is_file() and name.endswith(".rst") and not name.startswith("translations/"):
            data = path.read_bytes()
            data = gzip.decompress(data) if path.suffix == ".gz" else data
            found[name] = data.decode("utf-8", "replace")
    if not found:
        raise UserError(f"{folder} holds no .rst file: expected a documentation")
    return found


def changed_files(old: dict[str, str], new: dict[str, str], count: int) -> list[str]:
    """Names of files that both versions have with other text, by a hash of the name."""
    names = [name for name in new if name in old and old[name] != new[name]]
    names = [name for name in names if len(new[name].encode()) in _SIZES]
    return sorted(names, key=lambda name: hashlib.sha256(name.encode()).hexdigest())[:count]


def earlier_versions(
    old: dict[str, str], new: dict[str, str], *, without: Collection[str]
) -> dict[str, str]:
    """The old texts of all changed files, of any size, but those of the given names."""
    names = set(old) & set(new) - set(without)
    return {name: old[name] for name in sorted(names) if old[name] != new[name]}


def main(_: list[str]) -> None:
    """Writes the folders."""
    for flag in (_OLD, _NEW):
        if flag.value is None:
            raise app.UsageError(f"--{flag.name} is missing: expected a folder")
    old, new = (read_docs(pathlib.Path(flag.value)) for flag in (_OLD, _NEW))
    chosen, folder = changed_files(old, new, _CHANGED.value), pathlib.Path(_FOLDER.value)
    parts = {
        "base": {name: text for name, text in new.items() if name not in set(chosen)},
        "changed": {name: new[name] for name in chosen},
        "before": {name: old[name] for name in chosen},
        "earlier": earlier_versions(old, new, without=chosen),
    }
    for part, texts in parts.items():
        for name, text in texts.items():
            path = folder / part / name
            path.parent.mkdir(parents=True, exist_ok=True)
            files.write_atomically(path, text.encode())
        size = sum(len(text.encode()) for text in texts.values())
        print(f"{part}: {len(texts):,} files, {size:,} bytes")
    lines = "".join(f"before/{name}\n" for name in chosen)
    files.write_atomically(folder / "before.txt", lines.encode())


if __name__ == "__main__":
    app.run(main)
